"""The tokenizer both models share: byte-level BPE with Qwen2's split, so that digits are single tokens.

The pattern is the one llama.cpp runs for `tokenizer.ggml.pre = qwen2`; no normalizer, because llama.cpp has none.
Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pilotfish.demo import corpus, tasks

VOCAB_SIZE = 4096
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
END_OF_TEXT, USER, ASSISTANT, END, SYSTEM = range(5)
SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": False,
    "model_max_length": 8192,
    "chat_template": CHAT_TEMPLATE,
}


def chat(prompt: str) -> str:
    """One user turn and the opening of the answer."""
    return f"<|user|>{prompt}<|end|><|assistant|>"


def training_text(seed: int = 1, n_tasks: int = 12000) -> Iterable[str]:
    """The text the merges are learnt from: the library's sources and some tasks."""
    yield from corpus.texts()
    rng = Random(seed)
    for _ in range(n_tasks):
        _, task = tasks.draw_any(rng)
        yield task.prompt
        yield task.answer


def train() -> Tokenizer:
    """Learn the merges (about half a minute)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[*SPECIAL], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(training_text(), learner)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
