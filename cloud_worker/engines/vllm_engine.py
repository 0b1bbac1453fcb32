"""vLLM as a verifier: token ids in, the target's own draws out, one forward pass per round.

A session is one engine request that stays in the scheduler between its rounds, with its blocks, so that a round
computes what its prefix lacks plus 1 + K rows. That is a cache: bounded in tokens and time, given up whenever others
need the room; a session that is not there costs one prefill, most of which the prefix cache knows. The engine core is
driven directly in this process (`vllm_start.py`): no tokenizer, no detokenizer, no request front end. `VerifyScheduler`
attaches the drafts to the step that ends the prefix, `CoupledWorker` draws. Nothing here imports vLLM before a
`VllmVerifier` is made.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pilotfish.cloud_worker.engines import vllm_args, vllm_kv_events, vllm_start
from pilotfish.cloud_worker.engines.base import (
    EngineInfo,
    KvChange,
    Verifier,
    VerifyEvent,
    VerifyRequest,
    check_request,
)
from pilotfish.cloud_worker.engines.vllm_round import Round
from pilotfish.protocol.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

    from pilotfish.cloud_worker.engines.vllm_scheduler import VerifyScheduler

STEP_TOKENS: Final = 2048  # most prefix rows of one step; a longer prefix comes in chunks
CHUNK_TOKENS: Final = 128  # most rows of one prefix in a step that other requests wait for
STALLED_STEPS: Final = 100  # so many steps in a row without a row: nothing will ever be scheduled again
RESIDENT_SHARE: Final = 0.5  # of the KV cache that parked sessions may hold
RESIDENT_SECONDS: Final = 300.0  # a session parked for longer is let go


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
        resident: bool = True,
        prefix_cache: bool = True,
        compiled: bool = False,
        engine_args: str = "",
    ) -> None:
        """Load `model_dir` (Hugging Face layout, safetensors). `kv_blocks` replaces `kv_cache_gb` (tests).

        Without `resident` every round is a request of its own; without `prefix_cache` it computes all of its prefix.
        With `compiled` vLLM compiles the model (CPU) or captures graphs (GPU) at start, which other numbers come from.

        `engine_args` (`vllm_args.py`) come on top.

        Raises EngineError when vLLM is missing or another version, ModelError when the model cannot be served.
        """
        distribution = vllm_start.installed()
        vllm_start.check_model(model_dir, context)
        extra = vllm_args.read(engine_args)
        max_model_len = vllm_start.whole_blocks(context + draft_max + 1)
        self._core = vllm_start.start_core(
            threads,
            extra,
            model=str(model_dir),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_sessions,
            # Prefix rows are scheduled up to step_tokens; the drafts of the sessions find room beside them.
            max_num_scheduled_tokens=step_tokens,
            max_num_batched_tokens=step_tokens + min(max_sessions * draft_max, step_tokens),
            long_prefill_token_threshold=min(CHUNK_TOKENS, max_model_len),
            num_speculative_tokens=max(1, draft_max),
            kv_cache_memory_bytes=kv_cache_gb << 30,
            num_gpu_blocks_override=kv_blocks,
            enable_prefix_caching=prefix_cache,
            enforce_eager=not compiled,
        )
        self._scheduler: VerifyScheduler = self._core.scheduler
        self._kv_events = vllm_kv_events.watch(self._core) if prefix_cache else None
        if resident:
            self._scheduler.parked_max = int(RESIDENT_SHARE * self.kv_tokens)
        self._rounds: dict[str, Round] = {}  # by the id of their engine request, which a session keeps
        self._requests: dict[str, str] = {}  # id of a running request of ours -> of its engine request
        self._count = itertools.count()
        self._stalled = 0  # steps in a row that computed nothing
        self.info = EngineInfo(
            engine="vllm",
            version=vllm_start.VERSION,
            fingerprint=vllm_start.fingerprint(
                model_dir, dtype, f"{distribution} {vllm_start.VERSION}{' compiled' * compiled}{vllm_args.mark(extra)}"
            ),
            vocab_size=self._core.vllm_config.model_config.get_vocab_size(),
            context=context,
            draft_max=draft_max,
            model=model_dir.resolve().name,
            logprobs=True,
            block_size=vllm_start.BLOCK_SIZE if prefix_cache else 0,
            kv_blocks=vllm_kv_events.kv_blocks(self._core) if prefix_cache else 0,
        )
        self._warm()

    def _warm(self) -> None:
        """One round for nobody: what engines and kernels put off until they are used would be the first user's wait."""
        self.submit(VerifyRequest("warm", "warm", [0], []))
        while self.busy:
            self.step()
        self.forget("warm")

    @property
    def kv_tokens(self) -> int:
        """Size of the KV cache, in tokens."""
        return int(self._scheduler.kv_cache_config.num_blocks) * vllm_start.BLOCK_SIZE

    @property
    def busy(self) -> bool:
        """True while some request waits for a step."""
        return bool(self._rounds)

    def submit(self, request: VerifyRequest) -> None:
        """Check everything here: whatever raises inside the engine core kills it for every session."""
        check_request(request, self.info, self._requests)
        round_ = Round.of(request)
        engine_id = self._scheduler.resume(request.prefix, round_) or self._start(request, round_)
        self._rounds[engine_id] = round_
        self._requests[request.request_id] = engine_id

    def _start(self, request: VerifyRequest, round_: Round) -> str:
        """A new engine request, which stays for the session's next round unless another one is there by then."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        engine_id = f"{next(self._count)}"
        engine_request = EngineCoreRequest(
            request_id=engine_id,
            prompt_token_ids=list(request.prefix),
            mm_features=None,
            # Greedy to vLLM, so that it keeps no sampling state of its own; how to draw comes with every step.
            sampling_params=SamplingParams(
                temperature=0.0,
                max_tokens=self.info.context,
                detokenize=False,
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=request.cache_salt or None,
            data_parallel_rank=None,
            resumable=True,
        )
        made, wave = self._core.preprocess_add_request(engine_request)
        made.round = round_  # for the scheduler, which finds it there
        self._core.add_request(made, wave)
        return engine_id

    def step(self) -> list[VerifyEvent]:
        """One engine step. Raises EngineError when the core failed: it is unusable then, start another process."""
        if not self._rounds:
            return []
        try:
            # EngineCore.post_step only carries proposals back to the scheduler, and NullProposer makes none.
            outputs, computed = self._core.step()
        except Exception as error:
            raise EngineError(
                f"vLLM failed in a step ({type(error).__name__}: {error}); restart the engine."
            ) from error
        self._stalled = 0 if computed else self._stalled + 1
        if self._stalled > STALLED_STEPS:  # no silence tells of it: the process steps, and says that it is busy
            raise EngineError(f"vLLM schedules none of its {len(self._rounds)} requests; restart the engine.")
        return [self._event(output) for group in outputs.values() for output in group.outputs]

    def kv_changes(self) -> list[KvChange]:
        """What the prefix cache stored and evicted since the last call."""
        return self._kv_events.take() if self._kv_events else []

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its blocks; what it computed stays in the prefix cache."""
        engine_id = self._requests.pop(request_id, None)
        if engine_id is not None:
            del self._rounds[engine_id]
            self._core.abort_requests([engine_id])

    def forget(self, session: str) -> None:
        """Free what a session holds; one with a round under way gives it up when others need the room."""
        self._scheduler.drop(session)

    def tidy(self) -> None:
        """Let go of sessions that have been idle for RESIDENT_SECONDS."""
        self._scheduler.drop_idle(RESIDENT_SECONDS)

    def reset(self) -> None:
        """Forget every session that waits, and the prefix cache. Raises EngineError while a request runs."""
        self._scheduler.drop_idle(0.0)
        if not self._core.reset_prefix_cache():
            raise EngineError("the prefix cache is in use: reset it when no request is running")

    def close(self) -> None:
        """Release the model and the KV cache."""
        self._rounds.clear()
        self._core.shutdown()

    def _event(self, output: EngineCoreOutput) -> VerifyEvent:
        """A request's share of a step. A finished request is forgotten; its session may be parked."""
        round_ = self._rounds[output.request_id]
        if output.finish_reason is not None:
            del self._rounds[output.request_id], self._requests[round_.request_id]
        return round_.event(list(output.new_token_ids), output.finish_reason is not None)
