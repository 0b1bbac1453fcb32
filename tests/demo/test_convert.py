from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pilotfish.demo import pair as demo_pair
from pilotfish.demo.convert import convert, ensure_gguf, gguf_name, tensors, widen

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


def tiny_tensors() -> dict[str, tuple[int, ...]]:
    layer = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (64, 64),
        "self_attn.v_proj": (64, 64),
        "self_attn.o_proj": (64, 64),
        "self_attn.q_norm": (64,),
        "self_attn.k_norm": (64,),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
        "input_layernorm": (64,),
        "post_attention_layernorm": (64,),
    }
    named = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    return named | {"model.embed_tokens.weight": (4096, 64), "model.norm.weight": (64,)}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model folder with random bf16 weights, written without torch."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_pair.TARGET_DIR / name, folder / name)
    rest = {"model_type": "qwen3", "head_dim": 64, "intermediate_size": 128, "vocab_size": 4096, "rope_theta": 1e4}
    config = SIZES | rest | {"rms_norm_eps": 1e-6, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    rng, header, body = np.random.default_rng(0), {}, b""
    for name, shape in tiny_tensors().items():
        bits = (rng.normal(0, 0.05, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(body), len(body) + len(bits)]}
        body += bits
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)
    return folder


def test_widen_keeps_every_bf16_number() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    assert np.array_equal(widen(bits).view(np.uint32) >> 16, bits)
    assert widen(np.array([0x3F80, 0xC000], np.uint16)).tolist() == [1.0, -2.0]


def test_f32_file_holds_the_same_numbers(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "tiny.gguf")
    written = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    read = dict(tensors(tiny / "model.safetensors"))
    assert {gguf_name(name) for name in read} == set(written)
    for name, values in read.items():
        assert np.array_equal(values.view(np.uint32), written[gguf_name(name)].reshape(values.shape).view(np.uint32))


def test_unchanged_folder_is_converted_once(tiny: Path, tmp_path: Path) -> None:
    out = ensure_gguf(tiny, tmp_path / "cache" / "tiny.gguf")
    first = out.stat().st_mtime_ns
    assert ensure_gguf(tiny, out).stat().st_mtime_ns == first
    raw = bytearray((tiny / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(raw)
    assert ensure_gguf(tiny, out).stat().st_mtime_ns != first


def test_other_number_types_are_refused(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"BF16", b"F16 ", 1))
    with pytest.raises(ValueError, match="convert it to BF16 or F32"):
        list(tensors(path))


@pytest.mark.llamacpp
@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("folder", [demo_pair.DRAFT_DIR, demo_pair.TARGET_DIR], ids=["draft", "target"])
def test_llama_cpp_and_torch_compute_the_same_logits(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from pilotfish.cache.llama_context import LlamaContext, LlamaModel, Row
    from pilotfish.demo import store
    from pilotfish.demo import tokenizer as tok
    from pilotfish.demo.layout import Layout

    torch.set_num_threads(1)
    convert(folder, tmp_path / "model.gguf")
    ids = tok.load(folder).encode(tok.chat("Add 348 and 57."), add_special_tokens=False).ids
    with torch.inference_mode():
        ours = store.load(folder)(torch.tensor(ids), Layout.of_lengths([len(ids)])).numpy()
    with LlamaModel(tmp_path / "model.gguf") as model, LlamaContext(model, n_ctx=64) as context:
        theirs = np.array(context.decode([Row(token, at, 0, True) for at, token in enumerate(ids)]))
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))
