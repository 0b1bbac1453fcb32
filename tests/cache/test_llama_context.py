from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts.tiny_gguf import VOCAB, write_tiny_gguf

from pilotfish.cache.llama_context import LlamaContext, LlamaModel, Logits, Row
from pilotfish.cache.llama_sequences import SPARE, Part, Sequences
from pilotfish.protocol.errors import EngineError, ModelError

pytestmark = pytest.mark.llamacpp
IDS = [(11 * i + i // 7) % VOCAB for i in range(120)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(model_file: Path) -> Iterator[LlamaModel]:
    with LlamaModel(model_file) as model:
        yield model


@pytest.fixture
def context(model: LlamaModel) -> Iterator[LlamaContext]:
    with LlamaContext(model, n_ctx=256, sequences=4, n_batch=128, outputs=40) as context:
        yield context


def decode(context: LlamaContext, ids: list[int], start: int = 0, sequence: int = 0) -> np.ndarray:
    """Logits of every row, copied."""
    return context.decode([Row(t, start + i, sequence, True) for i, t in enumerate(ids)]).copy()


def evaluate(sequences: Sequences, *parts: Part) -> list[np.ndarray]:
    """Logits of each part in the order given, copied."""
    found = {id(part): logits.copy() for part, logits in sequences.evaluate(parts)}
    return [found[id(part)] for part in parts]


# --- the model file ------------------------------------------------------------------------------------------


def test_what_a_file_says(model: LlamaModel) -> None:
    assert (model.architecture, model.name, model.n_ctx_train) == ("qwen3", "tiny-0", 2048)
    assert model.vocab_size == VOCAB == len(model.token_bytes)
    assert model.eos_id == 3
    assert model.eog_ids >= {3}
    assert model.rolls_back
    assert model.metadata("no.such.key") is None


def test_text_there_and_back(model: LlamaModel) -> None:
    for text in ("the rest", " a  b\n", "naïve – 12 € 🐟", ""):
        ids = model.tokenize(text)
        assert model.detokenize(ids) == text
    fish = model.tokenize("🐟")
    assert b"".join(model.piece(i) for i in fish) == "🐟".encode()
    assert model.detokenize(fish[:1]) == "\ufffd"


def test_special_tokens_are_parsed_only_when_asked(model: LlamaModel) -> None:
    assert model.tokenize("<|user|>a<|end|>", special=True)[::2] == [1, 3]
    assert not {1, 3} & set(model.tokenize("<|user|>a<|end|>"))
    assert model.detokenize([1, *model.tokenize("a"), 3]) == "a"
    assert model.detokenize([1], special=True) == "<|user|>"


def test_chat_template(model: LlamaModel) -> None:
    assert model.apply_chat_template("hi") == "<|user|>hi<|end|><|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert model.apply_chat_template(turns) == "<|user|>a<|end|><|assistant|>b<|end|><|assistant|>"


def test_the_vocabulary_alone(model: LlamaModel, model_file: Path) -> None:
    with LlamaModel(model_file, vocab_only=True) as vocabulary:
        assert vocabulary.token_bytes == model.token_bytes
        assert vocabulary.apply_chat_template("x") == model.apply_chat_template("x")


def test_a_split_file_is_one_model_and_its_digest_is_of_all_parts(context: LlamaContext, tmp_path: Path) -> None:
    first = write_tiny_gguf(tmp_path / "tiny.gguf", split=12)
    *_, last = parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert (first, len(parts)) == (parts[0], 3)
    with LlamaModel(first) as split:
        with LlamaContext(split, n_ctx=256, sequences=1, n_batch=128, outputs=40) as same:
            assert np.array_equal(decode(same, IDS[:40]), decode(context, IDS[:40]))
        before = split.digest
        last.write_bytes(last.read_bytes()[:-1] + b"!")
        assert split.digest != before
        last.unlink()
        with pytest.raises(ModelError, match="There is no model file at .*-00003-of-00003"):
            _ = split.digest


def test_digest_is_of_the_content(model: LlamaModel, tmp_path: Path) -> None:
    with LlamaModel(write_tiny_gguf(tmp_path / "same.gguf")) as same:
        assert same.digest == model.digest
    with LlamaModel(write_tiny_gguf(tmp_path / "other.gguf", seed=5)) as other:
        assert other.digest != model.digest


def test_files_that_are_no_models(model_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    with pytest.raises(ModelError, match="no model file"):
        LlamaModel(bad)
    bad.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ModelError, match="not a GGUF"):
        LlamaModel(bad)
    whole = model_file.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 10):
        bad.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be loaded"):
            LlamaModel(bad)
    with pytest.raises(ModelError, match="cannot be read"):
        LlamaModel(tmp_path)


def test_nothing_on_stderr(model_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaModel(model_file) as model, LlamaContext(model, n_ctx=256) as context:
        decode(context, IDS[:4])
    assert capfd.readouterr() == ("", "")


# --- the context ---------------------------------------------------------------------------------------------


def test_logits_come_in_the_order_of_the_rows(context: LlamaContext) -> None:
    rows = [Row(t, i, 0, i in (2, 5, 6)) for i, t in enumerate(IDS[:8])]
    some = context.decode(rows).copy()
    context.remove(0, 0)
    assert np.array_equal(some, decode(context, IDS[:8])[[2, 5, 6]])
    assert some.shape == (3, VOCAB)
    assert (context.passes, context.rows) == (2, 16)


def test_rolling_back_leaves_no_trace(context: LlamaContext) -> None:
    decode(context, IDS[:20])
    expected = decode(context, IDS[20:25], 20)
    for wrong in ([1, 2, 3, 4, 5], [9] * 20):
        assert context.remove(0, 20)
        decode(context, wrong, 20)
    assert context.remove(0, 20)
    assert context.length(0) == 20
    assert np.array_equal(decode(context, IDS[20:25], 20), expected)


def test_state_and_copy_restore_the_same_bits(context: LlamaContext) -> None:
    decode(context, IDS[:30])
    state = context.state(0)
    expected = decode(context, IDS[30:34], 30)
    context.set_state(2, state)
    assert context.length(2) == 30
    assert np.array_equal(decode(context, IDS[30:34], 30, 2), expected)
    context.copy(2, 3)
    assert context.remove(3, 30)
    assert np.array_equal(decode(context, IDS[30:34], 30, 3), expected)


def test_a_state_that_does_not_fit(context: LlamaContext) -> None:
    decode(context, IDS[:30])
    for state in (b"", b"rubbish" * 50, context.state(0)[:-100]):
        with pytest.raises(EngineError, match="does not fit"):
            context.set_state(1, state)
        assert context.length(1) == 0
    assert np.isfinite(decode(context, IDS[:2], 0, 1)).all()


def test_a_full_cache_is_an_error_with_a_sentence(context: LlamaContext) -> None:
    for start in range(0, 256, 64):
        context.decode([Row(1, start + i, 0, False) for i in range(64)])
    with pytest.raises(EngineError, match="full"):
        decode(context, [1, 2], 256)
    assert np.isfinite(decode(context, [1, 2], 0, 1)).all()


def test_impossible_passes_are_refused(context: LlamaContext) -> None:
    with pytest.raises(EngineError, match="rows"):
        context.decode([])
    with pytest.raises(EngineError, match="128 rows"):
        context.decode([Row(1, i, 0, False) for i in range(129)])
    with pytest.raises(EngineError, match="40 rows of logits"):
        decode(context, [1] * 41)
    with pytest.raises(EngineError, match="could not compute"):
        decode(context, [VOCAB])
    decode(context, IDS[:5])
    with pytest.raises(EngineError, match="could not compute"):
        decode(context, [1], start=7)


# --- sequences -----------------------------------------------------------------------------------------------


@pytest.fixture
def sequences(context: LlamaContext) -> Sequences:
    return Sequences(context, exact=True)


def slot_of(sequences: Sequences, session: str):  # type: ignore[no-untyped-def]
    slot = sequences.hold(session)
    assert slot is not None
    return slot


def write_kind(path: Path, kind: str) -> Path:
    """A model of one kind of numbers; the quantised ones are made by llama.cpp itself."""
    if kind in ("f32", "f16"):
        return write_tiny_gguf(path, half=kind == "f16")
    plain = write_tiny_gguf(path.with_suffix(".plain"), hidden=256)
    with LlamaModel(plain) as model:
        library = model._lib
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = {"q8_0": 7, "q4_k": 14}[kind], 1
    assert library.llama_model_quantize(str(plain).encode(), str(path).encode(), params) == 0
    return path


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k"])
def test_the_same_bits_in_any_company(tmp_path: Path, kind: str) -> None:
    """Row by row, in one pass, in chunks, beside neighbours of other lengths: the logits are equal, not close."""
    model = LlamaModel(write_kind(tmp_path / "m.gguf", kind))
    assert model.exact_rows == (8 if kind == "q4_k" else 2)
    context = LlamaContext(model, n_ctx=256, sequences=4, n_batch=128, outputs=64)
    sequences = Sequences(context, exact=True)
    together = slot_of(sequences, "together")
    (expected,) = evaluate(sequences, Part(together, IDS[:20], 20))
    alone = slot_of(sequences, "alone")
    single = [evaluate(sequences, Part(alone, [t], 1))[0][0] for t in IDS[:20]]
    assert np.array_equal(expected, single)
    a, b = slot_of(sequences, "a"), slot_of(sequences, "b")
    for sizes in ((1, 4), (7, 2), (3, 3), (1, 1), (5, 10), (3, 0)):
        parts = [Part(s, IDS[len(s.ids) : len(s.ids) + n], n) for s, n in zip((a, b), sizes, strict=True) if n]
        for part, logits in zip(parts, evaluate(sequences, *parts), strict=True):
            end = len(part.slot.ids)
            assert np.array_equal(logits, expected[end - part.wanted : end])
    assert a.ids == b.ids == together.ids == IDS[:20]
    for wanted in (1, 2, 19):
        sequences.trim(a, 0)
        (logits,) = evaluate(sequences, Part(a, IDS[:20], wanted))
        assert np.array_equal(logits, expected[-wanted:])
    context.close()
    model.close()


def test_padding_is_removed(sequences: Sequences, context: LlamaContext) -> None:
    slot = slot_of(sequences, "a")
    part = Part(slot, [5], 1)
    evaluate(sequences, part)
    assert (context.length(slot.sequence), part.computed, context.rows) == (1, 2, 2)


def test_small_passes_are_padded_in_rows_and_in_logits(
    model: LlamaModel, context: LlamaContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaModel, "exact_rows", 8)
    passes: list[list[Row]] = []
    decode = context.decode

    def noted(rows: list[Row]) -> Logits:
        passes.append(rows)
        return decode(rows)

    monkeypatch.setattr(context, "decode", noted)
    sequences = Sequences(context, exact=True)
    a, b, c = (slot_of(sequences, s) for s in "abc")
    evaluate(sequences, Part(a, IDS[:1], 1))
    evaluate(sequences, Part(a, IDS[:30], 1), Part(b, IDS[:28], 0))
    evaluate(sequences, Part(c, IDS[:30], 0))
    evaluate(sequences, Part(a, IDS[:2], 2), Part(b, IDS[:1], 1), Part(c, IDS[:2], 1))
    sizes = [(len(rows), sum(row.wanted for row in rows)) for rows in passes]
    assert sizes == [(8, 8), (60, 8), (30, 0), (9, 8)]
    assert [len(s.ids) for s in (a, b, c)] == [context.length(s.sequence) for s in (a, b, c)] == [33, 29, 32]


def test_neighbours_share_a_pass_when_little_padding_is_wasted(sequences: Sequences, context: LlamaContext) -> None:
    slots = [slot_of(sequences, s) for s in "abcd"]
    evaluate(sequences, *[Part(s, IDS[:n], 2) for s, n in zip(slots, (4, 5, 4, 6), strict=True)])
    assert (context.passes, context.rows) == (1, 24)
    evaluate(sequences, Part(slots[0], IDS[:3], 1), Part(slots[2], IDS[:3], 1))
    assert context.passes == 3
    evaluate(sequences, Part(slots[0], IDS[:3], 1), Part(slots[1], IDS[:40], 1))
    assert context.passes == 5


def test_the_least_recently_used_sequence_makes_room(sequences: Sequences) -> None:
    for session in "abcd":
        evaluate(sequences, Part(slot_of(sequences, session), IDS[:3], 1))
    sequences.hold("a")
    assert sequences.hold("e", busy={"b"}) is not None
    assert [s in sequences for s in "abcde"] == [True, True, False, True, True]
    assert slot_of(sequences, "e").ids == []
    assert sequences.hold("f", busy=set("abde")) is None
    sequences.forget("d")
    assert sequences.hold("f", busy=set("abe")) is not None


def test_fit_keeps_the_common_prefix_and_leaves_a_token_to_compute(sequences: Sequences) -> None:
    slot = slot_of(sequences, "a")
    evaluate(sequences, Part(slot, IDS[:10], 1))
    assert sequences.fit(slot, IDS[:20]) == 10
    assert sequences.fit(slot, [*IDS[:6], 1, 2]) == 6
    assert sequences.fit(slot, IDS[:6]) == 5
    assert sequences.fit(slot, [319, 318]) == 0


def test_memory_that_cannot_forget_a_part_forgets_everything(
    sequences: Sequences, context: LlamaContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_of(sequences, "a")
    evaluate(sequences, Part(slot, IDS[:10], 1))
    remove = context.remove
    monkeypatch.setattr(context, "remove", lambda sequence, start: start <= 0 and remove(sequence, start))
    assert sequences.fit(slot, IDS[:6]) == 0
    assert context.length(slot.sequence) == 0


def test_padding_fits_behind_a_full_context(model: LlamaModel) -> None:
    with LlamaContext(model, n_ctx=256 + SPARE) as context:
        assert context.n_ctx >= 256 + SPARE
        sequences = Sequences(context, exact=True)
        slot = slot_of(sequences, "a")
        evaluate(sequences, Part(slot, [1] * 255, 1))
        assert np.isfinite(evaluate(sequences, Part(slot, [1], 1))[0]).all()
