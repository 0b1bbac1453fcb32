"""How a call is told to OpenAI's clients: as one JSON object or as a stream of chunks, for chats and for completions.

A stream: for each choice a chunk with the role, chunks of text, a chunk with the finish reason; then, if asked for, one
with usage and no choices. Knows calls and answer models; nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

from pilotfish.edge_agent.http.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    Delta,
    Finish,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    Usage,
    usage,
)
from pilotfish.edge_agent.http.calls import Call
from pilotfish.edge_agent.http.writer import Token, Written


class Chat:
    """POST /v1/chat/completions."""

    prefix = "chatcmpl-"

    def __init__(self, call: Call) -> None:
        self.call = call

    def whole(self, parts: list[Written], used: Usage) -> ChatCompletion:
        """The complete answer."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=part.text),
                logprobs=self._logprobs(part.tokens),
                finish_reason=_finish(self.call, index),
                pilotfish=self.call.told(index),
            )
            for index, part in enumerate(parts)
        ]
        return ChatCompletion(**_about(self), choices=choices, usage=used)

    def opening(self, index: int) -> ChatChunk:
        """The chunk with the role."""
        return self._chunk(ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")))

    def text(self, index: int, new: Written) -> ChatChunk:
        """New text of a choice."""
        delta = Delta(content=new.text)
        return self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=self._logprobs(new.tokens)))

    def closing(self, index: int) -> ChatChunk:
        """The chunk with the finish reason, and who wrote the choice."""
        told, why = self.call.told(index), _finish(self.call, index)
        return self._chunk(ChatChunkChoice(index=index, delta=Delta(), finish_reason=why, pilotfish=told))

    def used(self, used: Usage) -> ChatChunk:
        """The last chunk, without choices."""
        return ChatChunk(**_about(self), choices=[], usage=used)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(**_about(self), choices=[choice])

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self.call.body.wants_logprobs:
            return None
        spoken = self.call.spoken(tokens)
        return ChatLogprobs(content=[TokenLogprob(token=t.text, logprob=t.logprob, bytes=list(t.raw)) for t in spoken])


class Text:
    """POST /v1/completions."""

    prefix = "cmpl-"

    def __init__(self, call: Call) -> None:
        self.call = call
        self._offsets: dict[int, int] = {}

    def whole(self, parts: list[Written], used: Usage) -> Completion:
        """The complete answer."""
        choices = [
            TextChoice(
                index=index,
                text=part.text,
                logprobs=self._logprobs(index, part.tokens),
                finish_reason=_finish(self.call, index),
                pilotfish=self.call.told(index),
            )
            for index, part in enumerate(parts)
        ]
        return Completion(**_about(self), choices=choices, usage=used)

    def opening(self, index: int) -> None:
        """There is no role to tell."""

    def text(self, index: int, new: Written) -> Completion:
        """New text of a choice."""
        return self._chunk(TextChoice(index=index, text=new.text, logprobs=self._logprobs(index, new.tokens)))

    def closing(self, index: int) -> Completion:
        """The chunk with the finish reason, and who wrote the choice."""
        told, why = self.call.told(index), _finish(self.call, index)
        return self._chunk(TextChoice(index=index, text="", finish_reason=why, pilotfish=told))

    def used(self, used: Usage) -> Completion:
        """The last chunk, without choices."""
        return Completion(**_about(self), choices=[], usage=used)

    def _chunk(self, choice: TextChoice) -> Completion:
        return Completion(**_about(self), choices=[choice])

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> TextLogprobs | None:
        if not self.call.body.wants_logprobs:
            return None
        spoken = self.call.spoken(tokens)
        offsets = [self._offset(index, token) for token in spoken]
        return TextLogprobs(
            tokens=[t.text for t in spoken], token_logprobs=[t.logprob for t in spoken], text_offset=offsets
        )

    def _offset(self, index: int, token: Token) -> int:
        at = self._offsets.get(index, 0)
        self._offsets[index] = at + len(token.text)
        return at


Wording = Chat | Text


async def as_json(wording: Wording) -> bytes:
    """A call's one JSON object."""
    call = wording.call
    try:
        await call.open()
        parts = await call.whole()
        return wording.whole(parts, _usage(call)).model_dump_json().encode()
    finally:
        await call.close()


async def as_chunks(wording: Wording) -> AsyncGenerator[bytes, None]:
    """A call's chunks, each a JSON object. `usage` is null in all but the last, where it was asked for at all."""
    call = wording.call
    hidden = None if call.body.tells_usage else {"usage"}
    opened = set[int]()
    try:
        await call.open()
        async with aclosing(call.events()) as events:
            async for index, new, over in events:
                for chunk in _chunks(wording, index, new, over, opened):
                    yield _dump(chunk, hidden)
        if call.body.tells_usage:
            yield _dump(wording.used(_usage(call)), None)
    finally:
        await call.close()


def _chunks(wording: Wording, index: int, new: Written, over: bool, opened: set[int]) -> list[Any]:
    chunks: list[Any] = []
    if index not in opened:
        opened.add(index)
        chunks.append(wording.opening(index))
    if new.text or (new.tokens and wording.call.body.wants_logprobs):
        chunks.append(wording.text(index, new))
    if over:
        chunks.append(wording.closing(index))
    return [chunk for chunk in chunks if chunk is not None]


def _dump(chunk: ChatChunk | Completion, hidden: set[str] | None) -> bytes:
    body = chunk.model_dump(exclude=hidden)
    for choice in body["choices"]:
        if choice["pilotfish"] is None:
            del choice["pilotfish"]
        if "delta" in choice:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _usage(call: Call) -> Usage:
    return usage(call.prompt_tokens, [writer.summary for writer in call.writers])


def _finish(call: Call, index: int) -> Finish:
    return cast(Finish, call.writers[index].finish)


def _about(wording: Wording) -> dict[str, Any]:
    call = wording.call
    return {
        "id": wording.prefix + call.id,
        "created": call.created,
        "model": call.model,
        "system_fingerprint": call.service.fingerprint,
    }
