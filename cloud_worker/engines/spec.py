"""Which engine a worker runs, on what, and how it is opened: the one place that knows every engine by name.

Each engine's module is imported here, at use: it brings its library with it. Another package adds an engine by an entry
point of the group `pilotfish.engines`, which takes an EngineSpec (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.cloud_worker.engines.base import Verifier
from pilotfish.protocol.errors import ModelError
from pilotfish.protocol.fleet import Vocabulary

GROUP = "pilotfish.engines"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine to open, on what. `cores` (as in "0,1") binds the child; empty leaves it where it is.

    An engine that has work and says nothing for `silence_seconds` hangs, and is killed. The fake engine's `model` is
    its switches, as in "step_ms=20,flip_rate=0.01,flip_seed=3"; `engine_args` are vLLM's (`vllm_args.py`).
    """

    engine: str
    model: str
    context: int = 4096
    draft_max: int = 16
    max_sessions: int = 16
    threads: int = 1
    dtype: str = "float32"
    kv_cache_gb: int = 1
    resident: bool = True  # sessions keep their KV between rounds
    prefix_cache: bool = True  # and what they leave behind serves others
    compiled: bool = False  # vLLM: faster rounds, a slower start
    engine_args: str = ""
    cores: str = ""
    silence_seconds: float = 120.0


def open_verifier(spec: EngineSpec) -> tuple[Verifier, Vocabulary]:
    """Import and open the engine a spec names, with its vocabulary. Raises ModelError or EngineError."""
    limits: dict[str, Any] = {"context": spec.context, "draft_max": spec.draft_max}
    if spec.engine == "fake":
        from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier

        vocabulary = Vocabulary(tuple(bytes([value]) for value in range(VOCAB)))
        switches = {**fake_switches(spec.model), "resident": spec.resident}
        if not spec.prefix_cache:
            switches["kv_blocks"] = 0
        return FakeVerifier(**limits, **switches), vocabulary
    limits["max_sessions"], limits["threads"] = spec.max_sessions, spec.threads
    if spec.engine == "llamacpp":
        from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier

        llama = LlamaCppVerifier(Path(spec.model), resident=spec.resident, **limits)
        model = llama.model
        stops = tuple(sorted(model.eog_ids))
        return llama, Vocabulary(tuple(model.token_bytes), model.chat_template or "", stops)
    if spec.engine == "vllm":
        from pilotfish.cloud_worker.engines.hf_vocabulary import read_vocabulary
        from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier

        vocabulary = read_vocabulary(Path(spec.model))
        for name in ("dtype", "kv_cache_gb", "resident", "prefix_cache", "compiled", "engine_args"):
            limits[name] = getattr(spec, name)
        return VllmVerifier(Path(spec.model), **limits), vocabulary
    return _of_another_package(spec)


def _of_another_package(spec: EngineSpec) -> tuple[Verifier, Vocabulary]:
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=spec.engine):
        try:
            opener = entry.load()
        except Exception as error:
            raise ModelError(
                f"the engine {spec.engine!r} ({entry.value}) cannot be loaded ({type(error).__name__}: {error}): "
                "repair or uninstall its package"
            ) from error
        opened: tuple[Verifier, Vocabulary] = opener(spec)
        return opened
    raise ModelError(
        f"there is no engine {spec.engine!r}: choose vllm, llamacpp or fake, or install the package that has it"
    )


def fake_switches(text: str) -> dict[str, Any]:
    """`FakeVerifier`'s arguments from "step_ms=20,flip_rate=0.01,flip_seed=3". Raises ModelError."""
    kinds: dict[str, Callable[[str], float]] = {
        "step_ms": float, "flip_rate": float, "flip_seed": int, "row_us": float, "kv_blocks": int, "block_size": int,
    }  # fmt: skip
    try:
        pairs = [part.split("=", 1) for part in text.split(",") if part not in ("", ".")]  # an empty path reads "."
        return {name: kinds[name](value) for name, value in pairs}
    except (KeyError, ValueError) as error:
        fix = f"give {', '.join(kinds)} as name=number"
        raise ModelError(f"the fake engine cannot read {text!r} ({error}): {fix}") from None
