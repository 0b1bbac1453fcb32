"""How a job leaves a worker's hands: with its answer, to a peer, or with the whole stream made honest again.

The third layer of `ingress.py`. Each way is one script, so nothing comes between an answer and its acknowledgement.
Knows replies and dead letters; nothing of what they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import redis.exceptions as rx
from redis.commands.core import AsyncScript

from pilotfish.protocol import keys
from pilotfish.protocol.broker import SOCKET_SECONDS, RedisBytes
from pilotfish.protocol.codec import encode, is_padded
from pilotfish.protocol.delivery import Delivery, dead_letter, passing_on
from pilotfish.protocol.leases import Leases
from pilotfish.protocol.messages import Message
from pilotfish.protocol.wire import Wire

#: tell(stream, payload): a reply that keeps its stream alive. One that its tenant has broken (no stream, or out of ids)
#: begins again, or its jobs would never end.
TELL: Final = f"""
local function tell(stream, payload)
  local reply = {{'XADD', stream, 'MAXLEN', '~', {keys.REPLY_MAXLEN}, '*', '{keys.FIELD_MESSAGE}', payload}}
  local told = redis.pcall(unpack(reply))
  if type(told) == 'table' and told.err then
    redis.call('DEL', stream)
    redis.call(unpack(reply))
  end
  redis.call('PEXPIRE', stream, {keys.REPLY_TTL_MS})
end
"""

#: answer(KEYS: job stream, reply stream, dead letters; ARGV: group, entry id, reply or "", last, letter's fields...)
#: A script and not a MULTI: one command to send and one answer to read, on the hottest path there is.
ANSWER: Final = f"""{TELL}
if ARGV[3] ~= '' then tell(KEYS[2], ARGV[3]) end
if #ARGV > 4 then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', {keys.DLQ_MAXLEN}, '*', unpack(ARGV, 5))
  redis.call('PEXPIRE', KEYS[3], {keys.DLQ_TTL_MS})
end
if ARGV[4] == '1' then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
"""

#: pass_on(KEYS: job stream, peer's stream; ARGV: group, consumer, entry id, then fields and values to add...)
#: -> 1, or 0 when the job is no longer ours or the peer has no stream. One step: nobody sees it twice, or never. Of
#: several messages in one entry the last counts, as for who reads it here: an edge must not make many jobs of one.
PASS_ON: Final = f"""
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if not entry then return 0 end
local message = ''
for i = 1, #entry[2], 2 do
  if entry[2][i] == '{keys.FIELD_MESSAGE}' then message = entry[2][i + 1] end
end
redis.call('XADD', KEYS[2], '*', '{keys.FIELD_MESSAGE}', message, unpack(ARGV, 4))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
"""

#: start_over(KEYS: stream; ARGV: group, its life in ms) -> 1 when it was empty and began again.
#: Redis gives out ids above the largest it saw: after one far ahead, every honest one would look invented too.
START_OVER: Final = """
if redis.call('XLEN', KEYS[1]) > 0 then return 0 end
redis.call('DEL', KEYS[1])
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""


class Answers(Leases):
    """Replies, and moves to peers, of what one worker holds."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        super().__init__(redis, target, worker)
        self._wire = Wire(redis, SOCKET_SECONDS)
        self._answer = redis.register_script(ANSWER)
        self._pass_on = redis.register_script(PASS_ON)
        self._start_over = redis.register_script(START_OVER)

    async def reply(self, delivery: Delivery, message: Message | None, *, last: bool = True, dead: str = "") -> None:
        """Add the reply and, with `last`, acknowledge and delete the job: one script, nothing comes between.

        `message` None acknowledges without a reply (cancel, close). `dead` says why a copy goes to the dead letters.
        """
        streams = [delivery.stream, keys.replies(delivery.tenant, delivery.agent), keys.dead_letters(self.target)]
        padded = is_padded(delivery.payload)  # who hides the size of a job wants its verdict's hidden too
        payload = encode(message, padded=padded) if message is not None and delivery.agent else b""
        letter = dead_letter(delivery, dead) if dead else ()
        await self._run(self._answer, streams, (keys.GROUP_WORKERS, delivery.entry_id, payload, int(last), *letter))
        if last:
            self.release(delivery)

    async def _run(self, script: AsyncScript, names: Sequence[str], args: Iterable[Any]) -> Any:
        """A script on the short way, for those that run once a job."""
        told = (len(names), *names, *args)
        try:
            return await self._wire.call("EVALSHA", script.sha, *told)
        except rx.NoScriptError:
            return await self._wire.call("EVAL", script.script, *told)

    async def pass_on(
        self, delivery: Delivery, worker: str, *, cached_tokens: int = -1, queued_tokens: int = 0
    ) -> bool:
        """Move a job to a peer's own stream, with its age and delivery count: one script. False if that cannot be."""
        added = passing_on(delivery, cached_tokens, queued_tokens)
        moved = await self._pass_on(
            keys=[delivery.stream, keys.forwarded(self.target, worker)],
            args=[keys.GROUP_WORKERS, self.worker, delivery.entry_id, *added],
        )
        if moved:
            self.release(delivery)
        return bool(moved)

    async def start_over(self, stream: str) -> None:
        """Make a stream honest again after an entry whose id was invented ahead of Redis' clock, once it is empty."""
        await self._start_over(keys=[stream], args=[keys.GROUP_WORKERS, keys.JOBS_TTL_MS])
