"""The WebSocket: what a watcher sees adds up to the text, and a slow one sees less of the way and all of the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from http_rigs import HELLO, MODEL, Served, alone, api, served
from rigs import draws
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from helpers import wait_until
from pilotfish.edge_agent.http.stream import MAX_SIGHTS, PROTOCOL, Outbox
from pilotfish.edge_agent.http.writer import Drafted, Token, Written
from pilotfish.protocol.http_guard import Access
from pilotfish.protocol.messages import Sampling

ASKED = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "temperature": 1, "seed": 7}
IDS = draws(tuple(b"hello"), 60, Sampling(temperature=1.0, seed=7))


@asynccontextmanager
async def watching(one: Served, **how: Any) -> AsyncIterator[ClientConnection]:
    async with connect(one.url.replace("http", "ws") + "/v1/stream", subprotocols=[PROTOCOL], **how) as socket:  # type: ignore[list-item]
        yield socket


async def all_of(socket: ClientConnection) -> list[dict[str, Any]]:
    """Messages up to the last one of a request."""
    said: list[dict[str, Any]] = []
    while not said or said[-1]["type"] not in ("finished", "error"):
        said.append(json.loads(await asyncio.wait_for(socket.recv(), 10)))
    return said


async def test_drafts_corrections_and_final_tokens_tell_one_story(redis_url: str) -> None:
    async with api(redis_url) as one, watching(one) as socket:
        await socket.send(json.dumps(ASKED))
        said = await all_of(socket)
    started, *middle, finished = said
    assert (started["type"], started["seed"], started["mode"]) == ("started", "7", "exact")
    assert (finished["type"], finished["reason"], finished["usage"]["completion_tokens"]) == ("finished", "length", 60)
    seen: dict[int, str] = {}
    final: list[dict[str, Any]] = []
    corrected = 0
    for message in middle:
        if message["type"] == "draft":
            seen.update(enumerate((token["text"] for token in message["tokens"]), message["start"]))
        elif message["type"] == "correction":
            corrected += 1
            assert seen[message["at"]] == message["was"]
            assert message["withdrawn"] == sum(at > message["at"] for at in seen)
            seen = {at: text for at, text in seen.items() if at < message["at"]}
        else:
            assert message["start"] == len(final)
            final += message["tokens"]
    assert [token["id"] for token in final] == IDS
    assert "".join(m["text"] for m in middle if m["type"] == "tokens") == bytes(IDS).decode(errors="replace")
    # what was drafted on while the cloud wrote by itself may be withdrawn too: those tokens are "continued"
    assert corrected >= sum(token["origin"] == "corrected" for token in final) > 0
    assert all(token["confidence"] == 0.7 for token in final if token["origin"] == "accepted")
    assert finished["pilotfish"]["corrected"] == corrected


async def test_one_connection_serves_one_request_after_another() -> None:
    async with alone("wave ") as one, watching(one) as socket:
        for text in ({"messages": HELLO}, {"prompt": "hello"}):
            await socket.send(json.dumps({"model": MODEL, "max_tokens": 5, **text}))
            *_, last = await all_of(socket)
            assert last["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "bad_request"),
        ('{"model": "fake", "messages": [], "x": 1}', "unsupported_parameter"),
        (json.dumps({"model": "gpt", "messages": HELLO}), "model_not_found"),
        (json.dumps({"model": MODEL, "messages": HELLO, "n": 2}), "bad_request"),
        (json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 9999}), "context_length_exceeded"),
    ],
)
async def test_a_refusal_is_that_of_the_other_routes_and_the_connection_goes_on(text: str, code: str) -> None:
    async with alone() as one, watching(one) as socket:
        await socket.send(text)
        (error,) = await all_of(socket)
        assert error["error"]["code"] == code
        await socket.send(json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 1}))
        assert (await all_of(socket))[-1]["type"] == "finished"


async def test_a_client_may_cancel_and_ask_again() -> None:
    async with alone(token_ms=2) as one, watching(one) as socket:
        await socket.send(json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 3000}))
        await wait_until(lambda: one.service.agent.generations, "the generation")
        await socket.send(json.dumps({"type": "cancel"}))
        assert (await all_of(socket))[-1] == {"type": "finished", "reason": "cancelled"}
        await wait_until(lambda: not one.service.agent.generations, "its end")
        await socket.send(json.dumps({"type": "cancel"}))  # too late, and harmless
        await socket.send(json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 3}))
        assert (await all_of(socket))[-1]["reason"] == "length"


async def test_a_client_that_leaves_ends_its_generation() -> None:
    async with alone(token_ms=2) as one:
        async with watching(one) as socket:
            await socket.send(json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 3000}))
            await wait_until(lambda: one.service.agent.generations, "the generation")
        await wait_until(lambda: not one.service.agent.generations and not one.service.calls, "its end")


async def test_a_user_is_one_client_whichever_way_it_asks_and_its_trace_goes_on() -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with alone(token_ms=2) as one, watching(one, additional_headers={"traceparent": caller}) as socket:
        await socket.send(json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 3000, "user": "u"}))
        plain = asyncio.create_task(one.chat(max_tokens=3000, user="u"))
        calls = one.service.calls
        await wait_until(lambda: len(calls) == 2, "both")
        assert {call.client for call in calls} == {"user u"}
        assert caller in {call.trace for call in calls}
        plain.cancel()


async def test_the_key_and_the_origin_are_asked_for_here_too() -> None:
    async with alone() as plain, served(plain.service, Access(key="k")) as one:
        with pytest.raises(InvalidStatus):
            async with watching(one):
                pass
        async with watching(one, additional_headers={"authorization": "Bearer k"}) as socket:
            await socket.send("{}")
            assert (await all_of(socket))[-1]["type"] == "error"
        with pytest.raises(InvalidStatus):
            async with watching(plain, origin="http://evil.example"):
                pass


async def test_a_message_too_big_ends_the_connection() -> None:
    async with alone() as one, watching(one) as socket:
        await socket.send("x" * (2 << 20))
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 10)


# --- the outbox of a slow reader -----------------------------------------------------------------------------


async def said_by(outbox: Outbox) -> list[dict[str, Any]]:
    outbox.end()
    said = []
    while (one := await outbox.take()) is not None:
        said.append(one)
    return said


async def test_a_slow_reader_loses_drafts_and_never_a_final_token() -> None:
    outbox = Outbox()
    for number in range(2 * MAX_SIGHTS):
        outbox.see(Drafted(number, ["x"], [0.5]))
        outbox.write(Written("y", [Token(number, "y", b"y", "accepted")]))
    said = await said_by(outbox)
    assert sum(message["type"] == "draft" for message in said) == MAX_SIGHTS
    final = [token["id"] for message in said if message["type"] == "tokens" for token in message["tokens"]]
    assert final == list(range(2 * MAX_SIGHTS))
    assert said[-2]["type"] == "draft"


async def test_final_tokens_in_a_row_are_one_message() -> None:
    outbox = Outbox()
    for number in range(5):
        outbox.write(Written("y", [Token(number, "y", b"y", "accepted")]))
    (one,) = await said_by(outbox)
    assert (one["text"], one["start"], len(one["tokens"])) == ("yyyyy", 0, 5)
