"""Saved KV states from one agent's disk to another's: a file that holds any number of them.

The states of an archive are used only by the model build that computed them; any other refuses the archive as a whole
and names the field that differs.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pilotfish.cache import state_file
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.state_file import Header
from pilotfish.cache.state_folder import StateFolder, Stored
from pilotfish.protocol.errors import BuildMismatch, StateError, UsageError


class Imported(NamedTuple):
    """What became of an archive's states: now in the folder, and not, as too long for its context or its budget."""

    kept: int
    left_out: int


def export_states(stored: Iterable[Stored], archive: Path) -> int:
    """Write states to a new archive, readable by its owner only; how many. One that went meanwhile is left out.

    Raises StateError for a damaged one, UsageError if the archive cannot be written; an older archive then stands.
    """
    try:
        if archive.exists() and not archive.is_file():  # a device would be replaced by a file
            raise UsageError(f"{archive} is not a file: name the archive to write")
        half = archive.with_name(f"{archive.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
                count = sum(_append(target, one) for one in stored)
            half.replace(archive)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{archive} cannot be written: {error.strerror or error}") from error
    return count


def _append(target: BinaryIO, one: Stored) -> bool:
    try:
        with one.path.open("rb") as source:
            header = state_file.read_header(source)
            state = state_file.read_state(source, header)
    except FileNotFoundError:
        return False
    except StateError as error:
        advice = f"`pilotfish cache evict {one.path.stem}` removes it"
        raise type(error)(f"{one.path} cannot be exported: {error}; {advice}") from None
    state_file.write(target, header, state)
    return True


def import_states(archive: Path, folder: StateFolder) -> Imported:
    """Add an archive's states to a folder, under its budget. All of them are checked before the first is added.

    Of more than the budget holds, those that come last stay. Raises BuildMismatch, StateError if the archive is
    damaged or holds nothing, UsageError if it cannot be read or kept.
    """
    try:
        with archive.open("rb") as file:
            for header in state_file.headers(file):
                _check(header.build, folder.build)
                state_file.read_state(file, header)
            file.seek(0)
            keys = [_add(folder, file, header) for header in state_file.headers(file)]
            if not keys:
                raise StateError("it holds no saved state")
    except StateError as error:
        raise type(error)(f"{archive} is not imported: {error}") from None
    except OSError as error:
        raise UsageError(f"{archive} cannot be imported: {error.strerror or error}") from error
    kept = sum(key in folder for key in set(keys))
    return Imported(kept, len(set(keys)) - kept)


def _add(folder: StateFolder, file: BinaryIO, header: Header) -> bytes:
    folder.add(header, state_file.read_state(file, header))
    return header.key


def _check(theirs: ModelBuild, ours: ModelBuild) -> None:
    if difference := ours.difference(theirs):
        advice = "import it where the same draft model and llama-cpp-python run"
        raise BuildMismatch(f"another model build exported it ({difference}); {advice}")
