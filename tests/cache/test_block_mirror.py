"""The mirror against a model of an engine's cache, and against vLLM's own block pool for ten thousand random steps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pilotfish.cache.block_hash import short
from pilotfish.cache.block_mirror import BlockMirror

NAMES = st.lists(st.sampled_from([bytes([n]) * 8 for n in range(12)]), max_size=6)


class MirrorMachine(RuleBasedStateMachine):
    """An engine holds names in blocks; a reader is told what changed, in any portions."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror, self.engine, self.reader = BlockMirror(), Counter[bytes](), set[bytes]()

    @rule(names=NAMES)
    def store(self, names: list[bytes]) -> None:
        self.mirror.stored(names)
        self.engine.update(names)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        if held := sorted(self.engine.elements()):
            name = data.draw(st.sampled_from(held))
            self.mirror.removed([name])
            self.engine -= Counter([name])

    @rule()
    def clear(self) -> None:
        self.mirror.cleared()
        self.engine.clear()

    @rule(most=st.integers(1, 8))
    def tell(self, most: int) -> None:
        stored, removed = self.mirror.take(most)
        assert not self.reader & set(stored)
        assert set(removed) <= self.reader
        self.reader = (self.reader | set(stored)) - set(removed)

    @rule()
    def forget(self) -> None:
        self.reader.clear()
        self.mirror.retell()

    @invariant()
    def the_mirror_is_the_engine(self) -> None:
        assert {name: self.mirror.blocks(name) for name in self.mirror} == dict(self.engine)
        assert self.mirror.strays == 0

    @invariant()
    def what_is_untold_is_what_the_reader_has_wrong(self) -> None:
        assert self.mirror.untold == len(self.reader ^ set(self.engine))


TestMirror = MirrorMachine.TestCase


def test_an_eviction_of_what_was_never_stored_is_counted_and_harmless() -> None:
    mirror = BlockMirror()
    mirror.removed([b"never"])
    assert (mirror.strays, len(mirror), mirror.untold) == (1, 0, 0)


# --- against vLLM's block pool -----------------------------------------------------------------------------------

BLOCK, BLOCKS, STEPS = 4, 48, 10_000


class Pool:
    """vLLM's KV cache manager without a model, driven as its scheduler does."""

    def __init__(self) -> None:
        import torch
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        kv_cache_utils.init_none_hash(sha256_cbor)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
        self.kv_cache_manager = KVCacheManager(
            config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=True
        )
        self.hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256_cbor)
        self.running: list[Any] = []
        self.rng, self.made = random.Random(4), 0

    def step(self) -> None:
        """Admit, grow, preempt, finish, evict or reset."""
        kind = self.rng.random()
        if kind < 0.35 or not self.running:
            self.admit()
        elif kind < 0.75:
            self.grow(self.rng.choice(self.running))
        elif kind < 0.85:
            self.finish(self.rng.choice(self.running))
        elif kind < 0.95:
            self.preempt(self.rng.choice(self.running))
        elif kind < 0.98:
            self.kv_cache_manager.evict_blocks({self.rng.randrange(1, BLOCKS) for _ in range(3)})
        else:
            self.reset()

    def admit(self) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        ids = [family := self.rng.randrange(3)] * (BLOCK * self.rng.randrange(1, 5)) + self.noise(family)
        self.made += 1
        request = Request(
            request_id=str(self.made), prompt_token_ids=ids, sampling_params=SamplingParams(max_tokens=99),
            pooling_params=None, block_hasher=self.hasher,
        )  # fmt: skip
        self.schedule(request)

    def noise(self, family: int) -> list[int]:
        return [self.rng.randrange(2) for _ in range(self.rng.randrange(1, BLOCK * 3))] + [family]

    def schedule(self, request: Any) -> None:
        blocks, cached, _ = self.kv_cache_manager.get_computed_blocks(request)
        new = request.num_tokens - cached
        if self.kv_cache_manager.allocate_slots(request, new, cached, blocks) is None:
            return
        request.num_computed_tokens = request.num_tokens
        self.running.append(request)

    def grow(self, request: Any) -> None:
        request.append_output_token_ids([self.rng.randrange(2) for _ in range(self.rng.randrange(1, BLOCK))])
        new = request.num_tokens - request.num_computed_tokens
        if self.kv_cache_manager.allocate_slots(request, new) is None:
            self.preempt(self.rng.choice(self.running))
            return
        request.num_computed_tokens = request.num_tokens

    def finish(self, request: Any) -> None:
        self.kv_cache_manager.free(request)
        self.running.remove(request)

    def preempt(self, request: Any) -> None:
        """As the scheduler: free its blocks, and start over when there is room."""
        self.finish(request)
        request.num_computed_tokens = 0
        if self.rng.random() < 0.5:
            self.schedule(request)

    def reset(self) -> None:
        while self.running:
            self.finish(self.running[0])
        assert self.kv_cache_manager.reset_prefix_cache()

    def holds(self) -> Iterator[bytes]:
        """The name of every cached block, from the pool's own table."""
        from vllm.v1.core.kv_cache_utils import get_block_hash

        for name, blocks in self.kv_cache_manager.block_pool.cached_block_hash_to_block._cache.items():
            for _ in blocks if isinstance(blocks, dict) else (blocks,):
                yield short(get_block_hash(name))


@pytest.mark.vllm
@pytest.mark.slow
def test_the_mirror_equals_vllms_block_pool_after_each_of_ten_thousand_random_steps() -> None:
    from pilotfish.cloud_worker.engines.vllm_kv_events import engine_hashes, watch_scheduler

    engine_hashes([0], 1, "")  # loads vLLM with its deprecations ignored
    pool, mirror, seen = Pool(), BlockMirror(), Counter[str]()
    events = watch_scheduler(pool)
    for _ in range(STEPS):
        pool.step()
        for change in events.take():
            seen[change.kind] += len(change.blocks)
            getattr(mirror, change.kind)(*([change.blocks] if change.kind != "cleared" else []))
        held = Counter(pool.holds())
        assert {name: mirror.blocks(name) for name in mirror} == dict(held)
    assert mirror.strays == 0
    assert min(seen["stored"], seen["removed"]) > 1_000
    assert "cleared" in seen
