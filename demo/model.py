"""The architecture of both demo models in torch: a small qwen3, with parameters named as Hugging Face names them.

Knows tensors only: not the tokenizer, the tasks, nor how either model is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


@dataclass
class Layout:
    """Where the N packed tokens of B sequences lie in a padded [B, T] grid: rows and positions are [N]."""

    batch: int
    width: int
    rows: Tensor
    positions: Tensor

    @classmethod
    def of_lengths(cls, lengths: list[int], start: list[int] | None = None) -> Layout:
        """Sequences of these lengths one after the other, each at position 0 (or at its `start`)."""
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        offsets = start or [0] * len(lengths)
        positions = torch.cat([torch.arange(at, at + n) for n, at in zip(lengths, offsets, strict=True)])
        return cls(len(lengths), max(n + at for n, at in zip(lengths, offsets, strict=True)), rows, positions)

    def pad(self, packed: Tensor) -> Tensor:
        """[N, H, D] -> [B, H, T, D], zeros where no token is."""
        grid = packed.new_zeros(self.batch, self.width, *packed.shape[1:])
        return grid.index_put((self.rows, self.positions), packed).transpose(1, 2)

    def unpad(self, grid: Tensor) -> Tensor:
        """[B, H, T, D] -> [N, H * D]."""
        return grid.transpose(1, 2)[self.rows, self.positions].flatten(1)


class Cache:
    """Keys and values of B growing sequences, per layer [B, H, capacity, D]."""

    def __init__(self, shape: Shape, batch: int, capacity: int) -> None:
        size = (shape.num_hidden_layers, batch, capacity, shape.num_key_value_heads, shape.head_dim)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)

    def extend(self, layer: int, layout: Layout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write packed k and v [N, H, D] at their positions; return all of the layer's as [B, H, T, D]."""
        self.keys[layer, layout.rows, layout.positions] = k.float()
        self.values[layer, layout.rows, layout.positions] = v.float()
        keys, values = self.keys[layer, :, : layout.width], self.values[layer, :, : layout.width]
        return keys.transpose(1, 2), values.transpose(1, 2)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding of x [N, H, D] by angle [N, D / 2], halves apart (llama.cpp's NEOX kind)."""
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [B, H, T, D] spelled out: for short rows faster to train through than the fused kernel."""
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype) @ v


class Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with a norm on each query and key head."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, shape.hidden_size, bias=False)
        self.q_norm = Norm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = Norm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, angle: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """x [N, hidden] -> [N, hidden]; angle [N, head_dim / 2]."""
        heads = lambda y: y.unflatten(-1, (-1, self.shape.head_dim))  # noqa: E731
        q = rotate(self.q_norm(heads(self.q_proj(x))), angle)
        k = rotate(self.k_norm(heads(self.k_proj(x))), angle)
        v = heads(self.v_proj(x))
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        if cache is None:
            k, v = layout.pad(k).repeat_interleave(groups, 1), layout.pad(v).repeat_interleave(groups, 1)
            return self.o_proj(layout.unpad(causal(layout.pad(q), k, v)))
        k, v = (y.repeat_interleave(groups, 1) for y in cache.extend(self.layer, layout, k, v))
        visible = torch.ones(layout.width, layout.width, dtype=torch.bool).tril()
        return self.o_proj(self._attend_rows(q.float(), k, v, visible, layout))

    @staticmethod
    def _attend_rows(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, layout: Layout) -> Tensor:
        """Attention when the queries [N, H, D] are only the newest tokens of each row."""
        per_row = len(layout.rows) // layout.batch
        if per_row * layout.batch != len(layout.rows) or per_row > 1:
            return layout.unpad(F.scaled_dot_product_attention(layout.pad(q), k, v, attn_mask=visible))
        mask = visible[layout.positions][:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask).flatten(1)


class Feed(nn.Module):
    """The gated feed-forward part (SwiGLU)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, both halves behind their norm and added to the stream."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Feed(shape)

    def forward(self, x: Tensor, angle: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), angle, layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, ids: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """ids [N] -> [N, hidden]."""
        half = torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        angle = layout.positions[:, None] * self.shape.rope_theta**-half
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, angle, layout, cache)
        return self.norm(x)


class LanguageModel(nn.Module):
    """The whole model; the output matrix is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.model = shape, Trunk(shape)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "o_proj" not in name and "down_proj" not in name else 0.005)

    def forward(self, ids: Tensor, layout: Layout, keep: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [N or len(keep), vocabulary] of packed ids [N], at the rows in `keep` if given."""
        x = self.model(ids, layout, cache)
        return F.linear(x if keep is None else x[keep], self.model.embed_tokens.weight)
