"""What a client is told, one page: OpenAI's answer objects, with who wrote what beside each choice.

Only what is in these models is ever sent; the OpenAPI document is made of them. Knows no agent and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pilotfish.protocol.messages import Mode, Summary

Finish = Literal["stop", "length"]


class Answer(BaseModel):
    """Base of everything a client is told."""

    model_config = ConfigDict(frozen=True)


class Written(Summary):
    """Who wrote a choice and what that cost: a summary, and the mode it was written in."""

    mode: Mode
    acceptance: float | None = Field(
        None, description="accepted / (accepted + corrected); null when nothing was judged"
    )


# --- usage ---------------------------------------------------------------------------------------------------


class CompletionDetails(Answer):
    """Drafts are predictions, in OpenAI's words."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    audio_tokens: int = 0
    reasoning_tokens: int = 0


class Usage(Answer):
    """Tokens of a request: its prompts once, all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails = CompletionDetails()


def usage(prompt_tokens: int, written: Iterable[Summary]) -> Usage:
    """The sum over all choices."""
    choices = list(written)
    completion, accepted = sum(w.tokens for w in choices), sum(w.accepted for w in choices)
    details = CompletionDetails(
        accepted_prediction_tokens=accepted,
        rejected_prediction_tokens=sum(max(0, w.drafted - w.accepted) for w in choices),
    )
    return Usage(
        prompt_tokens=prompt_tokens, completion_tokens=completion, total_tokens=prompt_tokens + completion,
        completion_tokens_details=details,
    )  # fmt: skip


# --- log-probabilities ---------------------------------------------------------------------------------------


class TokenLogprob(Answer):
    """The target's log-probability of a token at temperature 1; null for one written without it."""

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[None] = []


class ChatLogprobs(Answer):
    """Of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Answer):
    """Of a completion choice: four lists in step."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: None = None
    text_offset: list[int]


# --- chat ----------------------------------------------------------------------------------------------------


class ChatMessage(Answer):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    pilotfish: Written


class ChatCompletion(Answer):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """What is new of one choice; its last one says why it ended and who wrote it."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    pilotfish: Written | None = None


class ChatChunk(Answer):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


# --- completions ---------------------------------------------------------------------------------------------


class TextChoice(Answer):
    """One answer to a prompt, whole or, in a stream, what is new of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None
    pilotfish: Written | None = None


class Completion(Answer):
    """POST /v1/completions; the events of its stream have the same shape and the same type."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None


# --- the rest ------------------------------------------------------------------------------------------------


class Model(Answer):
    """One model that may be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pilotfish"


class Models(Answer):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(Answer):
    """The inside of the error envelope."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(Answer):
    """Every answer that is no success."""

    error: Problem
