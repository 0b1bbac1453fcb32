"""`pilotfish cache`: the states on disk, listed, summed up, moved to another device and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from redis.asyncio import Redis

from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.prefix_map import pack
from pilotfish.cache.state_folder import StateFolder
from pilotfish.cli.main import run_command
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker, connect

STATE = memoryview(bytes(9000))


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"GGUF as far as its digest is concerned")
    return path


def folder_of(cache_dir: Path, draft: Path, kv: str = "f16") -> StateFolder:
    build = ModelBuild.of(draft, kv)
    return StateFolder(cache_dir / "kv", build, model=draft.stem, context=4096, budget_bytes=10**8)


@pytest.fixture
def device(tmp_path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with two states, of 30 and of 40 tokens."""
    folder = folder_of(tmp_path / "device", draft)
    for start, n in ((0, 30), (500, 40)):
        folder.save(pack(range(start, start + n)), STATE)
    folder.close()
    monkeypatch.setenv("PILOTFISH_CACHE_DIR", str(tmp_path / "device"))
    monkeypatch.setenv("PILOTFISH_DRAFT_MODEL", str(draft))
    return tmp_path / "device"


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    capsys.readouterr()
    assert run_command(["cache", "ls", "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_ls_says_what_there_is_and_no_ids(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert sorted(one["tokens"] for one in found) == [30, 40]  # type: ignore[type-var]
    assert {one["model"] for one in found} == {"draft"}
    assert "key" not in found[0]
    assert run_command(["cache", "ls"]) == 0
    assert all(str(one["name"]) in capsys.readouterr().out for one in found[:1])


def test_ls_of_nothing_says_who_writes_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "ls", "--cache-dir", str(tmp_path)]) == 0
    assert "--edge-cache-disk-mb" in capsys.readouterr().out
    assert run_command(["cache", "export", "x", "--cache-dir", str(tmp_path)]) == 2


