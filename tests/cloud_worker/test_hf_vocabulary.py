from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pilotfish.cloud_worker.engines.hf_vocabulary import byte_alphabet, read_vocabulary
from pilotfish.demo.pair import TARGET_DIR
from pilotfish.protocol.errors import ModelError


def folder(path: Path, vocab: dict[str, int], config: dict[str, Any], added: tuple[dict[str, Any], ...] = ()) -> Path:
    tokenizer = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": list(added)}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "hello"}))
    return path


def test_every_byte_has_one_character() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_ids_are_bytes_and_special_tokens_their_names(tmp_path: Path) -> None:
    added = ({"id": 2, "content": "<|end|>"},)
    read = read_vocabulary(folder(tmp_path, {"Ġa": 0, "Ã©": 1}, {"vocab_size": 4, "eos_token_id": 2}, added))
    assert read.tokens == (b" a", "é".encode(), b"<|end|>", b"")
    assert (read.chat_template, read.stop_ids) == ("hello", (2,))


def test_the_demo_target_can_be_read() -> None:
    read = read_vocabulary(TARGET_DIR)
    assert len(read) == 4096
    assert read.stop_ids


@pytest.mark.parametrize(
    ("vocab", "config"),
    [({"▁the": 0}, {"vocab_size": 4}), ({"a": 9}, {"vocab_size": 4}), ({"a": 0}, {"text_config": {}})],
    ids=["sentencepiece", "an id past the end", "no size"],
)
def test_other_tokenizers_are_refused_with_a_sentence(
    tmp_path: Path, vocab: dict[str, int], config: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="not byte-level BPE .*, the only kind pilotfish pairs today"):
        read_vocabulary(folder(tmp_path, vocab, config))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist: a vLLM target is a Hugging Face model directory"):
        read_vocabulary(tmp_path)
