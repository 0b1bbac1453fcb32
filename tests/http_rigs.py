"""Shared by the tests of the API: a served agent of the fake pair, and OpenAI's own client to speak to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
from rigs import agent, worker

from pilotfish.cloud_worker.engines.fake import fake_target
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.http.app import application
from pilotfish.edge_agent.http.service import Service
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol.http_guard import Access
from pilotfish.protocol.http_server import serving

MODEL = "fake"
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Served:
    """A served agent, where it is, and a client of it."""

    service: Service
    url: str
    client: openai.AsyncOpenAI

    async def chat(self, **wish: Any) -> Any:
        return await self.client.chat.completions.create(
            **{"model": MODEL, "messages": HELLO, "max_tokens": 20, **wish}
        )

    async def complete(self, **wish: Any) -> Any:
        return await self.client.completions.create(**{"model": MODEL, "prompt": "hello", "max_tokens": 20, **wish})


@asynccontextmanager
async def served(service: Service, access: Access | None = None, **how: Any) -> AsyncIterator[Served]:
    """The API of a service on a free port."""
    access = access or Access()
    app = application(service, access, **how)
    async with serving(app, "127.0.0.1", 0, access.key) as url:
        key = access.key or "none"
        plain = openai.DefaultAsyncHttpxClient(
            verify=False
        )  # nothing is encrypted here, and reading certificates takes a while
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=plain) as client:
            yield Served(service, url, client)


@asynccontextmanager
async def api(redis_url: str, *, model: str = "", prompts: bool = False, **service: Any) -> AsyncIterator[Served]:
    """Worker, agent and API; `model` holds the fake engine's switches."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(worker(redis_url, model=model))
        running = await stack.enter_async_context(agent(redis_url, prompts=prompts))
        yield await stack.enter_async_context(served(Service(running, **service)))


def lonely_agent(text: str = "abc ", *, token_ms: float = 0.0) -> Agent:
    """An agent without a cloud: its draft writes `text` over and over, or with "" what the fake target would."""
    letters = text.encode()
    target = (lambda ids, at, _: letters[at % len(letters)]) if text else fake_target
    return Agent(FakeDrafter(target, alpha=1.0, token_ms=token_ms), ByteTokenizer(), ())


@asynccontextmanager
async def alone(text: str = "abc ", *, token_ms: float = 0.0, **service: Any) -> AsyncIterator[Served]:
    """The API of an agent without Redis."""
    running = lonely_agent(text, token_ms=token_ms)
    await running.start()
    try:
        async with served(Service(running, **service)) as one:
            yield one
    finally:
        await running.stop()
