"""Where packed tokens lie in rows of different lengths, and the cache of keys and values of growing rows.

Knows tensors and sizes; the network itself is in `model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pilotfish.demo.shape import Shape


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
    """Keys and values of B growing sequences, per layer [B, capacity, H, D]."""

    def __init__(self, shape: Shape, batch: int, capacity: int) -> None:
        size = (shape.num_hidden_layers, batch, capacity, shape.num_key_value_heads, shape.head_dim)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)

    def extend(self, layer: int, layout: Layout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write packed k and v [N, H, D] at their positions; return all of the layer's as [B, H, T, D]."""
        self.keys[layer, layout.rows, layout.positions] = k.float()
        self.values[layer, layout.rows, layout.positions] = v.float()
        keys, values = self.keys[layer, :, : layout.width], self.values[layer, :, : layout.width]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def select(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
