from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts import verifier as contract
from contracts.tiny_gguf import write_tiny_gguf

from pilotfish.cache.llama_context import LlamaModel, Logits, Row
from pilotfish.cloud_worker.engines.base import VerifyRequest
from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier
from pilotfish.protocol.errors import EngineError, ModelError
from pilotfish.protocol.messages import Sampling

pytestmark = pytest.mark.llamacpp


@pytest.fixture(scope="module", params=["f32", "f16"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", half=request.param == "f16")


@pytest.fixture(scope="module")
def engine(model_file: Path) -> Iterator[LlamaCppVerifier]:
    verifier = LlamaCppVerifier(model_file, context=300, draft_max=8, max_sessions=5, threads=1)
    yield verifier
    verifier.close()


class TestContract(contract.ResidentContract):
    """On this engine."""


@pytest.mark.parametrize("sampling", contract.SAMPLINGS.values(), ids=contract.SAMPLINGS)
@pytest.mark.parametrize("drafts", contract.DRAFTS.values(), ids=contract.DRAFTS)
def test_drafts_change_nothing(engine: LlamaCppVerifier, drafts: contract.Drafts, sampling: Sampling) -> None:
    contract.check_drafts_change_nothing(engine, sampling, drafts, n=100)


def test_more_sessions_than_sequences(engine: LlamaCppVerifier) -> None:
    contract.check_many_sessions(engine, 12)


def test_equal_rounds_of_neighbours_are_one_pass(model_file: Path) -> None:
    engine = LlamaCppVerifier(model_file, context=256, draft_max=8, max_sessions=4, threads=1)
    for i in range(4):
        contract.round_(engine, f"s{i}", [*contract.PROMPT, i], [], Sampling())
    before = engine.passes
    for i in range(4):
        engine.submit(VerifyRequest(f"r{i}", f"s{i}", [*contract.PROMPT, i, 7], [1, 2, 3]))
    assert len(engine.step()) == 4
    assert engine.passes == before + 1
    engine.close()


def test_no_pass_computes_one_row_of_a_session(engine: LlamaCppVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row goes through other kernels than two, in rounds, continuations, chunks and beside neighbours alike."""
    decode = engine._context.decode
    alone: list[int] = []

    def watched(rows: list[Row]) -> Logits:
        alone.extend(of for of, count in Counter(row.sequence for row in rows).items() if count < 2)
        assert len(rows) >= engine.model.exact_rows
        return decode(rows)

    monkeypatch.setattr(engine._context, "decode", watched)
    contract.check_drafts_change_nothing(engine, contract.SAMPLINGS["T 1.3"], contract.DRAFTS["random"], n=60)
    contract.check_continuations_share_steps(engine)
    contract.check_long_prefix_beside_rounds(engine)
    contract.check_many_sessions(engine, 8)
    contract.check_context_full(engine)
    assert alone == []


def test_no_residency_computes_every_row_of_every_round(model_file: Path) -> None:
    engine = LlamaCppVerifier(model_file, context=256, draft_max=8, max_sessions=2, threads=1, resident=False)
    first = contract.round_(engine, "s", contract.PROMPT, [], Sampling())
    second = contract.round_(engine, "s", [*contract.PROMPT, *first.draws], [1, 2], Sampling())
    assert (first.cached, second.cached, second.rows) == (0, 0, len(contract.PROMPT) + 1 + 2)
    engine.submit(VerifyRequest("c", "s", contract.PROMPT, [], continue_tokens=5))
    engine.step()
    engine.cancel("c")
    assert contract.round_(engine, "s", contract.PROMPT, [], Sampling()).cached == 0, "nor of one that was cancelled"
    engine.close()


def test_a_failed_pass_ends_its_requests_and_no_others(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LlamaCppVerifier(model_file, context=256, draft_max=8, max_sessions=4, threads=1)
    right = contract.plain(engine, contract.PROMPT, 4, Sampling())
    decode = engine._context.decode
    calls = iter([False, True, False, False, False])

    def flaky(rows: list[object]) -> object:
        if next(calls):
            raise EngineError("llama.cpp could not compute the pass.")
        return decode(rows)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._context, "decode", flaky)
    engine.submit(VerifyRequest("a", "s1", contract.PROMPT, right[:3]))
    engine.submit(VerifyRequest("b", "s2", [1, 2, 3]))
    events = {e.request_id: e for e in engine.step()}
    assert events["a"].draws == right
    assert events["b"].done
    assert events["b"].error == "llama.cpp could not compute the pass."
    assert not engine.busy
    assert contract.round_(engine, "s2", contract.PROMPT, right[:3], Sampling()).draws == right
    engine.close()


def test_unusable_logits_are_an_error_event(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LlamaCppVerifier(model_file, context=256, draft_max=8, max_sessions=2, threads=1)
    nan = np.full((2, engine.info.vocab_size), np.nan, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(engine._context, "decode", lambda rows: nan)
        engine.submit(VerifyRequest("a", "s", [1, 2]))
        (event,) = engine.step()
    assert "unusable" in event.error
    assert contract.round_(engine, "s", [1, 2], [], Sampling()).cached == 0
    engine.close()


def test_fingerprint_follows_the_weights(model_file: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        engine = LlamaCppVerifier(path, context=256, draft_max=4, max_sessions=1, threads=1)
        engine.close()
        return engine.info.fingerprint

    copy = tmp_path / "other name.gguf"
    copy.write_bytes(model_file.read_bytes())
    assert fingerprint(copy) == fingerprint(model_file)
    assert fingerprint(write_tiny_gguf(tmp_path / "b.gguf", seed=1)) != fingerprint(model_file)


def test_a_recurrent_target_is_refused(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "rolls_back", False)
    with pytest.raises(ModelError, match="recurrent"):
        LlamaCppVerifier(model_file, context=256, draft_max=4, max_sessions=1, threads=1)


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        LlamaCppVerifier(tmp_path / "x.gguf", context=256, draft_max=4, max_sessions=1, threads=1)
