"""A trained model as a Hugging Face folder, and back: bf16 safetensors, configs, the tokenizer beside them.

Knows nothing of GGUF (`convert.py`) and nothing of training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pilotfish.demo import tokenizer as tok
from pilotfish.demo.model import LanguageModel
from pilotfish.demo.shape import Shape


def config_of(shape: Shape) -> dict[str, object]:
    """The config.json that transformers and vLLM read."""
    rest = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": tok.END,
        "pad_token_id": tok.END_OF_TEXT,
    }
    return rest | shape.to_dict()


def save(model: LanguageModel, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors; the tokenizer is the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"eos_token_id": [tok.END, tok.END_OF_TEXT], "pad_token_id": tok.END_OF_TEXT, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(config_of(model.shape), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the shared tokenizer beside a model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def load(folder: Path) -> LanguageModel:
    """The model of a folder, in float32."""
    config = json.loads((folder / "config.json").read_text())
    model = LanguageModel(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    model.load_state_dict({name: t.float() for name, t in load_file(str(folder / "model.safetensors")).items()})
    return model.eval()