async def test_stats_sums_up_the_disk_and_asks_running_agents(
    redis: Redis, redis_url: str, device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import asyncio

    broker = EdgeBroker(connect(redis_url), keys.DEFAULT_TENANT, "edge1", "boot1")
    await broker.beat({"running": "0", "cache_hits": "7"}, taking=True)
    assert await asyncio.to_thread(run_command, ["cache", "stats", "--json", "--redis-url", redis_url]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["disk"].items() >= {"states": 2, "tokens": 70}.items()
    assert said["agents"] == {"edge1": {"cache_hits": "7"}}
    assert await asyncio.to_thread(run_command, ["cache", "stats", "--redis-url", redis_url]) == 0
    assert "cache_hits=7" in capsys.readouterr().out
    await broker.redis.aclose()


def test_stats_needs_no_redis(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "stats"]) == 0
    assert "2 states  70 tokens" in capsys.readouterr().out
    assert run_command(["cache", "stats", "--json", "--redis-url", "redis://127.0.0.1:1"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["agents"] == {}
    assert "agents are not asked: " in said.err, "or nobody would know that there may be some"


def test_states_move_to_another_device(
    device: Path, tmp_path: Path, draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "states.pfs"
    first = str(listed(capsys)[0]["name"])
    assert run_command(["cache", "export", str(archive)]) == 0
    assert archive.stat().st_mode & 0o777 == 0o600
    there = ["--cache-dir", str(tmp_path / "there"), "--edge-cache-disk-mb", "1"]
    assert run_command(["cache", "import", str(archive), *there]) == 0
    assert "2 states imported" in capsys.readouterr().out
    assert folder_of(tmp_path / "there", draft).load(pack(range(30))) == STATE
    assert run_command(["cache", "export", str(archive), first[:8]]) == 0
    assert "1 state exported" in capsys.readouterr().out


def test_another_build_is_refused_with_the_field_that_differs(
    device: Path, tmp_path: Path, draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "states.pfs"
    run_command(["cache", "export", str(archive)])
    draft.write_bytes(b"GGUF, retrained")
    assert run_command(["cache", "import", str(archive), "--edge-cache-disk-mb", "1"]) == 2
    assert "another model build exported it (weights is " in capsys.readouterr().err
    other = folder_of(tmp_path / "f32", draft, kv="f32")
    other.save(pack(range(30)), STATE)
    other.close()
    run_command(["cache", "export", str(archive), "--cache-dir", str(tmp_path / "f32")])
    assert run_command(["cache", "import", str(archive), "--edge-cache-disk-mb", "1"]) == 2
    assert "(kv is f32 there and f16 here)" in capsys.readouterr().err
    assert len(listed(capsys)) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-9] + b"x" + data[-8:]])
def test_a_damaged_archive_is_refused_as_a_whole(
    device: Path, tmp_path: Path, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    archive = tmp_path / "states.pfs"
    run_command(["cache", "export", str(archive)])
    archive.write_bytes(damage(archive.read_bytes()))
    there = ["--cache-dir", str(tmp_path / "there"), "--edge-cache-disk-mb", "1"]
    assert run_command(["cache", "import", str(archive), *there]) == 1
    assert f"{archive} is not imported: it" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_import_needs_a_disk_and_a_file(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "import", "x"]) == 2
    assert "set edge_cache_disk_mb" in capsys.readouterr().err
    assert run_command(["cache", "import", "x", "--edge-cache-disk-mb", "1"]) == 2
    assert "x cannot be imported: No such file" in capsys.readouterr().err
    assert run_command(["cache", "export", "no/such/folder/x"]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_an_import_says_what_found_no_room(device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "states.pfs"
    run_command(["cache", "export", str(archive)])
    one_fits = ["--edge-cache-disk-mb", "0.015"]
    for name, options, kept in (("a", one_fits, 1), ("b", ["--context", "35"], 1), ("c", [], 2)):
        there = ["--cache-dir", str(tmp_path / name)]
        assert run_command(["cache", "import", str(archive), "--edge-cache-disk-mb", "1", *there, *options]) == 0
        said = capsys.readouterr()
        assert f"{kept} state{'s' * (kept > 1)} imported" in said.out
        assert ("1 state left out: " in said.err) == (kept == 1)
        assert len(list((tmp_path / name / "kv").iterdir())) == kept


def test_the_last_used_state_is_the_last_of_an_export(device: Path, tmp_path: Path) -> None:
    """So that an import which has no room for all keeps it."""
    first, last = sorted((device / "kv").iterdir())
    for at, file in enumerate((first, last), 1):
        os.utime(file, ns=(at, at))
    assert run_command(["cache", "export", str(tmp_path / "states.pfs")]) == 0
    assert (tmp_path / "states.pfs").read_bytes() == first.read_bytes() + last.read_bytes()


def test_an_archive_is_a_file_and_holds_something(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "/", str(tmp_path), str(tmp_path / "pipe")):
        assert run_command(["cache", "export", name]) == 2
        assert "is not a file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo(), "what was there stands"
    (tmp_path / "empty").touch()
    assert run_command(["cache", "import", str(tmp_path / "empty"), "--edge-cache-disk-mb", "1"]) == 1
    assert "empty is not imported: it holds no saved state" in capsys.readouterr().err


def test_a_damaged_state_is_named_when_it_cannot_be_exported(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged, *_) = (device / "kv").iterdir()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert run_command(["cache", "export", str(tmp_path / "states.pfs")]) == 1
    said = capsys.readouterr().err
    assert f"{damaged} cannot be exported: its state is damaged" in said
    assert f"`pilotfish cache evict {damaged.stem}`" in said
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("states.pfs")]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kv").touch()
    for command in (["ls"], ["stats"], ["evict", "--all"]):
        assert run_command(["cache", *command, "--cache-dir", str(tmp_path)]) == 2
        assert f"the saved states in {tmp_path / 'kv'} cannot be read: Not a directory" in capsys.readouterr().err


def test_a_state_that_cannot_be_removed_is_told(
    device: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert run_command(["cache", "evict", "--all"]) == 2
    assert "cannot be removed: Permission denied" in capsys.readouterr().err


def test_evict_removes_what_is_named_or_all(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (str(one["name"]) for one in listed(capsys))
    assert run_command(["cache", "evict"]) == 2
    assert run_command(["cache", "evict", "zzz"]) == 2
    assert "no saved state 'zzz'" in capsys.readouterr().err
    assert run_command(["cache", "evict", ""]) == 2, "a variable that is unset names nothing"
    assert run_command(["cache", "evict", first[:10]]) == 0
    assert [one["name"] for one in listed(capsys)] == [second]
    assert run_command(["cache", "evict", "--all"]) == 0
    assert listed(capsys) == []
