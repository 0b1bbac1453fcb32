"""Pairs of real models that share a tokenizer, by name: what `--preset` stands for. Pure; docs/models.md shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pilotfish.protocol.settings import Settings


@dataclass(frozen=True, slots=True)
class Preset:
    """A draft for llama.cpp on the device, and the same target for either engine of the cloud."""

    draft: str
    target_vllm: str
    target_llamacpp: str
    dtype: str = "bfloat16"  # vLLM; float32 would need twice the memory


LLAMACPP_SESSIONS = 4  # each reserves its whole context in float32: 1.2 GB of a Qwen3 8B, where vLLM shares its cache
#: named after the target; none of them has been run by us (docs/models.md)
PRESETS: Final = {
    "qwen2.5-7b": Preset(
        "hf://Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q8_0.gguf",
        "hf://Qwen/Qwen2.5-7B-Instruct",
        "hf://Qwen/Qwen2.5-7B-Instruct-GGUF/qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf",
    ),
    "qwen3-8b": Preset(
        "hf://Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf",
        "hf://Qwen/Qwen3-8B",
        "hf://Qwen/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf",
    ),
    "llama3.1-8b": Preset(
        "hf://bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q8_0.gguf",
        "hf://meta-llama/Llama-3.1-8B-Instruct",
        "hf://bartowski/Meta-Llama-3.1-8B-Instruct-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
    ),
}


def with_preset(settings: Settings, engine: str = "") -> Settings:
    """The settings with the models of `--preset` where none are named; without a preset as they are."""
    if settings.preset is None:
        return settings
    pair = PRESETS[settings.preset]
    if engine == "vllm":
        return settings.suggest(draft_model=pair.draft, target_model=pair.target_vllm, dtype=pair.dtype)
    return settings.suggest(draft_model=pair.draft, target_model=pair.target_llamacpp, max_sessions=LLAMACPP_SESSIONS)
