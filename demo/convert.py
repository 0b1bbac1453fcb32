"""Safetensors to GGUF for the demo's qwen3 models, without torch and without transformers.

F32 output is bit-exact: a bf16 number is the upper half of a float32. Knows nothing of training; `ensure_gguf` builds
a file once per content of the model folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONVERTER_VERSION = 1
SOURCES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def widen(raw: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bits to float32, exactly."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def tensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, values) of each tensor of a safetensors file, bf16 widened to float32."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, about in sorted(json.loads(data[8 : 8 + size]).items()):
        if name == "__metadata__":
            continue
        start, end = (8 + size + at for at in about["data_offsets"])
        if about["dtype"] not in ("BF16", "F32"):
            raise ValueError(f"{path.name}: {name} is {about['dtype']}; convert it to BF16 or F32 first")
        raw = data[start:end]
        values = widen(np.frombuffer(raw, np.uint16)) if about["dtype"] == "BF16" else np.frombuffer(raw, np.float32)
        yield name, values.reshape(about["shape"])


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def merge_text(merge: str | list[str]) -> str:
    """A merge as the two parts with a space between, however tokenizer.json spells it."""
    return merge if isinstance(merge, str) else " ".join(merge)


def write_tokenizer(writer: Any, folder: Path) -> None:
    """The vocabulary, merges, special tokens and chat template."""
    from gguf import TokenType

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    about = json.loads((folder / "tokenizer_config.json").read_text())
    special = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    by_id = {i: text for text, i in (tokenizer["model"]["vocab"] | special).items()}
    words = [by_id[i] for i in range(len(by_id))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if word in special else TokenType.NORMAL for word in words])
    writer.add_token_merges([merge_text(m) for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(special[about["eos_token"]])
    writer.add_eot_token_id(special[about["eos_token"]])
    writer.add_bos_token_id(special[about["pad_token"]])
    writer.add_pad_token_id(special[about["pad_token"]])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(about["chat_template"])


def write_shape(writer: Any, config: dict[str, Any]) -> None:
    """The sizes of the network."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def convert(folder: Path, out: Path, kind: str = "f32") -> None:
    """Write the model folder as one GGUF file; `kind` is "f32" (exact) or "f16" (matrices only)."""
    from gguf import GGUFWriter, LlamaFileType

    config = json.loads((folder / "config.json").read_text())
    part = out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")  # containers that share a folder share process ids
    writer = GGUFWriter(str(part), config["model_type"])
    writer.add_name(f"pilotfish-demo-{folder.name}")
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType.MOSTLY_F16)
    write_shape(writer, config)
    write_tokenizer(writer, folder)
    for name, values in tensors(folder / "model.safetensors"):
        writer.add_tensor(gguf_name(name), values.astype(np.float16) if kind == "f16" and values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(out)


def content_hash(folder: Path) -> str:
    """Hash of everything the GGUF file depends on, 16 hex digits."""
    digest = hashlib.sha256(f"convert {CONVERTER_VERSION}".encode())
    for name in SOURCES:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


def ensure_gguf(folder: Path, out: Path, kind: str = "f32") -> Path:
    """`out`, converted anew if it is missing or the folder has changed since."""
    mark, wanted = out.with_suffix(".hash"), f"{content_hash(folder)} {kind}\n"
    if not (out.is_file() and mark.is_file() and mark.read_text() == wanted):
        out.parent.mkdir(parents=True, exist_ok=True)
        convert(folder, out, kind)
        mark.write_text(wanted)
    return out


def main(argv: list[str] | None = None) -> None:
    """Convert one folder."""
    p = argparse.ArgumentParser(prog="python -m pilotfish.demo.convert", description=(__doc__ or "").split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--kind", choices=["f32", "f16"], default="f32")
    args = p.parse_args(argv)
    convert(args.folder, args.out, args.kind)


if __name__ == "__main__":
    main()
