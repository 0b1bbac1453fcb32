"""vLLM's scheduler, taught to verify. Loaded by name into the engine core; pinned to vLLM 0.32.0.

No API of vLLM takes drafts from outside. `VerifyScheduler` adds a request's own drafts to the very step that computes
the end of its prefix, so that a round is one forward pass, and ends or continues the request by our rules, not by
`check_stop`. It knows nothing of sampling (`vllm_runner.py`) or of events (`vllm_engine.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from pilotfish.cloud_worker.engines.vllm_engine import ROUND, Round
from pilotfish.protocol.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


def round_of(request: Request) -> Round:
    """The round that came with the request, the same object the engine holds."""
    round_: Round = request.sampling_params.extra_args[ROUND]
    return round_


class VerifyScheduler(Scheduler):  # type: ignore[misc]  # vllm is untyped where it is not installed
    """Follows vllm/v1/core/sched/scheduler.py of 0.32.0; synchronous scheduling and model runner V1 only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling or self.use_v2_model_runner or self.use_pp or self.has_mamba_layers:
            raise EngineError(
                "the vLLM verifier needs synchronous scheduling, model runner V1, one pipeline stage and an "
                "attention-only model: choose another model, or the llama.cpp engine"
            )
        # schedule() hands this to allocate_slots(): every scheduled request then owns KV slots for its drafts.
        self.num_lookahead_tokens = self.num_spec_tokens
        # With a lookup table schedule() does not pad a one-token prompt end with -1 drafts (`pad_spec_decode`),
        # which waste rows everywhere and are unsafe on CPU. The table itself says the same length for every batch.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: as upstream, plus the drafts of each request whose prefix ends in it."""
        output = super().schedule(throttle_prefills)
        for new in output.scheduled_new_reqs:
            round_of(self.requests[new.req_id]).cached = new.num_computed_tokens
        for request_id in output.num_scheduled_tokens:
            request = self.requests[request_id]
            round_ = round_of(request)
            # A preempted request starts over with num_computed_tokens = 0: its drafts wait until the prefix ends again.
            if round_.draft and request.num_computed_tokens >= request.num_tokens:
                self._attach(output, request, round_)
            round_.rows += output.num_scheduled_tokens[request_id]
            round_.steps += 1
        return output

    def _attach(self, output: SchedulerOutput, request: Request, round_: Round) -> None:
        """Add as many of the drafts as the runner's buffers hold to a step that is already scheduled."""
        room = self.scheduler_config.max_num_batched_tokens - output.total_num_scheduled_tokens
        draft, round_.draft = round_.draft[: max(0, room)], []
        if not draft:
            return
        output.scheduled_spec_decode_tokens[request.request_id] = draft
        output.num_scheduled_tokens[request.request_id] += len(draft)
        output.total_num_scheduled_tokens += len(draft)
        # _update_after_schedule() has already run: the same two counters, for the rows added here.
        request.num_computed_tokens += len(draft)
        request.num_in_flight_tokens += len(draft)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Append the draws, cache what they made final, and say whether the request is over.

        update_from_output() has taken rejected rows off num_computed_tokens by now. Upstream caches blocks when it
        allocates the next step, which a round does not have: without this, accepted tokens would never be cached.
        """
        round_ = round_of(request)
        request.append_output_token_ids(new_token_ids)
        if round_.undrawable:  # whatever it computed is not to be trusted, nor to fail the same job again
            self.kv_cache_manager.evict_blocks(
                {i for group in self.kv_cache_manager.get_block_ids(request.request_id) for i in group}
            )
        else:
            self.kv_cache_manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
        over = round_.is_over(new_token_ids)
        if over:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return new_token_ids, over
