"""Which KV blocks vLLM stores and evicts, read in its own process. Pinned to vLLM 0.32.0.

The scheduler hands its block pool's events to a publisher after every step; assigning ours gives them in order, without
ZMQ. Events carry token ids and the tenant's salt: only the ends of the hashes leave this module. An engine
without work publishes nothing (a reset waits for the next request), so `take` asks the pool too. Follows
vllm/v1/core/block_pool.py, vllm/v1/core/sched/scheduler.py (`update_from_output`) and vllm/distributed/kv_events.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pilotfish.cache.block_hash import SHORT_BYTES, check_engine, short
from pilotfish.cloud_worker.engines.base import KvChange

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore


class KvEvents:
    """A `vllm.distributed.kv_events.EventPublisher` that keeps the events until they are taken."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager  # vllm.v1.core.kv_cache_manager.KVCacheManager
        self._events: list[Any] = []

    def publish(self, batch: Any) -> None:
        """Called by the scheduler at the end of a step."""
        self._events.extend(batch.events)

    def shutdown(self) -> None:
        """Called by the scheduler: nothing to close."""

    def get_publisher_config(self) -> None:
        """Asked by the engine core's handshake: there is no endpoint."""

    def take(self) -> list[KvChange]:
        """What changed since the last call, in order."""
        events, self._events = [*self._events, *self._manager.take_events()], []
        return [_change(event) for event in events if getattr(event, "group_idx", None) in (None, 0)]


def _change(event: Any) -> KvChange:
    """Names only. One KV cache group is all an attention-only model has."""
    from vllm.distributed.kv_events import BlockRemoved, BlockStored

    if isinstance(event, BlockStored):
        return KvChange("stored", _names(event))
    if isinstance(event, BlockRemoved):
        return KvChange("removed", _names(event))
    return KvChange("cleared")


def _names(event: Any) -> tuple[bytes, ...]:
    """An event's hashes are bytes or, by VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES (the default), their last 64 bits."""
    return tuple(
        name.to_bytes(SHORT_BYTES, "big") if isinstance(name, int) else short(name) for name in event.block_hashes
    )


def watch(core: EngineCore) -> KvEvents:
    """Read a core's block events from now on; call it before the first request.

    Raises EngineError when the engine names blocks otherwise than `cache/block_hash.py` does.
    """
    check_engine(engine_hashes)
    scheduler: Any = core.scheduler
    return watch_scheduler(scheduler)


def watch_scheduler(scheduler: Any) -> KvEvents:
    """The same for a scheduler, or whatever has a `kv_cache_manager`."""
    manager = scheduler.kv_cache_manager
    manager.block_pool.enable_kv_cache_events = True
    scheduler.kv_event_publisher = events = KvEvents(manager)
    return events


def kv_blocks(core: EngineCore) -> int:
    """How many blocks the engine's cache has; one of them is never used."""
    scheduler: Any = core.scheduler
    return int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1


def engine_hashes(ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """The names vLLM itself gives the blocks of `ids`, with `prefix_caching_hash_algo="sha256_cbor"`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's and torch's own deprecations, while they load
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.request import Request
    kv_cache_utils.init_none_hash(sha256_cbor)  # as EngineCore does; another seed would show up in the comparison
    hasher = kv_cache_utils.get_request_block_hasher(block_size, sha256_cbor)
    request = Request(
        request_id="hashes", prompt_token_ids=list(ids), sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None, cache_salt=salt or None, block_hasher=hasher,
    )  # fmt: skip
    return list(request.block_hashes)
