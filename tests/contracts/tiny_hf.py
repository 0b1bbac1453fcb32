"""A random Qwen3 on disk, as vLLM loads it, with weights large enough that its text wanders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


def write_tiny_model(folder: Path, *, vocab: int, context: int) -> Path:
    """Two layers, float32, the same for the same sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(5)
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=context,
            initializer_range=0.15,
            tie_word_embeddings=False,
            eos_token_id=3,
        )
        model: Any = Qwen3ForCausalLM
        model(config).to(torch.float32).save_pretrained(folder)
    return folder
