"""Every message that crosses the broker, one page.

Edge to worker:  VerifyJob, ScoreJob,             Worker to edge:  Verdict, Scores, Refusal
                 Cancel, Close
Shell to agent:  Prompt, CancelRequest            Agent to shell:  Accepted, Text, Finished, Failed

Rules of the page: models are frozen, fields have bounds, unknown fields are refused, an array fails at its first bad
item (a quarter of a million complaints take seconds to write down). Token ids cross the wire, probabilities never do
(but for the one number per drawn token that a request may ask for, to show it).
Times are relative milliseconds; nobody trusts another's clock. This module knows nothing of Redis or of bytes:
`codec.py` turns a message into msgpack and back, `keys.py` says where it goes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOKEN_ID = 2**31 - 1
MAX_CONTEXT = 1 << 18
MAX_DRAFT = 256
SEED_MAX = 2**64 - 1
MILLIS_MAX = 1e9
SENTENCE_MAX = 500

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID, strict=True)]
Total = Annotated[int, Field(ge=0, le=2**53, strict=True)]  # a sum over a whole generation
Count = Annotated[int, Field(ge=0, le=MAX_CONTEXT, strict=True)]
Serial = Annotated[int, Field(ge=0, le=2**53, strict=True)]
Millis = Annotated[float, Field(ge=0, le=MILLIS_MAX, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TraceParent = Annotated[str, Field(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$")]  # W3C, or ""
Logprob = Annotated[float, Field(le=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[bytes, Field(min_length=16, max_length=16, strict=True)]

Mode = Literal["exact", "gated", "cloud_only", "edge_only"]
OnCloudLoss = Literal["wait", "local"]
Drafting = Literal["auto", "always", "fixed"]
Privacy = Literal["shared", "local_only"]
Origin = Literal["local", "accepted", "corrected", "continued"]
FinishReason = Literal["stop", "length", "cancelled"]


class Message(BaseModel):
    """Base of every message: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64")


class Sampling(Message):
    """The parameters of the coupled draw (`protocol/sampling.py`). T = 0 means argmax; 0 and 1 switch filters off."""

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID, strict=True)] = 0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, le=SEED_MAX, strict=True)] = 0


# --- edge -> worker ------------------------------------------------------------------------------------------


class VerifyJob(Message):
    """Verify `draft` after the first `base` tokens of a session, then decode `continue_tokens` more.

    `ids` are the tokens [offset, base) that the serving worker may not have seen; offset 0 carries everything.
    With `logprobs` the verdict tells how likely the target holds each of its draws. `trace` is the edge's span.
    The reply asserts the target's draws for [base, base + accepted + 1 + continued).
    """

    type: Literal["verify"] = "verify"
    agent: Name
    boot: Name
    session: SessionId
    epoch: Serial
    round: Serial
    base: Annotated[int, Field(ge=1, le=MAX_CONTEXT, strict=True)]
    digest: Digest
    offset: Count
    ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_CONTEXT, fail_fast=True)]
    draft: Annotated[tuple[TokenId, ...], Field(max_length=MAX_DRAFT, fail_fast=True)] = ()
    continue_tokens: Count = 0
    sampling: Sampling = Sampling()
    stop_ids: Annotated[tuple[TokenId, ...], Field(max_length=32, fail_fast=True)] = ()
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000, strict=True)] = 30_000
    logprobs: bool = False
    trace: TraceParent = ""


class ScoreJob(Message):
    """An audit: what would the target have drawn in place of each of `draft`, given all before it? Never applied.

    `draft` are committed tokens; `ids` are the tokens [offset, base) as in a VerifyJob. `round` is unique among all
    jobs of the session.
    """

    type: Literal["score"] = "score"
    agent: Name
    boot: Name
    session: SessionId
    epoch: Serial
    round: Serial
    base: Annotated[int, Field(ge=1, le=MAX_CONTEXT, strict=True)]
    digest: Digest
    offset: Count
    ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_CONTEXT, fail_fast=True)]
    draft: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_DRAFT, fail_fast=True)]
    sampling: Sampling = Sampling()
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000, strict=True)] = 30_000


class Cancel(Message):
    """Stop whatever runs for this session; no reply is owed."""

    type: Literal["cancel"] = "cancel"
    agent: Name
    boot: Name
    session: SessionId


class Close(Message):
    """The session is over; a worker may forget it."""

    type: Literal["close"] = "close"
    agent: Name
    boot: Name
    session: SessionId


# --- worker -> edge ------------------------------------------------------------------------------------------


class Verdict(Message):
    """The target's draws for [base, base + len(draws)); the first `accepted` equal the draft.

    `logprobs`, where asked for, are the target's own of each draw, natural logarithms at temperature 1, unfiltered.
    A continuation answers in chunks: `seq` counts them, each with its own base and digest; `last` ends the job.
    `rows`, `steps` and `engine_ms` are what the engine spent on this message, `cached` the prefix rows it left out;
    `row_ms` is what one more drafted row would have cost it: its price.
    """

    type: Literal["verdict"] = "verdict"
    boot: Name
    session: SessionId
    epoch: Serial
    round: Serial
    seq: Count = 0
    last: bool = True
    base: Annotated[int, Field(ge=1, le=MAX_CONTEXT, strict=True)]
    digest: Digest
    draws: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_CONTEXT, fail_fast=True)]
    accepted: Count = 0
    logprobs: Annotated[tuple[Logprob, ...], Field(max_length=MAX_CONTEXT, fail_fast=True)] = ()
    worker: Name
    credit: Count = 0
    queue_ms: Millis = 0.0
    engine_ms: Millis = 0.0
    rows: Count = 0
    steps: Count = 0
    cached: Count = 0
    row_ms: Millis = 0.0


