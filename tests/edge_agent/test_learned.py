from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from pilotfish.edge_agent.calibration import BINS, Calibration
from pilotfish.edge_agent.learned import Key, Store, added
from pilotfish.protocol.errors import StoreError

KEY = Key("d" * 64, "t" * 16, 0.7, "margin")


def sums(score: float = 0.9, labels: int = 3) -> dict[str, np.ndarray]:
    found = Calibration()
    for _ in range(labels):
        found.observe(score, True)
    return found.sums()


def test_what_is_added_is_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "learned")
    assert store.load(KEY) == {}
    store.add(KEY, sums())
    total = store.add(KEY, sums())
    assert total["weight"].sum() == Store(tmp_path / "learned").load(KEY)["weight"].sum() == 6
    assert store.load(Key(KEY.draft, KEY.target, 0.0, KEY.strategy)) == {}
    assert not list((tmp_path / "learned").glob(".saving-*"))


def test_agents_that_save_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    threads = [Thread(target=lambda: [Store(tmp_path).add(KEY, sums()) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Store(tmp_path).load(KEY)["agreed"].sum() == 4 * 5 * 3


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.add(KEY, sums())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left.*free some space"):
            store.add(KEY, sums())
    assert store.load(KEY)["weight"].sum() == 3
    assert not list(tmp_path.glob(".saving-*"))
    assert store.add(KEY, sums())["weight"].sum() == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"version": 2, "sums": {}}',
        b'{"version": 1, "sums": {"weight": [1, 2]}}',
        json.dumps({"version": 1, "sums": {"weight": [-1.0] * BINS}}).encode(),
        json.dumps({"version": 1, "sums": {"weight": ["x"] * BINS}}).encode(),
        b'{"version": 1, "sums": {"weight": [NaN]}}',
        b"\xff\xfe",
    ],
)
def test_a_broken_file_is_told_and_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / KEY.file_name
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is not what pilotfish wrote.*kept as"):
        Store(tmp_path).load(KEY)
    (aside,) = tmp_path.glob("*.broken-*")
    assert aside.read_bytes() == content
    assert Store(tmp_path).add(KEY, sums())["weight"].sum() == 3


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be saved"):
        Store(tmp_path / "file").add(KEY, sums())


def test_another_machines_folder_is_merged(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    here.add(KEY, sums())
    there.add(KEY, sums(labels=5))
    assert here.merge(there.folder) == 1
    assert here.load(KEY)["weight"].sum() == 8
    (there.folder / "x.json").write_text("{}")
    with pytest.raises(StoreError, match="leave it out"):
        here.merge(there.folder)


def test_forgetting_never_makes_a_sum_negative() -> None:
    assert added({"a": np.array([1.0])}, {"a": np.array([-3.0])})["a"].tolist() == [0.0]
