"""vLLM's scheduler, taught to verify and to keep sessions. Loaded by name into the engine core; pinned to vLLM 0.32.0.

No API of vLLM takes drafts from outside. `VerifyScheduler` adds a request's own drafts to the very step that computes
the end of its prefix, so that a round is one forward pass, and ends or continues the request by our rules, not by
`check_stop`. A session's request that ended a round is *parked*: out of every queue, with its blocks, until its next
round resumes it, its age or the bound drops it, or others need the blocks. It knows nothing of sampling
(`vllm_runner.py`) or of events (`vllm_engine.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from pilotfish.cache.prefix_map import common_prefix
from pilotfish.cloud_worker.engines.vllm_round import Drawn, Round
from pilotfish.protocol.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


def round_of(request: Request) -> Round:
    """The round that came with the request, the same object the engine holds."""
    round_: Round = request.round
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
        self.parked: dict[str, Request] = {}  # by session, the oldest first
        self.parked_tokens = 0  # KV slots they hold
        self.parked_max = 0  # most of them; 0 keeps no session
        self.kv_cache_manager.allocate_slots = self._making_room(self.kv_cache_manager.allocate_slots)

    # --- rounds ----------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: as upstream, plus the drafts of each request whose prefix ends in it.

        Its rows are given out in the order of `running`: rounds first, or a long prefill would take all of them.
        """
        self.running.sort(key=lambda request: request.num_tokens - request.num_computed_tokens)
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
        output.asked = {i: round_of(self.requests[i]).asked for i in output.num_scheduled_tokens}
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """As upstream, after the rounds have heard what the runner said of them."""
        told: dict[str, Drawn] = getattr(model_runner_output, "drawn", {})  # a step without rows says nothing
        for request_id, drawn in told.items():
            if request := self.requests.get(request_id):
                round_of(request).hear(drawn)
        return super().update_from_output(scheduler_output, model_runner_output)

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
            request.resumable = False
            self.kv_cache_manager.evict_blocks(
                {i for group in self.kv_cache_manager.get_block_ids(request.request_id) for i in group}
            )
        else:
            self.kv_cache_manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
        over = round_.is_over(new_token_ids)
        if over:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return new_token_ids, over

    # --- resident sessions -----------------------------------------------------------------------------------

    def _handle_stopped_request(self, request: Request) -> bool:
        """Park a session's request instead of ending it. True if it is over."""
        session, tokens = round_of(request).session, self._held(request)
        if not request.resumable or tokens > self.parked_max:
            return True
        self.drop(session)
        request.status = RequestStatus.WAITING  # of no queue: parking costs the others nothing
        self.parked[session] = request
        self.parked_tokens += tokens
        round_of(request).parked_at = time.monotonic()
        while self.parked_tokens > self.parked_max:
            self.drop(next(iter(self.parked)))
        return False

    def _held(self, request: Request) -> int:
        """KV slots a request holds, in tokens."""
        return sum(map(len, self.kv_cache_manager.get_block_ids(request.request_id))) * int(self.block_size)

    def drop(self, session: str) -> None:
        """End a parked session; its full blocks stay in the prefix cache until they are needed. Unknown: nothing."""
        if request := self.parked.get(session):
            self._unpark(session)
            self.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def drop_idle(self, seconds: float) -> None:
        """End the sessions parked for longer."""
        since = time.monotonic() - seconds
        while self.parked and round_of(next(iter(self.parked.values()))).parked_at < since:
            self.drop(next(iter(self.parked)))

    def _unpark(self, session: str) -> Request:
        request = self.parked.pop(session)
        self.parked_tokens -= self._held(request)
        return request

    def _making_room(self, allocate: Callable[..., KVCacheBlocks | None]) -> Callable[..., KVCacheBlocks | None]:
        """`allocate_slots` that lets parked sessions go, oldest first, before it says that there is no room."""

        def allocate_slots(*args: Any, **kwargs: Any) -> KVCacheBlocks | None:
            while (blocks := allocate(*args, **kwargs)) is None and self.parked:
                self.drop(next(iter(self.parked)))
            return blocks

        return allocate_slots

    def resume(self, prefix: list[int], round_: Round) -> str | None:
        """Let a parked session go on with a round after `prefix`: the id of its request, None if it starts anew.

        It must not write into blocks that are in the prefix cache, so a prefix that parts from the parked ids inside
        one of those ends the session.
        """
        if round_.session not in self.parked:
            return None
        kept = self._kept(self.parked[round_.session], prefix)
        if kept is None:
            self.drop(round_.session)
            return None
        request = self._unpark(round_.session)
        request.round = round_
        round_.cached = kept
        if len(prefix) == request.num_tokens == kept + 1 and len(self.running) < self.max_num_running_reqs:
            request.status = RequestStatus.RUNNING  # as if it had never stopped: the runner's state is still right
            self.running.append(request)
        else:
            self._rewrite(request, prefix, kept)
            self._enqueue_waiting_request(request)
        return str(request.request_id)

    def _kept(self, request: Request, prefix: list[int]) -> int | None:
        """Computed rows that `prefix` confirms, its last one excepted: that is computed for its logits."""
        shared = common_prefix(request._all_token_ids, prefix)
        kept = min(shared, len(prefix) - 1, request.num_computed_tokens)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        final = max(m.num_cached_block.get(request.request_id, 0) * m.block_size for m in managers)
        return kept if kept >= final else None

    def _rewrite(self, request: Request, prefix: list[int], kept: int) -> None:
        """Make `prefix` the request's prompt, `kept` rows of it computed. As upstream's `_update_request_as_session`,
        which only ever appends.
        """
        request.prompt_token_ids = list(prefix)
        request._all_token_ids[:] = prefix
        request._output_token_ids.clear()
        request.num_prompt_tokens = len(prefix)
        request.num_computed_tokens = kept
        del request.block_hashes[kept // self.hash_block_size :]
        request.update_block_hashes()