class Scores(Message):
    """The target's draws for [base, base + len(draws)), each given the audited text before it, not its own draws."""

    type: Literal["scores"] = "scores"
    boot: Name
    session: SessionId
    round: Serial
    base: Annotated[int, Field(ge=1, le=MAX_CONTEXT, strict=True)]
    digest: Digest
    draws: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_DRAFT + 1, fail_fast=True)]
    worker: Name
    credit: Count = 0
    engine_ms: Millis = 0.0
    rows: Count = 0
    steps: Count = 0


RefusalCode = Literal[
    "stale",  # this epoch of the session is already rejected: drop the round
    "need_prefix",  # the worker does not know the session: resend from offset 0
    "expired",  # older than its own deadline when picked up
    "invalid_message",  # not a message of ours
    "bad_request",  # a message of ours that asks for the impossible
    "too_long",  # the context is full
    "overloaded",  # the worker is full or draining: try again
    "engine_failed",  # the engine died or raised: try again
    "dead_letter",  # delivered too often without an answer: given up
    "cancelled",  # ended by cancel
]


class Refusal(Message):
    """A job that got no draws, and why. `session` is empty when the payload could not be read."""

    type: Literal["refusal"] = "refusal"
    boot: Annotated[str, Field(max_length=64)] = ""
    session: Annotated[str, Field(max_length=64)] = ""
    epoch: Serial = 0
    round: Serial = 0
    code: RefusalCode
    sentence: Annotated[str, Field(max_length=SENTENCE_MAX)] = ""
    worker: Name
    credit: Count = 0

    @classmethod
    def of(
        cls, job: VerifyJob | ScoreJob | None, code: RefusalCode, sentence: str, *, worker: str, credit: int
    ) -> Refusal:
        """The refusal of `job` (None: it could not be read, or asks for no draws), its sentence cut to fit."""
        about = {name: getattr(job, name) for name in ("boot", "session", "epoch", "round")} if job else {}
        return cls(code=code, sentence=sentence[:SENTENCE_MAX], worker=worker, credit=credit, **about)


# --- shell -> agent ------------------------------------------------------------------------------------------


class Prompt(Message):
    """A prompt submitted from a shell; any live agent of the tenant may take it."""

    type: Literal["prompt"] = "prompt"
    request: SessionId
    text: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    raw: bool = False
    mode: Mode = "exact"
    max_disagreement: Share | None = None
    on_cloud_loss: OnCloudLoss | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_CONTEXT, strict=True)] = 256
    sampling: Sampling = Sampling()
    draft_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT, strict=True)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000, strict=True)] = 120_000


class CancelRequest(Message):
    """Stop a submitted prompt; sent to the reply stream of the agent that accepted it."""

    type: Literal["cancel_request"] = "cancel_request"
    request: SessionId


# --- agent -> shell ------------------------------------------------------------------------------------------


class Accepted(Message):
    """An agent has taken the prompt."""

    type: Literal["accepted"] = "accepted"
    request: SessionId
    agent: Name
    prompt_tokens: Count
    seed: Annotated[int, Field(ge=0, le=SEED_MAX, strict=True)]


class Text(Message):
    """Committed text from token `start` of the answer on: decoded strings, one per token, with the origin of each.

    A reader skips what it has: another agent that took over a dead one's prompt starts again from token 0.
    """

    type: Literal["text"] = "text"
    request: SessionId
    start: Count = 0
    ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_CONTEXT, fail_fast=True)]
    pieces: Annotated[tuple[Annotated[str, Field(max_length=4096)], ...], Field(max_length=MAX_CONTEXT, fail_fast=True)]
    origins: Annotated[tuple[Origin, ...], Field(max_length=MAX_CONTEXT, fail_fast=True)]


class Summary(Message):
    """What one generation cost; every count is of tokens unless its name says otherwise.

    `ceded` tokens were continued by the cloud because drafting measured slower than that.
    """

    tokens: Total = 0
    prompt_tokens: Total = 0
    local: Total = 0
    accepted: Total = 0
    corrected: Total = 0
    continued: Total = 0
    drafted: Total = 0
    unverified: Total = 0  # committed by the gate
    never_sent: Total = 0  # local, and behind everything a job carried
    audited: Total = 0  # of the unverified, those the target scored afterwards
    audit_disagreed: Total = 0
    rounds: Total = 0
    cloud_rows: Total = 0
    cloud_steps: Total = 0
    resends: Total = 0
    ceded: Total = 0
    degraded: bool = False
    seed: Annotated[int, Field(ge=0, le=SEED_MAX, strict=True)] = 0
    first_token_ms: Millis = 0.0
    total_ms: Millis = 0.0
    cloud_ms: Millis = 0.0
    draft_ms: Millis = 0.0


class Finished(Message):
    """The generation ended by itself or was cancelled."""

    type: Literal["finished"] = "finished"
    request: SessionId
    reason: FinishReason
    summary: Summary


class Failed(Message):
    """The generation could not go on; `code` is that of the error tree."""

    type: Literal["failed"] = "failed"
    request: SessionId
    code: Annotated[str, Field(max_length=64)]
    sentence: Annotated[str, Field(max_length=2000)]


ToWorker = VerifyJob | ScoreJob | Cancel | Close
ToEdge = Verdict | Scores | Refusal | CancelRequest
ToAgent = Prompt
ToShell = Accepted | Text | Finished | Failed
