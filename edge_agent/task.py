"""What one generation is asked for: the prompt as token ids, and the bounds it keeps to."""

from __future__ import annotations

from dataclasses import dataclass, field

from pilotfish.protocol.messages import Drafting, Mode, OnCloudLoss, Privacy, Sampling

WINDOW = 8  # rounds under way at most


@dataclass(frozen=True, slots=True)
class Task:
    """What one generation is asked for; the prompt is token ids already.

    `draft_tokens` and `window` are upper bounds: of one round, and of the rounds under way (1: no drafting while a
    verdict is away). With `drafting` "auto" the policy decides below them, and leaves the text to the cloud while that
    measures faster; "always" never does; "fixed" drafts exactly `draft_tokens` each round.
    """

    prompt: tuple[int, ...]
    mode: Mode = "exact"
    on_cloud_loss: OnCloudLoss = "wait"
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    drafting: Drafting = "auto"
    draft_tokens: int | None = None
    window: int = WINDOW
    resends: int = 2
    round_timeout_ms: int = 5_000
    deadline_ms: int = 120_000
    max_disagreement: float = 0.02
    privacy: Privacy = "shared"
    logprobs: bool = False  # have the target's log-probability of each token come with it
