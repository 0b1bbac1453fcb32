"""An operator's own settings of vLLM, on top of ours: which may be given, and which of them change the numbers.

They are fields of vLLM's `EngineArgs`, by its names, in one JSON object: quantisation, memory, a KV connector
such as LMCache's. What the engine needs to be as it is (`OURS`) is refused with the reason. Imports nothing of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pilotfish.protocol.errors import ModelError

_ONE: Final = "one scheduler has all layers and all sessions: scale by workers, or with tensor_parallel_size"
_ENGINE: Final = "the engine draws and schedules by its own rules"
_SETTING: Final = "a setting of its own says it"
_EXACT: Final = "verification in one pass depends on it"

#: names that are refused -> why
OURS: Final[dict[str, str]] = {
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size"), _ONE),
    **dict.fromkeys(("decode_context_parallel_size", "prefill_context_parallel_size", "nnodes"), _ONE),
    **dict.fromkeys(("distributed_executor_backend", "worker_cls", "scheduler_cls", "async_scheduling"), _ENGINE),
    **dict.fromkeys(("speculative_config", "generation_config", "enable_chunked_prefill", "load_format"), _EXACT),
    **dict.fromkeys(("block_size", "prefix_caching_hash_algo"), "the prefix index computes the same block names"),
    **dict.fromkeys(("max_num_scheduled_tokens", "max_num_batched_tokens", "long_prefill_token_threshold"), _EXACT),
    **dict.fromkeys(("skip_tokenizer_init", "disable_log_stats", "use_tqdm_on_load"), "the engine core runs alone"),
    "model": f"{_SETTING}: --target-model",
    "dtype": f"{_SETTING}: --dtype",
    "max_model_len": f"{_SETTING}: --context",
    "max_num_seqs": f"{_SETTING}: --max-sessions",
    "num_gpu_blocks_override": f"{_SETTING}: --kv-cache-gb",
    "kv_cache_memory_bytes": f"{_SETTING}: --kv-cache-gb",
    "enable_prefix_caching": f"{_SETTING}: --kv-reuse",
    "enforce_eager": f"{_SETTING}: --compiled",
}

#: names that say where bytes lie, and not what they are: workers that differ in them serve one target
NEUTRAL: Final = frozenset(
    {
        "kv_transfer_config", "kv_offloading_size", "kv_offloading_backend", "gpu_memory_utilization", "cpu_offload_gb",
        "download_dir", "max_parallel_loading_workers",
    }
)  # fmt: skip


def read(text: str) -> dict[str, Any]:
    """The arguments; {} for "". Raises ModelError for what is no JSON object and for one of ours."""
    try:
        given = json.loads(text or "{}")
    except ValueError as error:
        given = str(error)
    if not isinstance(given, dict):
        raise ModelError(f'--engine-args is no JSON object ({given}): write it as in \'{{"quantization": "fp8"}}\'')
    for name in given:
        if why := OURS.get(name):
            raise ModelError(f"--engine-args may not set {name}: {why}. Leave it out")
    return given


def ranks(given: Mapping[str, Any]) -> int:
    """Devices one model is spread over. Raises ModelError unless it is a number of them."""
    count = given.get("tensor_parallel_size", 1)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"tensor_parallel_size is the number of devices to spread the model over, not {count!r}")
    return count


def mark(given: dict[str, Any]) -> str:
    """What of them belongs to the target's fingerprint: sessions must not move between other numbers. "" for none."""
    numbers = {name: value for name, value in given.items() if name not in NEUTRAL}
    return f" {json.dumps(numbers, sort_keys=True)}" if numbers else ""
