"""The coupled draw inside vLLM's model runner, and a proposer that proposes nothing. Pinned to vLLM 0.32.0.

vLLM loads both classes by name (`worker_cls`, `speculative_config.model`). `CoupledWorker` replaces one method of its
own runner object: `_sample`, logits in, sampled ids out. Everything after it (which rows are discarded, what is
appended) stays upstream's. With tensor parallelism every rank is a process with a worker of its own, which has the
same logits and draws the same. This module knows nothing of requests beyond what each step asks of them.
"""

from __future__ import annotations

import ctypes
import inspect
import multiprocessing
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput

from pilotfish.cloud_worker.engines.torch_sampling import UNDRAWABLE, draw_rows
from pilotfish.cloud_worker.engines.vllm_round import Asked, Drawn
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Sampling

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SAMPLE_PARAMETERS = ["self", "logits", "spec_decode_metadata"]


class NullProposer:
    """`method="custom_class"`: vLLM reserves room for drafts and verifies them, but none come from here."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Called by the runner after its own model."""

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """No drafts for any request."""
        return [[] for _ in sampled_token_ids]


class CoupledWorker(_Worker):  # type: ignore[misc]  # vllm is untyped where it is not installed
    """The platform's own worker; its model runner draws by the coupled rule."""

    def init_device(self) -> None:
        """Make the runner as upstream does, then change how it samples."""
        super().init_device()
        install(self.model_runner)
        if multiprocessing.parent_process():
            _tie_to_engine()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As upstream; the runner knows what this step asks."""
        self.model_runner.asked = scheduler_output.asked
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """As upstream; the output says besides what was drawn."""
        output = super().sample_tokens(grammar_output)
        output.drawn = self.model_runner.drawn
        return output


def _tie_to_engine() -> None:
    """A rank ends with its engine, at once, or its memory is missing when the next one starts; and not before, though
    Ctrl-C and a service manager's SIGTERM reach everyone.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def install(runner: Any) -> None:
    """Put the coupled draw in place of `runner._sample` (vllm/v1/worker/gpu_model_runner.py). Idempotent."""
    parameters = list(inspect.signature(type(runner)._sample).parameters)
    if parameters != _SAMPLE_PARAMETERS:
        raise EngineError(f"the runner's _sample takes {parameters}, not {_SAMPLE_PARAMETERS}: install vllm 0.32.0")
    runner._sample = partial(sample, runner)


def sample(runner: Any, logits: torch.Tensor, spec_decode_metadata: SpecDecodeMetadata) -> SamplerOutput:
    """logits [rows, vocab] of every scheduled request's last 1 + K rows -> ids [requests, 1 + max K], -1 past the end.

    A request's ids are its accepted drafts and one more draw; a scored one has all its drafts accepted. What else there
    is to say of each is left in `runner.drawn`, by id. Rows of unfinished prefills are drawn as well;
    `_bookkeeping_sync` discards them, as it does upstream.
    """
    asked: list[Asked] = [runner.asked[i] for i in runner.input_batch.req_ids]
    told = [Drawn() for _ in asked]
    runner.drawn = dict(zip(runner.input_batch.req_ids, told, strict=True))
    counts = torch.tensor(spec_decode_metadata.num_draft_tokens) + 1
    owner = torch.repeat_interleave(counts)
    # runner.positions holds the position each row was fed at; its logits predict the token at the next one.
    positions = runner.positions[spec_decode_metadata.logits_indices] + 1
    draws = draw_rows(logits.float(), *_parameters([one.sampling for one in asked], owner, positions))
    drafted_rows = spec_decode_metadata.target_logits_indices
    accepted = torch.zeros_like(draws, dtype=torch.bool)
    accepted[drafted_rows] = draws[drafted_rows] == spec_decode_metadata.draft_token_ids
    for row in (draws == UNDRAWABLE).nonzero().flatten().tolist():
        told[owner[row]].undrawable = True
    if any(one.logprobs for one in asked):
        likely = logits.float().log_softmax(-1).gather(1, draws.clamp(min=0)[:, None])[:, 0]
        for one, drawn, own_likely in zip(asked, told, torch.split(likely, counts.tolist()), strict=True):
            drawn.likely = own_likely.tolist() if one.logprobs else []
    if any(one.score for one in asked):
        scored = torch.tensor([one.score for one in asked])[owner].to(draws.device)
        for one, drawn, own in zip(asked, told, torch.split(draws, counts.tolist()), strict=True):
            drawn.scores = own.tolist() if one.score else []
        forced = drafted_rows[scored[drafted_rows]]
        draws[forced] = spec_decode_metadata.draft_token_ids[scored[drafted_rows]].to(draws.dtype)
        accepted[forced] = True
    return SamplerOutput(_until_rejected(draws.clamp_(min=0), accepted, owner, counts), logprobs_tensors=None)


def _parameters(chosen: list[Sampling], owner: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """seeds, positions, temperature, top_k, top_p, min_p: one entry per row, the last four on the CPU."""
    seeds = torch.tensor([s.seed - (s.seed >> 63 << 64) for s in chosen], dtype=torch.int64)
    top_k = torch.tensor([s.top_k for s in chosen], dtype=torch.int64)
    reals = torch.tensor([(s.temperature, s.top_p, s.min_p) for s in chosen], dtype=torch.float32)
    temperature, top_p, min_p = reals[owner].unbind(1)
    return seeds[owner].to(positions.device), positions, temperature, top_k[owner], top_p, min_p


def _until_rejected(
    draws: torch.Tensor, accepted: torch.Tensor, owner: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """draws [rows] -> int32 [requests, max rows of one]: each request's row, -1 after its first draw that is no draft.

    `owner` [rows] is the request of each row and `counts` [requests] the rows of each, both on the CPU.
    """
    column = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    where = owner.to(draws.device), column.to(draws.device)
    table = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int32, device=draws.device)
    agrees = torch.zeros_like(table)
    table[where] = draws.to(torch.int32)
    agrees[where] = accepted.to(torch.int32)
    rejected_before = agrees.cumprod(1)[:, :-1] == 0
    table[:, 1:].masked_fill_(rejected_before, -1)
    return table
