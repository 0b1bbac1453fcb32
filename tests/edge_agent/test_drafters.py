from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts.tiny_gguf import VOCAB, write_tiny_gguf

from pilotfish.edge_agent.drafters.base import Drafter, drawn_probability
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter
from pilotfish.protocol.errors import EngineError, ModelError, RequestRefused
from pilotfish.protocol.messages import Sampling

GREEDY, WARM = Sampling(), Sampling(temperature=0.8, top_k=50, seed=4)
PROMPT = [5, 17, 99, 4, 150, 33, 8]


def target(prefix: object, position: int, sampling: Sampling) -> int:
    assert isinstance(prefix, list)
    return (17 * position + sum(prefix) + sampling.seed) % 256


def llamacpp_drafter(path: Path, **options: int) -> LlamaCppDrafter:
    return LlamaCppDrafter(path, **({"context": 256, "sessions": 2} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def llama(model_file: Path) -> Iterator[LlamaCppDrafter]:
    with llamacpp_drafter(model_file) as drafter:
        yield drafter


@pytest.fixture(params=["fake", pytest.param("llamacpp", marks=pytest.mark.llamacpp)])
def drafter(request: pytest.FixtureRequest) -> Drafter:
    if request.param == "fake":
        return FakeDrafter(target, context=256)
    found = request.getfixturevalue("llama")
    assert isinstance(found, Drafter)
    return found


# --- every drafter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["T 0", "T 0.8"])
def test_a_draft_is_a_function_of_ids_and_sampling(drafter: Drafter, sampling: Sampling) -> None:
    draft = drafter.draft("a", PROMPT, 8, sampling)
    assert len(draft.ids) == len(draft.confidences) == 8
    assert all(0 <= c <= 1 for c in draft.confidences)
    assert draft.ms > 0
    assert drafter.draft("a", PROMPT, 8, sampling).ids == draft.ids
    assert drafter.draft("b", PROMPT, 8, sampling).ids == draft.ids


def test_drafting_goes_on_where_the_target_left_off(drafter: Drafter) -> None:
    whole = drafter.draft("a", PROMPT, 12, WARM).ids
    assert drafter.draft("b", PROMPT, 4, WARM).ids == whole[:4]
    assert drafter.draft("b", PROMPT + whole[:4], 4, WARM).ids == whole[4:8]
    elsewhere = drafter.draft("c", PROMPT + whole[:6] + [1], 4, WARM).ids
    assert drafter.draft("b", PROMPT + whole[:6] + [1], 4, WARM).ids == elsewhere
    assert drafter.draft("b", PROMPT + whole[:8], 4, WARM).ids == whole[8:12]


def test_no_tokens_asked_for(drafter: Drafter) -> None:
    assert drafter.draft("a", PROMPT, 0, GREEDY).ids == []


def test_a_stop_id_is_drafted_and_ends_the_draft(drafter: Drafter) -> None:
    whole = drafter.draft("a", PROMPT, 8, WARM).ids
    stop = whole[3]
    assert drafter.draft("a", PROMPT, 8, WARM, {stop}).ids == whole[: whole.index(stop) + 1]


def test_the_caller_may_end_a_draft(drafter: Drafter) -> None:
    seen: list[tuple[int, float]] = []

    def proceed(token: int, confidence: float) -> bool:
        seen.append((token, confidence))
        return len(seen) < 3

    draft = drafter.draft("a", PROMPT, 8, WARM, proceed=proceed)
    assert list(zip(draft.ids, draft.confidences, strict=True)) == seen
    assert len(seen) == 3


def test_a_draft_ends_with_the_context(drafter: Drafter) -> None:
    ids = [i % 200 for i in range(250)]
    assert len(drafter.draft("a", ids, 20, GREEDY).ids) == 6
    assert drafter.draft("a", [*ids, 1, 2, 3, 4, 5, 6], 20, GREEDY).ids == []


def test_nothing_to_draft_after(drafter: Drafter) -> None:
    with pytest.raises(RequestRefused, match="at least one token"):
        drafter.draft("a", [], 4, GREEDY)


# --- llama.cpp -----------------------------------------------------------------------------------------------


@pytest.mark.llamacpp
def test_three_sessions_on_two_sequences(model_file: Path) -> None:
    texts = {s: [*PROMPT, i] for i, s in enumerate("abc")}
    with llamacpp_drafter(model_file, sessions=3) as roomy:
        expected = {s: roomy.draft(s, ids, 12, WARM).ids for s, ids in texts.items()}
    with llamacpp_drafter(model_file) as crowded:
        for base in (0, 4, 8):
            for s, ids in texts.items():
                draft = crowded.draft(s, ids + expected[s][:base], 4, WARM)
                assert draft.ids == expected[s][base : base + 4]
                assert draft.prefilled == len(ids) + base  # its sequence went to another in between
        assert crowded.draft("c", texts["c"] + expected["c"], 4, WARM).prefilled == 1


@pytest.mark.llamacpp
def test_only_what_is_missing_is_evaluated(llama: LlamaCppDrafter) -> None:
    draft = llama.draft("a", PROMPT, 4, GREEDY)
    assert draft.prefilled == len(PROMPT)
    accepted = PROMPT + draft.ids
    assert llama.draft("a", [*accepted, 9], 4, GREEDY).prefilled == 2  # the last draft was never evaluated
    assert llama.draft("a", [*accepted[:-2], 9], 4, GREEDY).prefilled == 1
    assert llama.sync("a", [7] * 30) == 30
    assert llama.draft("a", [7] * 30, 1, GREEDY).prefilled == 1
    llama.close_session("a")
    llama.close_session("unknown")
    assert llama.draft("a", [7] * 30, 1, GREEDY).prefilled == 30


@pytest.mark.llamacpp
def test_a_prompt_longer_than_a_batch(model_file: Path) -> None:
    ids = [(3 * i) % 300 for i in range(1300)]
    with llamacpp_drafter(model_file, context=2048) as drafter:
        assert drafter.draft("a", ids, 4, WARM).prefilled == 1300
        whole = drafter.draft("a", ids, 4, WARM).ids
        for i in range(100, 1300, 400):
            drafter.sync("b", ids[:i])
        assert drafter.draft("b", ids, 4, WARM).ids == whole


@pytest.mark.llamacpp
def test_ids_that_cannot_be(llama: LlamaCppDrafter) -> None:
    for ids in ([VOCAB], [-1], [1] * 257):
        with pytest.raises(RequestRefused, match="vocabulary|context"):
            llama.draft("a", ids, 1, GREEDY)


@pytest.mark.llamacpp
def test_a_failed_pass_is_an_error_and_the_session_goes_on(
    llama: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llama.draft("b", PROMPT, 4, WARM).ids

    def fails(rows: object) -> None:
        raise EngineError("llama.cpp could not compute the pass.")

    with monkeypatch.context() as patch:
        patch.setattr(llama._context, "decode", fails)
        with pytest.raises(EngineError, match="could not compute"):
            llama.draft("a", PROMPT, 4, WARM)
    assert llama.draft("a", PROMPT, 4, WARM).ids == expected


@pytest.mark.llamacpp
def test_a_drafter_says_what_it_is(llama: LlamaCppDrafter, model_file: Path, tmp_path: Path) -> None:
    assert (llama.info.engine, llama.info.vocab_size, llama.info.context) == ("llama.cpp", VOCAB, 256)
    with llamacpp_drafter(write_tiny_gguf(tmp_path / "b.gguf", seed=3)) as other:
        assert other.info.fingerprint != llama.info.fingerprint
    with pytest.raises(ModelError, match="no model file"):
        llamacpp_drafter(tmp_path / "x.gguf")


def test_drawn_probability() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7], np.float32))
    assert drawn_probability(logits, 1, 9, GREEDY) == pytest.approx(0.2)
    half = drawn_probability(logits, 2, 9, Sampling(temperature=0.5))
    assert half == pytest.approx(0.49 / 0.54)


