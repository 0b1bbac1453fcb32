"""What workers tell agents about themselves: which target, which vocabulary, which chat template, how busy.

A pair (draft, target) works only if both read the same ids as the same bytes. A worker publishes its table of id ->
bytes once; an agent compares it with its own at start and refuses with the first difference. Knows Redis and keys.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, live, translated
from pilotfish.protocol.codec import unpack_bounded
from pilotfish.protocol.errors import NoWorker, PairMismatch, SettingsError

MAX_PAIR_BYTES = 16_000_000  # unpacked; the largest vocabularies of today (260 k tokens) take four
_ANNOUNCED = re.compile(r"(.*) context=(\d{1,9}) draft_max=(\d{1,9})", re.DOTALL)  # a name may hold spaces


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
    """Raise PairMismatch naming the first id that the two read differently. Padding may differ, in name and length."""
    for index, (ours, theirs) in enumerate(zip(draft.tokens, target.tokens, strict=False)):
        if ours != theirs and not (_padding(ours) and _padding(theirs)):
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
        packed = inflater.decompress(data, MAX_PAIR_BYTES)
        if not inflater.eof:
            raise ValueError(f"cut off, or longer than {MAX_PAIR_BYTES} bytes")
        return _checked(*unpack_bounded(packed, MAX_PAIR_BYTES))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise PairMismatch(f"the target's vocabulary in Redis cannot be read ({why}): restart its worker") from None


def _checked(tokens: object, template: object, stops: object) -> Vocabulary:
    if not (type(tokens) is tuple and all(type(token) is bytes for token in tokens)):
        raise TypeError("tokens are not bytes")
    if not (type(stops) is tuple and all(type(stop) is int and 0 <= stop < len(tokens) for stop in stops)):
        raise TypeError("stop ids are not ids of the vocabulary")
    if not isinstance(template, str):
        raise TypeError("the chat template is not text")
    return Vocabulary(tokens, template, stops)


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
        raw: dict[bytes, bytes] = await redis.hgetall(keys.TARGETS)  # type: ignore[misc]  # typed as sync or async
        listed = {i.decode(): text.decode("utf-8", "replace") for i, text in raw.items()}
        alive = {i: text for i, text in listed.items() if await live(redis, keys.workers(i))}
    matching = {i: text for i, text in alive.items() if i.startswith(wanted) or text.startswith(wanted)}
    if exact := {i: text for i, text in matching.items() if wanted in (i, _name(text))}:
        matching = exact  # "qwen" chooses the target of that name, even beside "qwen-large"
    if not matching:
        raise NoWorker(f"no live worker serves {wanted or 'any target'}: start one with `pilotfish worker`")
    if len(matching) > 1:
        names = ", ".join(f"{i} ({_name(text)})" for i, text in sorted(matching.items()))
        raise SettingsError(f"several targets are alive: {names}. Choose one with --target")
    ((found, text),) = matching.items()
    return await _read_target(redis, found, text)


def _name(text: str) -> str:
    announced = _ANNOUNCED.fullmatch(text)
    return announced[1] if announced else text[:80]


async def _read_target(redis: RedisBytes, found: str, text: str) -> Target:
    with translated():
        packed = await redis.get(keys.pair(found))
    if packed is None:
        raise NoWorker(f"target {found} has not published its vocabulary: restart its worker")
    announced = _ANNOUNCED.fullmatch(text)
    if announced is None:
        raise NoWorker(f"target {found} is announced as {text[:80]!r}, which cannot be read: restart its worker")
    name, context, draft_max = announced.groups()
    return Target(found, name, int(context), int(draft_max), unpack_vocabulary(packed))
