"""What one client does to others: hanging up, not reading, asking for too much. It must be nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import openai
import pytest
from http_rigs import HELLO, MODEL, Served, alone, api

from helpers import wait_until
from pilotfish.edge_agent.http import events
from pilotfish.edge_agent.http.turnstile import Turnstile
from pilotfish.protocol import http_server, metrics


def refused_as(code: str) -> float:
    return metrics.REGISTRY.get_sample_value("pilotfish_jobs_total", {"outcome": code}) or 0.0


def idle(one: Served) -> bool:
    return not one.service.agent.generations and not one.service.calls and one.service.turnstile.running == 0


@pytest.mark.parametrize("streams", [True, False])
async def test_a_client_that_hangs_up_ends_its_generation_here_and_in_the_cloud(redis_url: str, streams: bool) -> None:
    async with api(redis_url, model="step_ms=20") as one:
        before = refused_as("cancelled")
        asking = asyncio.create_task(
            read_all(one, max_tokens=3000, stream=streams, extra_body={"pilotfish": {"mode": "cloud_only"}})
        )
        await wait_until(lambda: any(g.summary().tokens for g in one.service.agent.generations.values()), "text")
        asking.cancel()
        await wait_until(lambda: idle(one), "the agent to let go")
        await wait_until(lambda: refused_as("cancelled") > before, "the worker to stop")


async def read_all(one: Served, **wish: Any) -> str:
    answer = await one.chat(**wish)
    if not wish.get("stream"):
        return str(answer.choices[0].message.content)
    async with answer:
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


async def test_a_client_that_hangs_up_while_it_waits_leaves_the_line() -> None:
    async with alone(token_ms=2, turnstile=Turnstile(1, 5)) as one:
        first = asyncio.create_task(read_all(one, max_tokens=3000, stream=True))
        await wait_until(lambda: one.service.turnstile.running, "the first")
        second = asyncio.create_task(read_all(one))
        await wait_until(lambda: one.service.turnstile.waiting, "the second to wait")
        second.cancel()
        await wait_until(lambda: not one.service.turnstile.waiting, "it to leave")
        first.cancel()
        await wait_until(lambda: idle(one), "the first to end")


async def test_too_many_are_told_when_to_come_back() -> None:
    async with alone(token_ms=2, turnstile=Turnstile(1, 1)) as one:
        asking = [asyncio.create_task(read_all(one, max_tokens=3000, stream=True)) for _ in range(2)]
        await wait_until(lambda: one.service.turnstile.waiting, "a full house")
        with pytest.raises(openai.RateLimitError) as caught:
            await one.chat()
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
        for task in asking:
            task.cancel()
        await wait_until(lambda: idle(one), "them to leave")
        assert await read_all(one)


async def test_a_crowd_of_one_client_delays_another_by_one_answer() -> None:
    order: list[str] = []

    async def ask(one: Served, user: str) -> None:
        await read_all(one, user=user, max_tokens=30)
        order.append(user)

    async with alone(token_ms=1, turnstile=Turnstile(1, 50)) as one:
        crowd = [asyncio.create_task(ask(one, "crowd")) for _ in range(6)]
        await wait_until(lambda: one.service.turnstile.waiting == 5, "the crowd to line up")
        await ask(one, "late")
        assert order.index("late") <= 2
        await asyncio.gather(*crowd)


async def connect(one: Served, body: dict[str, Any], *, window: int) -> socket.socket:
    """A request whose client reads nothing, with room for `window` bytes on its way."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    raw.setblocking(False)
    loop, place = asyncio.get_running_loop(), urlsplit(one.url)
    await loop.sock_connect(raw, (place.hostname, place.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
    await loop.sock_sendall(raw, head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
    return raw


def small_buffers(host: str, port: int) -> socket.socket:
    """The kernel holds little of what nobody reads."""
    listening = socket.create_server((host, port))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return listening


async def test_a_client_that_reads_nothing_holds_no_place_and_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pilotfish.http")
    monkeypatch.setattr(events, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(http_server, "_listen", small_buffers)
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4000, "stream": True, "logprobs": True}
    async with alone(turnstile=Turnstile(1, 50)) as one:
        deaf = await connect(one, body, window=4096)
        try:
            await wait_until(lambda: one.service.calls, "its call")
            assert len(await asyncio.wait_for(read_all(one, max_tokens=100, stream=True), 10)) == 100
            await wait_until(lambda: idle(one) and "hung up" in caplog.text, "the line to be cut")
        finally:
            deaf.close()


async def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from pilotfish.edge_agent.http import routes

    monkeypatch.setattr(routes, "BODY_SECONDS", 0.1)
    async with alone() as one:
        place = urlsplit(one.url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 100\r\n\r\n{{".encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
        writer.close()
        await writer.wait_closed()
    assert b" 504 " in answer


async def test_a_connection_that_asks_for_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SILENT_SECONDS", 0.05)
    async with alone() as one:
        place = urlsplit(one.url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localh")
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert len(await read_all(one, max_tokens=30, stream=True)) == 30, "one that speaks is not"


async def test_a_silent_stream_says_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(events, "BEAT_SECONDS", 0.02)
    async with alone(token_ms=60) as one:
        stream, messages = one.client.chat.completions.with_streaming_response, cast(Any, HELLO)
        async with stream.create(model=MODEL, messages=messages, max_tokens=2, stream=True) as answer:
            said = [line async for line in answer.iter_lines()]
    assert ": still at it" in said
    assert said[-2:] == ["data: [DONE]", ""] or said[-1] == "data: [DONE]"


async def test_an_agent_that_drains_refuses_new_requests_and_finishes_the_old() -> None:
    async with alone(token_ms=2) as one:
        running = asyncio.create_task(read_all(one, max_tokens=100, stream=True))
        await wait_until(lambda: one.service.turnstile.running, "a generation")
        one.service.draining = True
        with pytest.raises(openai.InternalServerError) as caught:
            await one.chat()
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert len(await running) == 100


async def test_a_deadline_that_passes_in_line_is_told() -> None:
    async with alone(token_ms=2, turnstile=Turnstile(1, 5)) as one:
        first = asyncio.create_task(read_all(one, max_tokens=3000, stream=True))
        await wait_until(lambda: one.service.turnstile.running, "the first")
        with pytest.raises(openai.APIStatusError) as caught:
            await one.chat(extra_body={"pilotfish": {"deadline_ms": 50}})
        assert (caught.value.status_code, caught.value.code) == (504, "deadline")
        first.cancel()
        await wait_until(lambda: idle(one), "the first to end")


async def test_a_draft_model_that_does_not_come_back_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(*prompt: Any, **how: Any) -> tuple[int, ...]:
        await asyncio.Event().wait()
        return ()

    async with alone() as one:
        monkeypatch.setattr(one.service.agent, "encode", hangs)
        with pytest.raises(openai.APIStatusError) as caught:
            await one.chat(extra_body={"pilotfish": {"deadline_ms": 50}})
        assert (caught.value.status_code, caught.value.code) == (504, "deadline")
        assert idle(one)


async def collect(stream: Any, said: list[str]) -> None:
    async for chunk in stream:
        said += [chunk.choices[0].delta.content or ""]


async def test_a_failure_after_the_first_words_is_an_event_of_the_stream() -> None:
    async with alone(token_ms=4) as one:
        stream = await one.chat(max_tokens=3000, stream=True, extra_body={"pilotfish": {"deadline_ms": 300}})
        said: list[str] = []
        with pytest.raises(openai.APIError, match="longer than its deadline"):
            await collect(stream, said)
        assert "".join(said)
        await wait_until(lambda: idle(one), "its end")
