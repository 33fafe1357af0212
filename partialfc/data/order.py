"""Sample order, as pure functions.

Every rank computes its samples of a step from (seed, step) alone: nothing is shuffled in memory or stored, and the
global batch of a step is the same for every world size.

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


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Return the number of global batches in an epoch; the last one may be short."""
    return -(-num_samples // global_batch_size)


def samples_before(step: int, num_samples: int, global_batch_size: int) -> int:
    """Return the number of samples in the first ``step`` global batches."""
    epochs, rest = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    return epochs * num_samples + min(rest * global_batch_size, num_samples)


def local_slice(global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the slice ``[start, stop)`` of a global batch that ``rank`` holds: ceil(B / W) samples.

    It is clipped to B: the last ranks may hold fewer samples, or none.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
    share = -(-global_batch_size // world_size)
    return min(rank * share, global_batch_size), min((rank + 1) * share, global_batch_size)


def batch_indices(
    step: int, num_samples: int, global_batch_size: int, seed: int, rank: int, world_size: int, micro_batches: int = 1
) -> Indices:
    """Return the sample indices of ``rank`` in ``step`` (0-based, counted over all epochs).

    A global batch is first split into ``micro_batches``, then each of these over the ranks, so that a micro-batch holds
    the same samples at any world size.

    Returns:
        int64 [micro_batches · ceil(P / W)] for micro-batches of P = ceil(B / micro_batches): one after the other,
        padded with -1 where a slice reaches past its micro-batch, and where the epoch's last global batch is short.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    first = step_in_epoch * global_batch_size
    last = min(first + global_batch_size, num_samples)
    size = -(-global_batch_size // micro_batches)
    start, stop = local_slice(size, rank, world_size)
    share = -(-size // world_size)
    indices = np.full(micro_batches * share, -1, dtype=np.int64)
    for part in range(micro_batches):
        begin = first + part * size
        positions = np.arange(begin + start, min(begin + stop, last), dtype=np.int64)
        slot = part * share
        indices[slot : slot + len(positions)] = epoch_permutation(positions, num_samples, seed, epoch)
    return indices
