"""The replay behind `bench verify` and `bench capacity` counts what an engine really did, and refuses wrong draws."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pilotfish.bench import capacity, registry, verify
from pilotfish.bench.capacity import Bench, rounds
from pilotfish.bench.capacity_queue import replaying
from pilotfish.bench.piped import Piped
from pilotfish.bench.verifier_child import MODULE, Edge, decode, replay
from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Sampling

PROMPTS = [[3, 1, 4, 1, 5, number] for number in range(5)]
N, K = 40, 4


@pytest.fixture
def engine() -> FakeVerifier:
    return FakeVerifier()


def edges(engine: FakeVerifier, alpha: float) -> list[Edge]:
    texts = decode(engine, PROMPTS, [N] * len(PROMPTS))["texts"]
    coin = random.Random(1)
    return [
        Edge(f"s{i}", prompt, text, [coin.random() < alpha for _ in text], VOCAB)
        for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]


def test_a_replay_commits_every_token_and_counts_what_was_computed(engine: FakeVerifier) -> None:
    found = replay(engine, edges(engine, 1.0), K)
    each = -(-N // (K + 1))
    assert found["tokens"] == N * len(PROMPTS)
    assert (found["steps"], found["batches"]) == (each, [len(PROMPTS)] * each)
    cold = len(PROMPTS[0]) + K
    assert found["round_rows"][:2] == [cold, K + 1]
    assert len(found["round_seconds"]) == len(found["round_drafts"]) == each * len(PROMPTS)


def test_lower_acceptance_costs_more_rounds(engine: FakeVerifier) -> None:
    some, few = (rounds([replay(engine, edges(engine, alpha), K)]) for alpha in (0.9, 0.3))
    assert some["tokens_per_round"] > few["tokens_per_round"]
    assert some["rows_per_token"] < few["rows_per_token"]


def test_draws_that_are_not_the_texts_end_the_benchmark(engine: FakeVerifier) -> None:
    wrong = edges(engine, 1.0)
    wrong[2].text[7] = (wrong[2].text[7] + 1) % VOCAB
    with pytest.raises(EngineError, match=r"session s2 drew"):
        replay(engine, wrong, K)


def test_ratios_are_to_the_best_baseline_of_the_same_block() -> None:
    bench = Bench({})
    bench.speeds.update({("ours", 8): [30.0, 10.0, 10.0], ("a", 8): [10.0, 5.0, 2.0], ("b", 8): [5.0, 10.0, 5.0]})
    assert bench.ratio("ours", ("a", "b"), 8) == 2.0
    assert bench.ratio("ours", ("a", "b"), 32) is None


def test_a_child_says_when_it_cannot_go_on() -> None:
    spec = {"engine": "fake", "model": "", "cores": ""}
    with Piped(MODULE) as child:
        assert child.ask({"do": "open", **spec}) == VOCAB
        texts = child.ask({"do": "decode", "prompts": PROMPTS, "lengths": [9] * 5})["texts"]
        edge = {"session": "s", "prompt": PROMPTS[0], "text": texts[0], "agrees": [True] * 9}
        assert child.ask({"do": "replay", "edges": [edge], "k": K})["tokens"] == 9
        with pytest.raises(EngineError, match="ended: its errors are above"):
            child.ask({"do": "replay", "edges": [{**edge, "text": [1] * 9}], "k": K})


def test_a_replaying_draft_knows_a_text_by_its_prompt() -> None:
    drafter = replaying({(1, 2, 3): [7, 8, 9]}, VOCAB, alpha=1.0)
    assert drafter.draft("s", [1, 2, 3], 2, Sampling()).ids == [7, 8]
    assert drafter.draft("s", [1, 2, 3, 7, 8], 1, Sampling()).ids == [9]


def test_rows_beyond_what_a_round_needs_miss_the_target() -> None:
    seconds: Any = {
        (name, context): [[0.01, 0.01]] * 8
        for name in ("resident", "stateless", "decode", "prompt_logprobs")
        for context in verify.CONTEXTS
    }
    met = {
        excess: {one.name: one.met for one in verify.report({}, seconds, [9, 9 + excess], enough=True).targets}
        for excess in (0, 1)
    }
    assert [met[excess]["rows_per_round_excess"] for excess in (0, 1)] == [True, False]
    assert met[0]["context_cost_ratio_3000"] is True


def test_they_are_listed() -> None:
    assert {"verify", "capacity"} <= set(registry.NAMES)
    assert set(capacity.OWN) == {"ngram", "draft_model"}
