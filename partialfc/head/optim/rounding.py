"""Stochastic rounding, which stores float32 numbers in bfloat16 without losing small updates."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.head.random import mix


def round_stochastically(values: Tensor, key: int, rows: Tensor) -> Tensor:
    """Round float32 ``values [n, …]`` to bfloat16, up or down with the probability that preserves the mean.

    Rounding to nearest always loses an update much smaller than the spacing of bfloat16 (1/256 of the number);
    stochastic rounding keeps it on average. Numbers that bfloat16 holds exactly, Inf and NaN are unchanged. The random
    bits are functions of ``key``, of ``rows [n]`` int64 and of the position in the row.
    """
    flat = values.reshape(len(values), -1)
    width = flat.shape[1]
    words = -(-width // 4)  # four 16-bit numbers from each hash
    columns = torch.arange(words, dtype=torch.int64, device=values.device)
    hashes = mix(mix(rows + key)[:, None] + columns)
    noise = hashes.view(torch.int16).view(len(flat), 4 * words)[:, :width].to(torch.int32) & 0xFFFF
    bits = flat.contiguous().view(torch.int32)
    # bfloat16 drops the low 16 bits: the larger they are, the more often adding noise carries into the rest.
    rounded = ((bits + noise) & -0x10000).view(torch.float32)
    rounded = torch.where(torch.isfinite(flat), rounded, flat)
    return rounded.to(torch.bfloat16).view(values.shape)
