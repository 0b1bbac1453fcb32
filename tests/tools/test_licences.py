"""docs/licences.md is of the locks as they are, and says what the installed packages say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import pilotfish

PAGE = (Path(pilotfish.__file__).parent / "docs/licences.md").read_text()
_, *ROWS = re.findall(r"(?m)^\| (\S+) \| (\S+) \| (.+) \| ([\w, -]+) \|$", PAGE)


@pytest.fixture
def licences(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("licences")


def test_every_locked_version_is_listed_once(licences: ModuleType) -> None:
    read = {(name, version): locks.split(", ") for name, version, _, locks in ROWS}
    unread = {tuple(pin.split()) for pin in PAGE.rstrip(".\n").rpartition("\n\n")[2].split(", ")}
    locked = licences.locked()
    assert len(read) == len(ROWS)
    assert read.items() <= locked.items()
    assert locked.keys() - read.keys() == unread
    assert {lock for pin in unread for lock in locked[pin]} == {"cloud-gpu"}


def test_what_is_installed_says_the_same(licences: ModuleType) -> None:
    compared = [(name, told, now) for name, version, told, _ in ROWS if (now := licences.licence(name, version))]
    assert len(compared) > 50
    assert not [one for one in compared if one[1] != one[2]], "run `make licences`"


def test_no_licence_is_missing() -> None:
    assert [name for name, _, told, _ in ROWS if told == "none stated"] == []
