"""What workers tell agents about themselves: which target, which vocabulary, which chat template, how busy.

A pair (draft, target) works only if both read the same ids as the same bytes. A worker publishes its table of id ->
bytes once; an agent compares it with its own at start and refuses with the first difference. Knows Redis and keys.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, live, translated
from pilotfish.protocol.errors import NoWorker, PairMismatch, SettingsError

MAX_PAIR_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What an id means: `tokens[id]` are the bytes it stands for (special tokens: their name)."""

    tokens: tuple[bytes, ...]
    chat_template: str = ""
    stop_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Target:
    """A target as agents see it: its fingerprint's first 16 hex digits, and the limits every job must keep."""

    id: str
    name: str
    context: int
    draft_max: int
    vocabulary: Vocabulary


def target_id(fingerprint: str) -> str:
    """The part of a fingerprint that names keys."""
    return fingerprint[:16]


def check_pair(draft: Vocabulary, target: Vocabulary, names: tuple[str, str] = ("draft", "target")) -> None:
    """Raise PairMismatch naming the first id that the two read differently. Padding at the end may differ in length."""
    for index, (ours, theirs) in enumerate(zip(draft.tokens, target.tokens, strict=False)):
        if ours != theirs:
            raise PairMismatch(
                f"{names[0]} and {names[1]} differ at token {index}: {_text(ours)} against {_text(theirs)}. "
                f"A pair must share one tokenizer: choose a draft of the target's family"
            )
    longer, shorter = sorted((draft.tokens, target.tokens), key=len, reverse=True)
    for index, token in enumerate(longer[len(shorter) :], len(shorter)):
        if not _padding(token):
            raise PairMismatch(
                f"{names[0]} has {len(draft)} tokens and {names[1]} {len(target)}: the first that only one knows is "
                f"{index}, {_text(token)}. A pair must share one tokenizer: choose a draft of the target's family"
            )


def _padding(token: bytes) -> bool:
    lowered = token.lower()
    return not token or lowered.startswith((b"[pad", b"<pad", b"<unused", b"<|unused", b"<|extra_"))


def _text(token: bytes) -> str:
    return repr(token.decode("utf-8", "backslashreplace"))


def pack_vocabulary(vocabulary: Vocabulary) -> bytes:
    """For the pair key: zlib over msgpack."""
    return zlib.compress(
        msgpack.packb([list(vocabulary.tokens), vocabulary.chat_template, list(vocabulary.stop_ids)]), 6
    )


def unpack_vocabulary(data: bytes) -> Vocabulary:
    """Reverse of `pack_vocabulary`. Raises PairMismatch for bytes that are none (an agent must not go on)."""
    try:
        inflater = zlib.decompressobj()
        tokens, template, stops = msgpack.unpackb(inflater.decompress(data, MAX_PAIR_BYTES), raw=False)
        if not (isinstance(template, str) and all(type(t) is bytes for t in tokens) and all(0 <= s for s in stops)):
            raise TypeError("fields of the wrong type")
        return Vocabulary(tuple(tokens), template, tuple(stops))
    except Exception as error:
        raise PairMismatch(f"the target's vocabulary in Redis cannot be read ({error}): restart its worker") from None


def vocabulary_hash(tokens: Sequence[bytes]) -> str:
    """Sixteen hex digits over every token's length and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


async def announce(redis: RedisBytes, target: Target) -> None:
    """Publish a target: worker start-up, and again whenever its beat finds the pair key gone."""
    with translated():
        async with redis.pipeline(transaction=True) as pipe:
            text = f"{target.name} context={target.context} draft_max={target.draft_max}"
            pipe.hset(keys.TARGETS, target.id, text)
            pipe.set(keys.pair(target.id), pack_vocabulary(target.vocabulary), px=keys.PAIR_TTL_MS)
            await pipe.execute()


async def find_target(redis: RedisBytes, wanted: str = "") -> Target:
    """The one live target, or the one whose id or name starts with `wanted`. Raises NoWorker or SettingsError."""
    with translated():
        listed = {i.decode(): text.decode() for i, text in (await redis.hgetall(keys.TARGETS)).items()}
        alive = {i: text for i, text in listed.items() if await live(redis, keys.workers(i))}
    matching = {i: text for i, text in alive.items() if not wanted or i.startswith(wanted) or text.startswith(wanted)}
    if not matching:
        raise NoWorker(f"no live worker serves {wanted or 'any target'}: start one with `pilotfish worker`")
    if len(matching) > 1:
        names = ", ".join(f"{i} ({text.split()[0]})" for i, text in sorted(matching.items()))
        raise SettingsError(f"several targets are alive: {names}. Choose one with --target")
    ((found, text),) = matching.items()
    return await _read_target(redis, found, text)


async def _read_target(redis: RedisBytes, found: str, text: str) -> Target:
    with translated():
        packed = await redis.get(keys.pair(found))
    if packed is None:
        raise NoWorker(f"target {found} has not published its vocabulary: restart its worker")
    name, *pairs = text.split()
    limits = dict(pair.split("=", 1) for pair in pairs)
    vocabulary = unpack_vocabulary(packed)
    return Target(found, name, int(limits["context"]), int(limits["draft_max"]), vocabulary)
