"""What a worker wants from an inference engine: prefix, draft and parameters in, the target's draws out.

An engine is stepped, not called: `submit` queues a request, every `step` advances all of them by one forward
pass at most, and returns what became known. So concurrent jobs share steps. An engine is synchronous, owned by one
thread of one process (`engine_child.py`), and knows nothing of Redis, sessions' epochs or replies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import ValidationError

from pilotfish.protocol.errors import RequestRefused
from pilotfish.protocol.messages import Sampling


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a worker publishes about its engine; `fingerprint` covers weights, dtype, engine and version (hex).

    An engine with a prefix cache says the tokens of a block and how many blocks it holds; one without says 0.
    """

    engine: str
    version: str
    fingerprint: str
    vocab_size: int
    context: int  # tokens, prompt and answer together
    draft_max: int  # K_max: longest draft of one round
    model: str  # a name for people
    block_size: int = 0
    kv_blocks: int = 0
    logprobs: bool = False  # whether requests may ask for log-probabilities


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """One round: `prefix` are all ids before base (at least one), `draft` the 0..K_max ids to check.

    After the round the engine decodes on for `continue_tokens` tokens, or until it draws one of `stop_ids`
    (which is emitted). A stop id inside the round itself cuts nothing (the edge does), but no continuation follows it.
    Prefix caches are shared only among requests of one `cache_salt`.
    With `score` all len(draft) + 1 draws are wanted, each as if the draft before it had been accepted.
    """

    request_id: str
    session: str
    prefix: list[int]
    draft: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    continue_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    score: bool = False
    logprobs: bool = False  # events tell the log-probability of each draw


@dataclass(frozen=True, slots=True)
class VerifyEvent:
    """Draws that became known for a request, in order. The first event of a round holds accepted + 1 draws.

    A scored request has one event, with len(draft) + 1 draws; `accepted` still counts those before the first that
    differs from the draft.

    `rows` are the positions computed for it since its last event (prefix tail and padding included), `steps` the
    forward passes it took part in, `cached` the prefix rows that were not computed again. `done` ends the request;
    `error` (a sentence) ends it without draws. `logprobs`, if asked for, has one entry per draw: log softmax of the
    target's raw logits (temperature 1, no filters), which is what vLLM calls raw_logprobs.
    """

    request_id: str
    draws: list[int]
    accepted: int = 0
    rows: int = 0
    steps: int = 0
    cached: int = 0
    done: bool = True
    error: str = ""
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KvChange:
    """Blocks, by their short names (`cache/block_hash.py`), that an engine stored or evicted; or it lost all it had."""

    kind: Literal["stored", "removed", "cleared"]
    blocks: tuple[bytes, ...] = ()


def check_request(request: VerifyRequest, info: EngineInfo, running: Container[str]) -> None:
    """Raise RequestRefused, with the sentence, unless an engine described by `info` can serve the request."""
    drafted = len(request.draft)
    total = len(request.prefix) + drafted + 1 + request.continue_tokens
    if request.request_id in running:
        raise RequestRefused(f"Request {request.request_id} is already running; give each round its own id.")
    if request.logprobs and not info.logprobs:
        raise RequestRefused(f"The {info.engine} engine tells no log-probabilities; leave `logprobs` out.")
    if not request.prefix:
        raise RequestRefused("The prefix is empty; send at least one token.")
    if drafted > info.draft_max:
        raise RequestRefused(f"A draft of {drafted} exceeds this worker's {info.draft_max}; send a shorter one.")
    if request.score and request.continue_tokens:
        raise RequestRefused("A request that is scored cannot be continued; ask for one of the two.")
    if request.continue_tokens < 0 or total > info.context:
        raise RequestRefused(
            f"{len(request.prefix)} + {drafted} + 1 + {request.continue_tokens} tokens (prefix, draft, draw, "
            f"continuation) do not fit the target's context of {info.context}; shorten the prompt or the answer."
        )
    _check_ids([*request.prefix, *request.draft], info.vocab_size)
    try:
        Sampling.model_validate(request.sampling.model_dump())
    except ValidationError as error:
        field_name = error.errors()[0]["loc"][0]
        raise RequestRefused(f"The sampling parameters are impossible: {field_name} is out of range.") from error


def _check_ids(ids: list[int], vocab_size: int) -> None:
    """Refuse what is no token id. An id outside the vocabulary would index past the embedding table."""
    array = np.asarray(ids)
    if array.dtype.kind != "i" or array.ndim != 1:
        raise RequestRefused("The token ids are not a list of integers; send ids of the target's vocabulary.")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise RequestRefused(f"Token id {outside[0]} is not in the target's vocabulary of {vocab_size}.")


class Verifier(ABC):
    """A target model that says what it itself would have drawn."""

    info: EngineInfo

    @abstractmethod
    def submit(self, request: VerifyRequest) -> None:
        """Queue one request. Raises RequestRefused (with the sentence) if it can never be served."""

    @abstractmethod
    def step(self) -> list[VerifyEvent]:
        """Advance every queued request by at most one forward pass; [] when nothing became known."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored. No event follows."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """True while some request waits for a step."""

    def kv_changes(self) -> list[KvChange]:
        """What its prefix cache stored and evicted since the last call, in order; an engine without one says []."""
        return []

    def forget(self, session: str) -> None:  # noqa: B027  an engine without per-session state has nothing to do
        """Drop whatever is kept for a session."""

    def tidy(self) -> None:  # noqa: B027
        """Let go of what has not been used for long; called now and then, busy or not."""

    def reset(self) -> None:  # noqa: B027
        """Forget every session and whatever else would make a request cheaper."""

    def close(self) -> None:  # noqa: B027
        """Release the model."""
