from __future__ import annotations

import pytest
from contracts import verifier as contract

from pilotfish.cloud_worker.engines.base import Verifier, VerifyRequest
from pilotfish.cloud_worker.engines.fake import FakeVerifier, fake_target
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Sampling


@pytest.fixture
def engine() -> FakeVerifier:
    return FakeVerifier(context=256, draft_max=8)


class TestContract(contract.ResidentContract):
    """On this engine."""


@pytest.mark.parametrize("sampling", contract.SAMPLINGS.values(), ids=contract.SAMPLINGS)
@pytest.mark.parametrize("drafts", contract.DRAFTS.values(), ids=contract.DRAFTS)
def test_drafts_change_nothing(engine: Verifier, drafts: contract.Drafts, sampling: Sampling) -> None:
    contract.check_drafts_change_nothing(engine, sampling, drafts, n=200)


def test_more_sessions_than_are_kept(engine: Verifier) -> None:
    contract.check_many_sessions(engine, 70)


def test_the_target_is_a_function_of_prefix_sampling_and_seed() -> None:
    prefix, warm = [1, 2, 3], Sampling(temperature=0.5, seed=9)
    assert fake_target(prefix, 3, warm, 1 << 30) == fake_target(list(prefix), 3, warm, 1 << 30)
    others = [
        fake_target([1, 2, 4], 3, warm, 1 << 30),
        fake_target(prefix, 3, Sampling(temperature=0.5, seed=8), 1 << 30),
        fake_target(prefix, 3, Sampling(temperature=0.6, seed=9), 1 << 30),
    ]
    assert fake_target(prefix, 3, warm, 1 << 30) not in others
    greedy = [fake_target(prefix, 3, Sampling(seed=s), 1 << 30) for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_a_flipping_worker_disagrees_at_its_rate_and_is_still_deterministic() -> None:
    flips = [FakeVerifier(flip_rate=0.1, flip_seed=seed, vocab=1 << 20) for seed in (1, 1, 2)]
    texts = []
    for engine in flips:
        differ = 0
        text = []
        for i in range(500):
            draw = contract.round_(engine, "s", [i], [], Sampling()).draws[0]
            differ += draw != fake_target([i], 1, Sampling(), 1 << 20)
            text.append(draw)
        assert 25 <= differ <= 85
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]


def test_chosen_failures() -> None:
    faults: dict[str, str | Exception] = {"a": "The engine hiccuped; try again.", "b": EngineError("The engine died.")}
    engine = FakeVerifier(fail_on=lambda request: faults.get(request.request_id))
    engine.submit(VerifyRequest("a", "s1", [1]))
    engine.submit(VerifyRequest("c", "s2", [1]))
    events = {e.request_id: e for e in engine.step()}
    assert events["a"].error == "The engine hiccuped; try again."
    assert events["a"].done
    assert events["c"].draws == [fake_target([1], 1, Sampling())]
    engine.submit(VerifyRequest("b", "s1", [1]))
    with pytest.raises(EngineError, match="died"):
        engine.step()
    assert not engine.busy