# --- fake ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "spread"), [(0.0, 0.0), (0.3, 1.0), (0.8, 0.0), (0.9, 0.5), (1.0, 0.0)])
def test_a_fake_agrees_as_often_as_told(alpha: float, spread: float) -> None:
    drafter = FakeDrafter(target, alpha=alpha, spread=spread, seed=7)
    right = [drafter.draft("a", [i % 256, i // 256], 1, GREEDY) for i in range(4000)]
    agrees = np.array([d.ids[0] == target([i % 256, i // 256], 2, GREEDY) for i, d in enumerate(right)])
    confidence = np.array([d.confidences[0] for d in right])
    assert abs(agrees.mean() - alpha) <= 0.03
    assert abs(confidence.mean() - alpha) <= 0.03
    if spread:
        high = confidence > alpha
        assert abs(agrees[high].mean() - confidence[high].mean()) <= 0.03


def test_fakes_of_one_seed_agree_and_of_two_differ() -> None:
    drafts = [FakeDrafter(target, alpha=0.5, seed=seed).draft("a", PROMPT, 60, GREEDY).ids for seed in (1, 1, 2)]
    assert drafts[0] == drafts[1] != drafts[2]
    assert all(0 <= t < 256 for t in drafts[0])


@pytest.mark.llamacpp
def test_a_prompt_read_in_parts_gives_the_same_draft(llama: LlamaCppDrafter) -> None:
    ids = [(7 * i) % 200 for i in range(100)]
    steps = 0
    while not llama.prefill("parts", ids, 16):
        steps += 1
    drafted = llama.draft("parts", ids, 5, GREEDY)
    assert steps == 6
    assert drafted.prefilled == 1
    assert drafted.ids == llama.draft("whole", ids, 5, GREEDY).ids
