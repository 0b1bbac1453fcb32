"""States on disk: shared by agents, kept across restarts, private, bounded, and never a reason to crash."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.prefix_map import Shared, pack
from pilotfish.cache.state_folder import StateFolder, entries

BUILD = ModelBuild(weights="a" * 64, kv="f16", engine="llama-cpp-python 0.3.36")
STATE = memoryview(bytes(range(250)) * 40)
FILE_BYTES = 11_000  # a little more than a file of STATE takes


def key(start: int, n: int = 50) -> bytes:
    return pack(range(start, start + n))


@contextmanager
def opened(
    path: Path, budget_bytes: int = 10**9, build: ModelBuild = BUILD, context: int = 4096
) -> Iterator[StateFolder]:
    folder = StateFolder(path / "kv", build, model="tiny", context=context, budget_bytes=budget_bytes)
    yield folder
    folder.close()


def saved(path: Path, *keys: bytes, **options: int) -> None:
    with opened(path, **options) as folder:  # type: ignore[arg-type]
        for one in keys:
            folder.save(one, STATE)


def files(path: Path) -> list[Path]:
    return sorted((path / "kv").iterdir()) if (path / "kv").exists() else []


def test_a_state_survives_a_restart(tmp_path: Path) -> None:
    saved(tmp_path, key(0), key(1000))
    with opened(tmp_path) as folder:
        assert folder.longest(key(0, 80)) == Shared(key(0), 50)
        assert folder.load(key(0)) == STATE
        assert folder.load(key(2000)) is None


def test_ids_are_for_the_owners_eyes(tmp_path: Path) -> None:
    os.umask(0o022)
    saved(tmp_path, key(0))
    assert [path.stat().st_mode & 0o777 for path in files(tmp_path)] == [0o600]
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


def test_an_agent_sees_what_another_writes_and_removes(tmp_path: Path) -> None:
    with opened(tmp_path) as mine, opened(tmp_path) as theirs:
        assert mine.longest(key(0)) is None
        theirs.save(key(0), STATE)
        theirs.close()
        assert mine.longest(key(0)) == Shared(key(0), 50)
        files(tmp_path)[0].unlink()
        assert mine.longest(key(0)) is None


def test_a_file_that_goes_between_look_up_and_reading_is_a_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, key(0))
    with opened(tmp_path) as folder:
        assert folder.longest(key(0))
        files(tmp_path)[0].unlink()
        assert folder.load(key(0)) is None
        assert folder.longest(key(0)) is None
    assert not caplog.records


def test_states_of_other_builds_and_longer_than_the_context_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, key(0))
    with opened(tmp_path, build=BUILD.model_copy(update={"kv": "f32"})) as other:
        assert other.longest(key(0)) is None
        assert other.load(key(0)) is None
    with opened(tmp_path, context=49) as small:
        assert small.longest(key(0)) is None
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_a_damaged_file_is_told_removed_and_missed(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, key(0), key(1000))
    with opened(tmp_path) as reader:
        (path,) = (path for path in files(tmp_path) if path == reader._path(key(0)))
    path.write_bytes(path.read_bytes()[:cut])
    with opened(tmp_path) as folder:
        assert folder.longest(key(0)) is None
        assert folder.load(key(0)) is None
        assert folder.load(key(1000)) == STATE
    assert len(files(tmp_path)) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the saved KV state {path} is not used and is removed: it ")


def test_a_flipped_bit_in_the_state_is_found_when_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, key(0))
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with opened(tmp_path) as folder:
        assert folder.longest(key(0))
        assert folder.load(key(0)) is None
    assert "its state is damaged" in caplog.text
    assert files(tmp_path) == []


def test_a_file_under_anothers_name_is_not_believed(tmp_path: Path) -> None:
    saved(tmp_path, key(0), key(1000))
    one, other = files(tmp_path)
    other.write_bytes(one.read_bytes())
    with opened(tmp_path) as folder:
        assert [folder.load(key(start)) is not None for start in (0, 1000)].count(True) == 1


def test_another_versions_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, key(0))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"PFSTATE1", b"PFSTATE2", 1))
    with opened(tmp_path) as folder:
        assert folder.longest(key(0)) is None
    assert files(tmp_path) == [path]
    assert not caplog.records


def test_a_file_that_can_be_neither_read_nor_removed_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, key(0))
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with opened(tmp_path) as folder, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
        assert folder.longest(key(0))
        assert folder.load(key(0)) is None
        assert folder.longest(key(0)) is None
    assert "its state is damaged" in caplog.text


def test_a_longer_state_replaces_the_one_it_begins_with(tmp_path: Path) -> None:
    saved(tmp_path, key(0), key(0, 200))
    with opened(tmp_path) as folder:
        assert len(files(tmp_path)) == 1
        assert folder.covers(key(0))
        assert not folder.covers(key(1000))


def test_the_least_recently_touched_files_make_room(tmp_path: Path) -> None:
    saved(tmp_path, key(0), key(1000), key(2000))
    with opened(tmp_path, budget_bytes=3 * FILE_BYTES) as folder:
        for age, start in enumerate((1000, 2000, 0)):  # the oldest last
            os.utime(folder._path(key(start)), (10**9 - age, 10**9 - age))
        assert folder.load(key(0)) == STATE  # touches it
        folder.save(key(3000), STATE)
        folder.close()
        assert {start for start in (0, 1000, 2000, 3000) if folder._path(key(start)).exists()} == {0, 1000, 3000}
        assert sum(stored.n_bytes for stored in entries(tmp_path / "kv")) <= 3 * FILE_BYTES


def test_a_state_larger_than_the_budget_is_not_written(tmp_path: Path) -> None:
    saved(tmp_path, key(0))
    saved(tmp_path, key(1000), budget_bytes=FILE_BYTES // 2)
    assert len(files(tmp_path)) == 1


def test_a_full_disk_is_told_once_and_costs_the_state_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, key(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        try:
            folder.save(key(1000), STATE)
            folder.save(key(2000), STATE)
            folder._settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(files(tmp_path)) == 1
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "KV states cannot be kept in" in caplog.text
        assert "free some room" in caplog.text
        folder.save(key(3000), STATE)
    assert len(files(tmp_path)) == 2


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kv").write_text("a file stands here")
    saved(tmp_path, key(0))
    assert "KV states cannot be kept in" in caplog.text


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    saved(tmp_path, key(0))
    fresh, old = tmp_path / "kv/a.tmp", tmp_path / "kv/b.tmp"
    for half in (fresh, old):
        half.write_bytes(b"half")
    os.utime(old, (0, 0))
    saved(tmp_path, key(1000))
    assert [path.name for path in files(tmp_path) if path.suffix == ".tmp"] == ["a.tmp"]
