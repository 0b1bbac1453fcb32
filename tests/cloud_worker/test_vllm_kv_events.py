"""vLLM tells what it caches: a mirror fed with it predicts the cached tokens of every session start, tenants apart."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from contracts.tiny_hf import write_tiny_model

from pilotfish.cache.block_hash import block_hashes, cacheable, short
from pilotfish.cache.block_mirror import BlockMirror
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier
from pilotfish.cloud_worker.engines.vllm_start import BLOCK_SIZE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

VOCAB, CONTEXT, KV_BLOCKS, STARTS = 512, 512, 60, 300


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmVerifier]:
    """Few blocks, so that much is evicted."""
    path = write_tiny_model(tmp_path_factory.mktemp("target"), vocab=VOCAB, context=CONTEXT)
    verifier = VllmVerifier(path, context=CONTEXT, draft_max=4, max_sessions=8, threads=2, kv_blocks=KV_BLOCKS)
    yield verifier
    verifier.close()


class Worker:
    """What a worker does with an engine, as far as its cache is concerned."""

    def __init__(self, engine: VllmVerifier) -> None:
        self.engine, self.mirror, self.count = engine, BlockMirror(), 0

    def listen(self) -> None:
        for change in self.engine.kv_changes():
            getattr(self.mirror, change.kind)(*([change.blocks] if change.kind != "cleared" else []))

    def predict(self, ids: list[int], salt: str) -> int:
        names = block_hashes(ids, BLOCK_SIZE, salt)[: cacheable(len(ids), BLOCK_SIZE)]
        hit = next((i for i, name in enumerate(names) if short(name) not in self.mirror), len(names))
        return hit * BLOCK_SIZE

    def start(self, ids: list[int], salt: str = "", more: int = 0) -> list[VerifyEvent]:
        """A session's first job, to its end; the session is then forgotten or stays resident, by chance."""
        self.count += 1
        request = VerifyRequest(f"r{self.count}", f"s{self.count}", ids, [1, 2], continue_tokens=more, cache_salt=salt)
        self.engine.submit(request)
        events: list[VerifyEvent] = []
        while self.engine.busy:
            events += self.engine.step()
            self.listen()
        if self.count % 3:
            self.engine.forget(request.session)
            self.listen()
        return events


@pytest.fixture
def worker(engine: VllmVerifier) -> Worker:
    one = Worker(engine)
    engine.reset()
    one.listen()
    return one


def held(engine: VllmVerifier) -> dict[bytes, int]:
    """Names in vLLM's own block pool, with how many blocks have each."""
    from vllm.v1.core.kv_cache_utils import get_block_hash

    scheduler: Any = engine._core.scheduler
    table = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache
    count = Counter[bytes]()
    for name, blocks in table.items():
        count[short(get_block_hash(name))] += len(blocks) if isinstance(blocks, dict) else 1
    return dict(count)


def test_predicted_cached_tokens_are_the_engines(worker: Worker) -> None:
    rng, equal, cached = random.Random(3), 0, 0
    talks = [[rng.randrange(VOCAB) for _ in range(rng.randrange(20, 200))] for _ in range(6)]
    for _ in range(STARTS):
        talk = rng.choice(talks)
        salt = rng.choice(("", "a", "b"))
        predicted = worker.predict(talk, salt)
        first, *_ = worker.start(list(talk), salt, rng.randrange(8))
        equal += predicted == first.cached
        cached += first.cached
        talk += [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
        if len(talk) > 400:
            del talk[rng.randrange(10, 100) :]
        assert {name: worker.mirror.blocks(name) for name in worker.mirror} == held(worker.engine)
    assert equal == STARTS
    assert cached > STARTS * BLOCK_SIZE / 2, "or nothing was predicted"
    assert worker.mirror.strays == 0


def test_tenants_share_nothing(worker: Worker) -> None:
    ids = list(range(3 * BLOCK_SIZE + 1))
    assert [worker.start(ids, salt)[0].cached for salt in ("a", "b", "a", "b", "")] == [0, 0, 96, 96, 0]


def test_a_reset_is_told_at_once(worker: Worker) -> None:
    worker.start(list(range(100)))
    assert len(worker.mirror)
    worker.engine.reset()
    worker.listen()
    assert not len(worker.mirror)
