"""vLLM as a verifier: token ids in, the target's own draws out, one forward pass per round.

A round is one new engine request; the prefix cache makes its prefix cheap. The engine core is driven directly in this
process (`vllm_start.py`): no tokenizer, no detokenizer, no request front end. `VerifyScheduler` attaches the drafts to
the step that ends the prefix, `CoupledWorker` draws. Nothing here imports vLLM before a `VllmVerifier` is made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pilotfish.cloud_worker.engines import vllm_start
from pilotfish.cloud_worker.engines.base import EngineInfo, Verifier, VerifyEvent, VerifyRequest, check_request
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Sampling

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

ROUND: Final = "pilotfish_round"  # key in SamplingParams.extra_args
STEP_TOKENS: Final = 2048  # most prefix rows of one step; a longer prefix comes in chunks
CHUNK_TOKENS: Final = 256  # most rows of one prefix in a step that other requests wait for

_UNDRAWABLE: Final = "The target's logits were not finite, so nothing can be drawn; check its weights and dtype."


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
        distribution = vllm_start.installed()
        vllm_start.check_model(model_dir, context)
        max_model_len = vllm_start.whole_blocks(context + draft_max + 1)
        self._core = vllm_start.start_core(
            threads,
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
        )
        self._rounds: dict[str, Round] = {}
        self.info = EngineInfo(
            engine="vllm",
            version=vllm_start.VERSION,
            fingerprint=vllm_start.fingerprint(model_dir, dtype, f"{distribution} {vllm_start.VERSION}"),
            vocab_size=self._core.vllm_config.model_config.get_vocab_size(),
            context=context,
            draft_max=draft_max,
            model=model_dir.resolve().name,
        )

    @property
    def busy(self) -> bool:
        """True while some request waits for a step."""
        return bool(self._rounds)

    def submit(self, request: VerifyRequest) -> None:
        """Check everything here: whatever raises inside the engine core kills it for every session."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        check_request(request, self.info, self._rounds)
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
