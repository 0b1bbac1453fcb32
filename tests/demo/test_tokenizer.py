from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from pilotfish.demo import corpus, tasks
from pilotfish.demo import pair as demo_pair

tokenizers = pytest.importorskip("tokenizers")

PIECES = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\x85", "\u2028", "a", "1", "'S", "'ll", ".", "é", "👍🏽"]
MARKERS = ["<|end|>", "<|user|>", "<|endoftext|>", "<|im_end|>", "<|", "|>"]


def random_unicode(rng: Random) -> str:
    ranges = [
        (1, 0x80),
        (0xA0, 0x250),
        (0x370, 0x530),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1F700),
        (0x1, 0x3000),
        (1, 0x20000),
    ]
    points = [rng.randrange(*rng.choice(ranges)) for _ in range(rng.randrange(1, 30))]
    return "".join(chr(c) for c in points if not 0xD800 <= c < 0xE000)


def strings(n: int) -> Iterator[str]:
    rng, sources = Random(1), corpus.texts(evaluation=True)
    kinds: list[Callable[[], str]] = [
        lambda: random_unicode(rng),
        lambda: corpus.passage(rng, rng.choice(sources), rng.randrange(5, 300)),
        lambda: tasks.draw_any(rng)[1].prompt,
        lambda: "".join(rng.choice(PIECES + MARKERS) for _ in range(rng.randrange(1, 25))),
        lambda: "".join(rng.choice("aA1 .,'\"\n\té中😀<|>") for _ in range(rng.randrange(1, 40))),
    ]
    yield from (kinds[i % len(kinds)]() for i in range(n))


def test_digits_are_single_tokens() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_pair.TARGET_DIR / "tokenizer.json"))
    assert tokenizer.encode("x 4096").tokens[-4:] == list("4096")


def test_both_models_have_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (demo_pair.TARGET_DIR / name).read_bytes() == (demo_pair.DRAFT_DIR / name).read_bytes()


def test_every_string_survives_decoding() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_pair.TARGET_DIR / "tokenizer.json"))
    for text in strings(500):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.llamacpp
@pytest.mark.slow
def test_llama_cpp_tokenizes_ten_thousand_strings_alike(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    from pilotfish.demo.convert import convert

    convert(demo_pair.DRAFT_DIR, tmp_path / "draft.gguf")
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(tmp_path / "draft.gguf").encode(), parameters)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_pair.DRAFT_DIR / "tokenizer.json"))

    def llama_ids(text: str) -> list[int]:
        raw = text.encode()
        room = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, True)
        return list(room[:n])

    differ = [s for s in strings(10_000) if llama_ids(s) != tokenizer.encode(s, add_special_tokens=False).ids]
    llama_cpp.llama_model_free(model)
    assert differ == []
