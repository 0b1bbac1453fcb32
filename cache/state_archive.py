"""Saved KV states from one agent's disk to another's: a file that holds any number of them.

The states of an archive are used only by the model build that computed them; any other refuses the archive as a whole
and names the field that differs.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from pilotfish.cache import state_file
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.state_folder import StateFolder, Stored
from pilotfish.protocol.errors import BuildMismatch, StateError, UsageError


def export_states(stored: Iterable[Stored], archive: Path) -> int:
    """Write states to a new archive, readable by its owner only; how many. One that went meanwhile is left out.

    Raises StateError for a damaged one, UsageError if the archive cannot be written; an older archive then stands.
    """
    half = archive.with_name(f"{archive.name}.{secrets.token_hex(4)}.tmp")
    count = 0
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
            for one in stored:
                try:
                    with one.path.open("rb") as source:
                        header = state_file.read_header(source)
                        state_file.write(target, header, state_file.read_state(source, header))
                except FileNotFoundError:
                    continue
                count += 1
        half.replace(archive)
    except OSError as error:
        raise UsageError(f"{archive} cannot be written: {error.strerror or error}") from error
    finally:
        half.unlink(missing_ok=True)
    return count


def import_states(archive: Path, folder: StateFolder) -> int:
    """Add an archive's states to a folder, under its budget; how many. All of them are checked before the first is.

    Raises BuildMismatch, StateError if the archive is damaged, UsageError if it cannot be read or kept.
    """
    try:
        with archive.open("rb") as file:
            for header in state_file.headers(file):
                _check(header.build, folder.build)
                state_file.read_state(file, header)
            file.seek(0)
            return sum(folder.add(header, state_file.read_state(file, header)) for header in state_file.headers(file))
    except StateError as error:
        raise type(error)(f"{archive} is not imported: {error}") from None
    except OSError as error:
        raise UsageError(f"{archive} cannot be imported: {error.strerror or error}") from error


def _check(theirs: ModelBuild, ours: ModelBuild) -> None:
    if difference := ours.difference(theirs):
        advice = "import it where the same draft model and llama-cpp-python run"
        raise BuildMismatch(f"another model build exported it ({difference}); {advice}")
