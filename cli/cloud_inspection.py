"""Looking at the prefix index: what workers hold, and how warm they are for a prompt of this tenant."""

from __future__ import annotations

from dataclasses import dataclass

from pilotfish.cache.block_hash import block_hashes, cacheable, short
from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.cloud_worker.salts import Salts
from pilotfish.edge_agent.tokenizer import ByteTokenizer, LlamaTokenizer
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import RedisBytes, translated
from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.inspection import text_hash
from pilotfish.protocol.settings import Settings


@dataclass(frozen=True, slots=True)
class Indexed:
    """One worker as the index and its beat tell of it."""

    target: str
    worker: str
    epoch: int
    blocks: int
    kv_blocks: int
    block_size: int
    queued: int
    rate: float
    predicted: int
    predicted_equal: int


@dataclass(frozen=True, slots=True)
class Warmth:
    """How much of a prompt one worker would not compute."""

    worker: str
    tokens: int
    cached_tokens: int
    queued: int


async def indexed(redis: RedisBytes, target: str) -> list[Indexed]:
    """Every live worker of the targets whose id or name begins so."""
    with translated():
        listed = await text_hash(redis, keys.TARGETS)
        chosen = [one for one, text in sorted(listed.items()) if one.startswith(target) or text.startswith(target)]
        return [worker for one in chosen for worker in await _workers(redis, one)]


async def _workers(redis: RedisBytes, target: str) -> list[Indexed]:
    found = []
    for held in await PrefixIndex(redis, target).look():
        beat = await text_hash(redis, keys.beat(target, held.worker))
        names = ("kv_blocks", "block_size", "predicted", "predicted_equal")
        kv_blocks, block_size, predicted, equal = (int(beat.get(name, 0)) for name in names)
        found.append(
            Indexed(
                target, held.worker, held.epoch, held.blocks, kv_blocks, block_size, held.queued, held.rate,
                predicted, equal,
            )
        )  # fmt: skip
    return found


async def warmth(redis: RedisBytes, settings: Settings, text: str, *, chat: bool) -> list[Warmth]:
    """Of every live worker of the one target, once it beats. Raises NoWorker, SettingsError or ModelError."""
    target = await fleet.find_target(redis, settings.target or "")
    ids = _encode(target, settings, text, chat)
    sizes = {one.worker: one.block_size for one in await _workers(redis, target.id) if one.block_size}
    if not sizes:
        return []
    with translated():
        key = settings.cache_key.get_secret_value().encode() if settings.cache_key else await redis.get(keys.SALT)
        size = max(sizes.values())
        names = block_hashes(ids, size, Salts(redis, key or b"").of(settings.tenant))
        blocks = [short(name) for name in names[: cacheable(len(ids), size)]]
        found = await PrefixIndex(redis, target.id).look(blocks)
    return [Warmth(one.worker, len(ids), one.hit * size, one.queued) for one in found if one.worker in sizes]


async def forget(redis: RedisBytes, target: str, worker: str) -> None:
    """Drop what the index knows of a worker. Raises UsageError for one it does not know."""
    known = {one.worker: one.target for one in await indexed(redis, target)}
    if worker not in known:
        raise UsageError(f"the index knows no worker {worker!r}: `pilotfish cache index` lists them")
    index = PrefixIndex(redis, known[worker])
    with translated():
        await index.register(worker, 1)  # a new epoch fences the worker's own, and it registers again


def _encode(target: fleet.Target, settings: Settings, text: str, chat: bool) -> list[int]:
    """As an agent would, with the draft's tokenizer and the target's template."""
    if all(len(token) == 1 for token in target.vocabulary.tokens):
        return ByteTokenizer().encode(text, chat=chat)
    from pilotfish.cache.llama_context import LlamaModel
    from pilotfish.edge_agent.launch import draft_path

    model = LlamaModel(draft_path(settings), vocab_only=True)
    try:
        return LlamaTokenizer(model, target.vocabulary.chat_template).encode(text, chat=chat)
    finally:
        model.close()
