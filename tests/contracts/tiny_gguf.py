"""A random qwen3 model of 320 tokens as a GGUF file, written in milliseconds: tests of llama.cpp need no trained one.

Its logits are spread widely enough that every prefix has its own next token. Needs numpy and gguf, not torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2, 2, 1, 32, 2048
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB = 320


def write_tiny_gguf(path: Path, seed: int = 0, half: bool = False, hidden: int = 64, split: int = 0) -> Path:
    """Write the model and return `path`; `half` stores its matrices as F16, K-quants need `hidden` 256.

    `split` tensors go into each file; returned is the first of them.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "qwen3", split_max_tensors=split)
    writer.add_name(f"tiny-{seed}")
    _write_shape(writer, hidden)
    _write_vocabulary(writer)
    for name, values in _tensors(np.random.default_rng(seed), hidden):
        writer.add_tensor(name, values.astype(np.float16) if half and values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else path


def _write_shape(writer: Any, hidden: int) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)


def _write_vocabulary(writer: Any) -> None:
    """Special tokens, the 256 bytes, and merges of a space with letters and letters with letters."""
    from gguf import TokenType

    letters = "etaoinshrdlcumwfgypbvk"
    merges = [f"Ġ {a}" for a in letters] + [f"{a} {b}" for a in "thaeio" for b in "nrste"] + ["l l", "d s"]
    words = SPECIAL + _byte_names() + [m.replace(" ", "") for m in merges]
    words += [f"<|unused{i}|>" for i in range(VOCAB - len(words))]
    control = len(SPECIAL) + 256 + len(merges)
    kinds = [TokenType.CONTROL if i < len(SPECIAL) or i >= control else TokenType.NORMAL for i in range(VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(SPECIAL.index("<|end|>"))
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)


def _byte_names() -> list[str]:
    """GPT-2's printable name of every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


def _tensors(rng: np.random.Generator, hidden: int) -> list[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def ones(n: int) -> Any:
        return np.ones(n, np.float32)

    out = [("token_embd.weight", matrix(VOCAB, hidden, 8.0)), ("output_norm.weight", ones(hidden))]
    out.append(("output.weight", matrix(VOCAB, hidden, 3.0)))
    for i in range(LAYERS):
        blk = f"blk.{i}."
        out += [
            (blk + "attn_norm.weight", ones(hidden)),
            (blk + "attn_q.weight", matrix(HEADS * HEAD_DIM, hidden)),
            (blk + "attn_k.weight", matrix(KV_HEADS * HEAD_DIM, hidden)),
            (blk + "attn_v.weight", matrix(KV_HEADS * HEAD_DIM, hidden)),
            (blk + "attn_output.weight", matrix(hidden, HEADS * HEAD_DIM, 4.0)),
            (blk + "attn_q_norm.weight", ones(HEAD_DIM)),
            (blk + "attn_k_norm.weight", ones(HEAD_DIM)),
            (blk + "ffn_norm.weight", ones(hidden)),
            (blk + "ffn_gate.weight", matrix(2 * hidden, hidden, 2.0)),
            (blk + "ffn_up.weight", matrix(2 * hidden, hidden, 2.0)),
            (blk + "ffn_down.weight", matrix(hidden, 2 * hidden)),
        ]
    return out
