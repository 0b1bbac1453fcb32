"""Sequences with a cache, on llama.cpp: what is restored computes the same bits as what was never saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from contracts.tiny_gguf import VOCAB, write_tiny_gguf

from pilotfish.cache.edge_cache import EdgeCache
from pilotfish.cache.llama_context import LlamaContext, LlamaModel, Logits
from pilotfish.cache.llama_sequences import SPARE, Part, Sequences
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.state_folder import StateFolder

pytestmark = pytest.mark.llamacpp
IDS = [(11 * i + i // 7) % VOCAB for i in range(200)]
SYSTEM = IDS[:60]


def other(n: int, salt: int) -> list[int]:
    return [(31 * i + 17 * salt + 5) % VOCAB for i in range(n)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    with LlamaModel(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")) as model:
        yield model


class Rig:
    """Sequences that compute as a drafter or a verifier would; `last` counts what the last call evaluated."""

    def __init__(self, model: LlamaModel, kv: str, cache: EdgeCache | None, sequences: int = 2) -> None:
        self.context = LlamaContext(model, n_ctx=512 + SPARE, sequences=sequences, kv=kv)
        self.sequences = Sequences(self.context, exact=True, cache=cache)
        self.last = 0

    def logits(self, session: str, ids: Sequence[int]) -> Logits:
        """Of the last id, copied."""
        slot = self.sequences.hold(session)
        assert slot is not None
        kept = self.sequences.fit(slot, ids)
        self.last = len(ids) - kept
        ((part, rows),) = self.sequences.evaluate([Part(slot, list(ids[kept:]), 1)])
        assert not part.error
        last: Logits = rows[0].copy()
        return last

    def close(self) -> None:
        self.sequences.close()
        self.context.close()


@pytest.fixture(params=["f32", "f16"])
def kv(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def fresh(model: LlamaModel, kv: str) -> Iterator[Rig]:
    """Computes everything, every time."""
    rig = Rig(model, kv, None)
    yield rig
    rig.close()


@pytest.fixture
def rig(model: LlamaModel, kv: str) -> Iterator[Rig]:
    rig = Rig(model, kv, EdgeCache(10**8))
    yield rig
    rig.close()


def same(rig: Rig, fresh: Rig, session: str, ids: Sequence[int], evaluated: int) -> None:
    found = rig.logits(session, ids)
    assert rig.last == evaluated
    assert np.array_equal(found, fresh.logits("fresh", ids))
    fresh.sequences.forget("fresh")


def test_a_conversation_its_next_turn_and_its_regeneration(rig: Rig, fresh: Rig) -> None:
    same(rig, fresh, "turn 1", IDS[:100], evaluated=100)
    same(rig, fresh, "turn 1", IDS[:120], evaluated=20)
    rig.sequences.forget("turn 1")
    same(rig, fresh, "turn 2", IDS[:150], evaluated=30)
    rig.sequences.forget("turn 2")
    same(rig, fresh, "turn 2 again", IDS[:140], evaluated=1)
    rig.sequences.forget("turn 2 again")
    same(rig, fresh, "turn 1 again", [*IDS[:100], 7], evaluated=1)
    assert rig.sequences.cache
    counted = rig.sequences.cache.statistics
    assert (counted.hits, counted.misses, counted.tokens_saved) == (3, 1, 120 + 139 + 100)
    assert counted.states == 1  # each turn's state replaced the one it began with


def test_a_shared_system_prompt_also_while_it_is_in_use(rig: Rig, fresh: Rig) -> None:
    same(rig, fresh, "a", [*SYSTEM, *other(40, 1)], evaluated=100)
    same(rig, fresh, "b", [*SYSTEM, *other(40, 2)], evaluated=40)
    rig.sequences.forget("a")
    rig.sequences.forget("b")
    same(rig, fresh, "c", [*SYSTEM, *other(30, 3)], evaluated=30)


def test_a_session_whose_sequence_another_took_comes_back(rig: Rig, fresh: Rig) -> None:
    texts = {session: other(80, salt) for salt, session in enumerate("abc")}
    for session, ids in texts.items():
        same(rig, fresh, session, ids, evaluated=80)
    for session, ids in texts.items():
        same(rig, fresh, session, [*ids, 9, 8], evaluated=2)


def test_states_from_disk_compute_the_same_after_a_restart(
    model: LlamaModel, kv: str, fresh: Rig, tmp_path: Path
) -> None:
    build = ModelBuild.of(model.path, kv)

    def cache() -> EdgeCache:
        return EdgeCache(10**8, StateFolder(tmp_path, build, model="tiny", context=512, budget_bytes=10**8))

    before = Rig(model, kv, cache())
    before.logits("a", IDS[:100])
    before.close()
    after = Rig(model, kv, cache())
    same(after, fresh, "b", IDS[:130], evaluated=30)
    after.close()


def test_without_a_cache_everything_is_computed_and_nothing_kept(fresh: Rig) -> None:
    fresh.logits("a", IDS[:100])
    fresh.sequences.forget("a")
    fresh.logits("b", IDS[:100])
    assert fresh.last == 100


def test_states_that_do_not_fit_are_dropped_and_computed(rig: Rig, fresh: Rig) -> None:
    cache = rig.sequences.cache
    assert cache
    rig.logits("a", other(90, 1))
    shorter = rig.context.state(0)
    cache.save(IDS[:120], lambda: memoryview(b"rubbish" * 99), closing=False)
    cache.save([*IDS[:60], *other(60, 2)], lambda: shorter, closing=False)
    assert cache.statistics.states == 2
    same(rig, fresh, "b", IDS[:140], evaluated=140)
    assert (cache.statistics.states, cache.statistics.bytes, cache.statistics.misses) == (0, 0, 2)


def test_a_state_longer_than_the_context_is_no_harm(model: LlamaModel) -> None:
    cache = EdgeCache(10**8)
    large = Rig(model, "f16", cache, sequences=1)
    large.logits("a", [*IDS, *other(200, 4)])
    state = large.context.state(0)
    large.sequences.cache = None
    large.close()
    small = LlamaContext(model, n_ctx=256, kv="f16")
    sequences = Sequences(small, exact=True, cache=cache)
    cache.save([*IDS, *other(200, 4)], lambda: state, closing=False)
    slot = sequences.hold("b")
    assert slot
    assert sequences.fit(slot, IDS) == 0
    assert small.length(slot.sequence) == 0
    small.close()


def test_a_model_that_cannot_roll_back_gets_no_cache(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "rolls_back", False)
    rig = Rig(model, "f16", EdgeCache(10**8))
    rig.logits("a", IDS[:100])
    rig.sequences.forget("a")
    rig.logits("b", IDS[:100])
    assert rig.last == 100
    rig.close()


def test_any_order_of_sessions_computes_the_same(model: LlamaModel, kv: str, fresh: Rig) -> None:
    """Sessions that branch off each other's texts, come and go, on two sequences and memory for a few states."""
    random = Random(5)
    rig = Rig(model, kv, EdgeCache(400_000))
    texts = [IDS[:50], other(50, 9)]
    for step in range(60):
        trunk = random.choice(texts)
        ids = trunk[: random.randrange(1, len(trunk) + 1)] + other(random.randrange(1, 60), step)
        ids = ids[:400]
        texts.append(ids)
        session = f"s{random.randrange(4)}"
        assert np.array_equal(rig.logits(session, ids), fresh.logits("fresh", ids))
        fresh.sequences.forget("fresh")
        if random.random() < 0.4:
            rig.sequences.forget(session)
    cache = rig.sequences.cache
    assert cache
    counted = cache.statistics
    assert min(counted.hits, counted.misses, counted.evictions) > 3
    assert counted.bytes <= 400_000
    rig.close()
