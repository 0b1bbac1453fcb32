"""`~` in a path is a home directory, or a sentence; never a folder of that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.home import expand_user


def test_a_home_directory_is_spelt_out_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand_user("~/x") == expand_user(Path("~/x")) == "/home/someone/x"
    for path in ("hf://org/repo", "/a//b", "./~x", "a~", ""):
        assert expand_user(path) == path


def test_an_unknown_home_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"no home directory '~nosuchuser': .* or as '\./~nosuchuser/x'"):
        expand_user("~nosuchuser/x")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(SettingsError, match="no home directory '~': .* or set HOME"):
        expand_user("~/.cache")
