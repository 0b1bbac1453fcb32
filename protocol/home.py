"""`~` in the paths that people write: spelt out, or one sentence that says which home directory is not there."""

from __future__ import annotations

import os

from pilotfish.protocol.errors import SettingsError


def expand_user(path: str | os.PathLike[str]) -> str:
    """The path with its `~` or `~NAME` spelt out. Raises SettingsError for a home that nobody knows."""
    full = os.path.expanduser(os.fspath(path))
    if not full.startswith("~"):
        return full
    whose = full.partition("/")[0]
    fix = "set HOME" if whose == "~" else f"as './{full}' if a folder is called that"
    raise SettingsError(f"there is no home directory {whose!r}: write {full!r} out from /, or {fix}")
