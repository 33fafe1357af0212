"""Random numbers that are functions of their purpose, the same on every device, rank and world size.

A class's initial weight depends on (seed, class id), the negatives of a step on (seed, step, class id). A counter-based
generator provides that without any state: each number is a hash of its own coordinates.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), as signed int64:
# torch has no unsigned 64-bit arithmetic. `data/permutation.py` hashes on the host, on numpy's uint64; the head needs
# the same function on any device.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_WORD = 1 << 64


class RandomStream(IntEnum):
    """Purposes of random numbers, a coordinate that keeps their streams independent. Results depend on the values."""

    NEGATIVES = 1  # classes sampled in a step
    INITIAL_WEIGHT = 2
    NOISE = 3  # margins drawn for each sample
    ROUNDING = 4  # stochastic rounding in an optimizer step
    DEFERRED_DECAY = 5  # stochastic rounding when deferred decay is applied
    BACKBONE = 6  # dropout and the like


def mix(values: Tensor) -> Tensor:
    """Apply splitmix64's finaliser to int64 ``values``: every input bit changes half of the output bits."""
    # Shifts of int64 are arithmetic: the mask makes them logical.
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _MIX_1
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _MIX_2
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def stream_key(*coordinates: int) -> int:
    """Mix ``coordinates`` (seed, :class:`RandomStream`, step …) one after the other into one int64."""
    key = 0
    for coordinate in coordinates:  # `mix` on Python's integers: no tensor is made
        key = (key + coordinate * _GOLDEN + _GOLDEN) % _WORD
        key = (key ^ (key >> 30)) * _MIX_1 % _WORD
        key = (key ^ (key >> 27)) * _MIX_2 % _WORD
        key ^= key >> 31
    return _signed(key)


def hash64(key: int, ids: Tensor) -> Tensor:
    """Return a uniform int64 value for each of the int64 ``ids``, under ``key`` (see :func:`stream_key`)."""
    return mix(ids * _GOLDEN + key)


def normal_rows(key: int, ids: Tensor, width: int, std: float, out: Tensor, piece: int = 1 << 20) -> None:
    """Fill ``out [len(ids), width]`` with N(0, std²): row i is a function of ``key`` and ``ids[i]`` alone.

    Box–Muller on the two 32-bit halves of one hash gives two values. Works in pieces of about ``piece`` values.
    """
    pairs = -(-width // 2)
    columns = torch.arange(pairs, dtype=torch.int64, device=ids.device)
    rows_per_piece = max(1, piece // max(1, width))
    for start in range(0, len(ids), rows_per_piece):
        rows = ids[start : start + rows_per_piece]
        bits = mix(hash64(key, rows)[:, None] + columns * _GOLDEN)  # [rows, pairs]
        # 24 bits each, as float32 holds them exactly; the half keeps the logarithm finite.
        first = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
        second = ((bits >> 8) & 0xFFFFFF).float().mul_(2.0**-24 * 2.0 * math.pi)
        radius = first.log_().mul_(-2.0).sqrt_().mul_(std)
        values = torch.stack((radius * torch.cos(second), radius * torch.sin(second)), dim=2)
        out[start : start + rows_per_piece] = values.reshape(len(rows), 2 * pairs)[:, :width]


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
