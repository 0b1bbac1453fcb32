"""Raw rounds on disk survive a run that is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablations import record
from pilotfish.bench.ablation.records import FILE, Key, Log, key_of, read
from pilotfish.protocol.errors import UsageError


def test_what_is_added_is_read(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.add(record(prompt=3))
    log.close()
    assert read(tmp_path) == [record(prompt=3)]
    assert key_of(record(prompt=3)) == Key("baseline", 0.0, 1, 3)


def test_half_a_line_is_cut_off_and_asked_again(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.add(record(prompt=1))
    log.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b'{"variant": "base')
    assert len(read(tmp_path)) == 1
    log = Log(tmp_path)
    log.add(record(prompt=2))
    log.close()
    assert [one["prompt"] for one in read(tmp_path)] == [1, 2]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"a": 1}\nnot json\n')
    with pytest.raises(UsageError, match="line 2 is broken"):
        read(tmp_path)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read(tmp_path)
