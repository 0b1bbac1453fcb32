"""The architecture of both demo models in torch: a small qwen3, with parameters named as Hugging Face names them.

Knows tensors only: not the tokenizer, the tasks, nor how either model is trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pilotfish.demo.layout import Cache, Layout
from pilotfish.demo.shape import Shape


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding of x [N, H, D] by angle [N, D / 2], halves apart (llama.cpp's NEOX kind)."""
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [B, H, T, D] spelled out: for short rows faster to train through than the fused kernel."""
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights: Tensor = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.matmul(weights.to(v.dtype), v)


def from_cache(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attention [N, H * D] of packed queries [N, H, D] over all that is cached: whole rows, or one new token each."""
    groups = q.shape[1] // k.shape[1]
    if len(layout.rows) != layout.batch:
        return layout.unpad(causal(layout.pad(q), k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    visible = torch.arange(layout.width) <= layout.positions[:, None]
    grouped = q.view(len(q), -1, groups, q.shape[-1])
    seen = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, None, None])
    return seen.flatten(1)


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
        q = rotate(self.q_norm(self._heads(self.q_proj(x))), angle)
        k = rotate(self.k_norm(self._heads(self.k_proj(x))), angle)
        v = self._heads(self.v_proj(x))
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        if cache is None:
            k, v = layout.pad(k).repeat_interleave(groups, 1), layout.pad(v).repeat_interleave(groups, 1)
            seen = layout.unpad(causal(layout.pad(q), k, v))
        else:
            seen = from_cache(q.float(), *cache.extend(self.layer, layout, k, v), layout)
        out: Tensor = self.o_proj(seen)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """[N, H * D] -> [N, H, D]."""
        return x.view(len(x), -1, self.shape.head_dim)


class Feed(nn.Module):
    """The gated feed-forward part (SwiGLU)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


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
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


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
        x: Tensor = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, angle, layout, cache)
        out: Tensor = self.norm(x)
        return out


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
