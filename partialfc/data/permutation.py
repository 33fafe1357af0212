"""Random orders as pure functions: nothing is shuffled in memory, whatever the number of items.

The hash is splitmix64 (Steele et al., OOPSLA 2014), as in :mod:`partialfc.head.random`, but on Python integers and
NumPy arrays: a loader hashes two keys per sample, each in a microsecond here, in a hundred as tensors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8  # four suffice for large domains; small data sets need more


def mix(*values: int) -> int:
    """Hash integers into one 64-bit key (splitmix64, applied value by value)."""
    state = 0
    for value in values:
        state = (state + _GOLDEN + (value & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def mix_array(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Return splitmix64's finaliser of ``values + key``, elementwise, uint64."""
    x = values + np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def epoch_permutation(positions: Indices, num_samples: int, seed: int, epoch: int) -> Indices:
    """Return the samples at ``positions`` in an epoch's shuffle of ``range(num_samples)``.

    The shuffle is a keyed Feistel network over the smallest domain of an even number of bits that holds
    ``num_samples``. A value outside the range is permuted again until it falls inside (cycle walking), which makes the
    result a bijection of the range. Memory is O(len(positions)), whatever ``num_samples`` is.

    Args:
        positions: int64 [n], each in [0, num_samples).
    Returns:
        int64 [n], sample indices.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if len(positions) and not (positions.min() >= 0 and positions.max() < num_samples):
        raise ValueError(f"positions must lie in [0, {num_samples}), got {positions.min()}..{positions.max()}")
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    keys = [mix(seed, epoch, i) for i in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= num_samples)
    while len(outside):
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix_array(right, key) & mask)
    return (left << bits) | right
