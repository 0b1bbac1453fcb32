"""The sizes of the two models. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; head_dim is 64 because vLLM's CPU attention refuses less."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 4096
    head_dim: int = 64
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def to_dict(self) -> dict[str, int | float]:
        """The fields under the names of a Hugging Face config."""
        return asdict(self)


TARGET = Shape(384, 6, 6, 2, 1024)
DRAFT = Shape(192, 4, 3, 1, 512)
