"""The shell's side of the broker: submit a prompt to any agent, follow what is said about it, call it off.

The agents' side of the same streams is in `broker.py`. Knows streams and messages, nothing of terminals.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, append_output, live, read_entry, translated
from pilotfish.protocol.codec import encode
from pilotfish.protocol.errors import AnswerLost, InvalidMessage, NoAgent
from pilotfish.protocol.messages import Message, Prompt, ToShell


class ShellBroker:
    """What `pilotfish submit`, `result` and `cancel` say to Redis."""

    def __init__(self, redis: RedisBytes, tenant: str) -> None:
        self.redis, self.tenant = redis, tenant

    async def submit(self, prompt: Prompt) -> None:
        """Queue a prompt for any live agent of the tenant. Raises NoAgent at once when there is none."""
        with translated():
            if not await live(self.redis, keys.agents(self.tenant)):
                raise NoAgent(f"no agent of tenant {self.tenant!r} is alive: start one with `pilotfish agent`")
            entry: dict[Any, Any] = {keys.FIELD_MESSAGE: encode(prompt)}
            if await self.redis.xadd(keys.prompts(self.tenant), entry, nomkstream=True) is None:
                raise NoAgent("the agents' prompt stream is gone (Redis restarted?): try again in a second")

    async def output(self, request: str, *, follow: bool) -> AsyncIterator[ToShell]:
        """Everything said about a request, from its beginning; with `follow`, until it is finished or failed.

        While following, a request that no live agent works on raises NoAgent within two seconds or so, and one that
        Redis no longer has AnswerLost.
        """
        stream, cursor, kept = keys.output(self.tenant, request), b"0-0", b"-"
        while True:
            with translated():
                got = await self.redis.xread({stream: cursor}, block=keys.BLOCK_MS // 2 if follow and kept else None)
                if not got and not follow:
                    return
                if not got and not kept:
                    raise AnswerLost(f"Redis lost request {request} (did it restart?): submit it again")
                if not got and not await live(self.redis, keys.agents(self.tenant)):
                    raise NoAgent(f"the agent went away; request {request} waits for another: `pilotfish agent`")
                if not got:
                    kept = await self._kept(request, kept)
            for entry_id, fields in got[0][1] if got else ():
                cursor = entry_id
                message = read_entry(fields, ToShell)
                if isinstance(message, InvalidMessage):
                    raise message
                yield message
                if message.type in ("finished", "failed"):
                    return

    async def _kept(self, request: str, known: bytes) -> bytes:
        """Id of the prompt's entry, b"" if it is gone: an agent drops it after its last word, which is then there.

        What else was said is no proof: an agent from which Redis took the prompt stops in the middle. `known` is the
        entry's id, or b"-" before the first look, which goes through all that wait.
        """
        waiting = await self.redis.xrange(keys.prompts(self.tenant), known, "+" if known == b"-" else known)
        name, field = request.encode(), keys.FIELD_MESSAGE.encode()
        return next((entry_id for entry_id, fields in waiting if name in fields.get(field, b"")), b"")

    async def tell_agent(self, agent: str, message: Message) -> None:
        """Append to an agent's reply stream (cancel); an agent that had no reply yet has no stream yet."""
        stream = keys.replies(self.tenant, agent)
        with translated():
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.xadd(stream, {keys.FIELD_MESSAGE: encode(message)}, maxlen=keys.REPLY_MAXLEN, approximate=True)
                pipe.pexpire(stream, keys.REPLY_TTL_MS)
                await pipe.execute()

    async def withdraw(self, request: str, message: Message) -> None:
        """Write the last word of a request that no agent has taken yet."""
        await append_output(self.redis, keys.output(self.tenant, request), message)
