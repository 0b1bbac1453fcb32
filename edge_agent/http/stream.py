"""GET /v1/stream, a WebSocket for those who want to see how an answer comes about: origins, drafts, corrections.

The client sends a chat body, or a completion body (it has `prompt`), and may send {"type": "cancel"} while it is
answered; then the next body. What it is sent, in order, each a JSON object:

    started     id, model, mode, prompt_tokens, seed
    draft       provisional tokens from `start` of the answer on: [{text, confidence}]
    correction  at `at` the target drew `now` where the draft had `was`; `withdrawn` provisional tokens behind it fall
    tokens      final ones from `start` on: [{id, text, origin, confidence, logprob}], and `text`, what they add
    finished    reason, usage, and under `pilotfish` who wrote what
    error       the same object as over HTTP; the connection stays open

Drafts and corrections are dropped, oldest first, for a client that reads slower than they come; final tokens never are.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from pilotfish.edge_agent.http import bodies, events
from pilotfish.edge_agent.http.answers import usage
from pilotfish.edge_agent.http.calls import Call
from pilotfish.edge_agent.http.faults import fault
from pilotfish.edge_agent.http.routes import bearer_of, client_of
from pilotfish.edge_agent.http.service import Service
from pilotfish.edge_agent.http.writer import Correction, Drafted, Written
from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.tasks import end_tasks

log = logging.getLogger("pilotfish.http")

PROTOCOL = "pilotfish.v1"
SIGHTS = ("draft", "correction")
MAX_SIGHTS = 256  # drafts and corrections that wait for a slow reader

Said = dict[str, Any]


async def stream(socket: WebSocket) -> None:
    """Serve one connection until the client leaves."""
    offered = socket.scope.get("subprotocols", [])
    await socket.accept(PROTOCOL if PROTOCOL in offered else None)
    talk = Talk(socket, socket.app.state.service)
    with suppress(WebSocketDisconnect):
        await talk.run()


class Talk:
    """One connection: a request at a time."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.socket, self.service = socket, service

    async def run(self) -> None:
        """Request after request. Raises WebSocketDisconnect when the client leaves."""
        while True:
            text = await self.socket.receive_text()
            try:
                call = self._call(text)
            except Exception as error:
                await self._say(_error(error))
                continue
            if call is not None:
                await self._answer(call)

    def _call(self, text: str) -> Call | None:
        """The request a message asks for; None for a cancel that comes too late."""
        body = _object(text)
        if body.get("type") == "cancel":
            return None
        kind: type[bodies.Asked] = bodies.CompletionBody if "prompt" in body else bodies.ChatBody
        asked = bodies.read(kind, text.encode())
        if asked.choices * len(asked.prompts) != 1:
            raise UsageError("a stream has one answer: leave n out, and send one prompt", param="n")
        trace, bearer = self.socket.headers.get("traceparent", ""), bearer_of(self.socket)
        return Call(self.service, asked, client_of(self.socket, asked), trace=trace, bearer=bearer)

    async def _answer(self, call: Call) -> None:
        """Speak, while listening for a cancel; whoever ends first ends the other."""
        listening = asyncio.create_task(self._until_cancelled())
        speaking = asyncio.create_task(self._speak(call))
        try:
            await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
            if not speaking.done() and not listening.exception():
                await self._say({"type": "finished", "reason": "cancelled"})
        finally:
            for task in (listening, speaking):
                task.cancel()
            heard, spoken = await asyncio.gather(listening, speaking, return_exceptions=True)
            await call.close()
        for end in (spoken, heard):
            if isinstance(end, Exception):
                raise end

    async def _until_cancelled(self) -> None:
        while _object(await self.socket.receive_text()).get("type") != "cancel":
            await self._say(_error(UsageError("one request at a time: send cancel, or wait for the end")))

    async def _speak(self, call: Call) -> None:
        """Everything about one call, the failure that ends it included; nothing overtakes anything."""
        outbox = Outbox()
        call.watch = outbox.see
        writing = asyncio.create_task(self._write(call, outbox))
        try:
            while (said := await outbox.take()) is not None:
                await self._say(said)
        finally:
            await end_tasks([writing])

    async def _write(self, call: Call, outbox: Outbox) -> None:
        try:
            await call.open()
            outbox.add(_started(call))
            async for _, new, _ in call.events():
                outbox.write(new)
            outbox.add(_finished(call))
        except Exception as error:
            outbox.add(_error(error))
        finally:
            outbox.end()

    async def _say(self, said: Said) -> None:
        try:
            async with asyncio.timeout(events.STALL_SECONDS):
                await self.socket.send_text(json.dumps(said, ensure_ascii=False, separators=(",", ":")))
        except TimeoutError:
            await events.hang_up(self.socket.scope)
            raise WebSocketDisconnect(1006) from None


class Outbox:
    """What is to be said, in order: drafts and corrections may be dropped, final tokens are merged."""

    def __init__(self) -> None:
        self._said: deque[Said] = deque()
        self._sights = self._count = 0
        self._ended = False
        self._changed = asyncio.Event()

    def see(self, sight: Drafted | Correction) -> None:
        """A draft or a correction."""
        if self._sights >= MAX_SIGHTS:
            oldest = next(said for said in self._said if said["type"] in SIGHTS)
            self._said.remove(oldest)
            self._sights -= 1
        self._sights += 1
        self.add(_sight(sight))

    def write(self, new: Written) -> None:
        """Final tokens."""
        tokens = [
            {"id": t.id, "text": t.text, "origin": t.origin, "confidence": t.confidence, "logprob": t.logprob}
            for t in new.tokens
        ]
        last = self._said[-1] if self._said else None
        if last and last["type"] == "tokens":
            last["tokens"] += tokens
            last["text"] += new.text
        else:
            self.add({"type": "tokens", "start": self._count, "tokens": tokens, "text": new.text})
        self._count += len(tokens)

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._changed.set()

    async def take(self) -> Said | None:
        """The next thing to say; None at the end."""
        while not self._said:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        said = self._said.popleft()
        self._sights -= said["type"] in SIGHTS
        return said

    def add(self, said: Said) -> None:
        """Anything else."""
        self._said.append(said)
        self._changed.set()


def _object(text: str) -> dict[str, Any]:
    """A message as a JSON object; anything else is told by the reader of bodies."""
    with suppress(ValueError):
        body = json.loads(text)
        if isinstance(body, dict):
            return body
    return {}


def _started(call: Call) -> Said:
    seed = call.writers[0].task.sampling.seed
    about = {"id": call.id, "model": call.model, "mode": call.mode, "prompt_tokens": call.prompt_tokens}
    return {"type": "started", **about, "seed": str(seed)}  # as text: a browser's numbers end at 2^53


def _sight(sight: Drafted | Correction) -> Said:
    if isinstance(sight, Correction):
        return {"type": "correction", "at": sight.at, "was": sight.was, "now": sight.now, "withdrawn": sight.withdrawn}
    drafted = zip(sight.texts, sight.confidences, strict=True)
    return {
        "type": "draft",
        "start": sight.start,
        "tokens": [{"text": text, "confidence": round(confidence, 4)} for text, confidence in drafted],
    }


def _finished(call: Call) -> Said:
    (writer,) = call.writers
    told = call.told(0).model_dump() | {"seed": str(writer.summary.seed)}
    used = usage(call.prompt_tokens, [writer.summary]).model_dump()
    return {"type": "finished", "reason": writer.finish, "usage": used, "pilotfish": told}


def _error(error: Exception) -> Said:
    return {"type": "error", **json.loads(fault(error).body)}
