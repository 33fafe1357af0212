"""Shuffle of whole blocks, for sources whose records can only be read many at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from partialfc.data.convert.listing import Listing
from partialfc.data.convert.shards import SEED
from partialfc.data.permutation import epoch_permutation

_PIECE = 1 << 20  # records or blocks looked at together


def shuffle_blocks(records: Path, listing: Listing) -> None:
    """Bring the records of a set into a random order of blocks: records in sequence, of equal file and offset.

    Args:
        records: file of numbers of records, int64.
    """
    numbers: npt.NDArray[np.int64] = np.memmap(records, np.int64, mode="r")
    starts = np.concatenate([[0], *_changes(numbers, listing), [len(numbers)]])
    num_blocks = len(starts) - 1
    shuffled = records.with_suffix(".shuffled")
    with open(shuffled, "wb") as file:
        for first in range(0, num_blocks, _PIECE):
            places = np.arange(first, min(first + _PIECE, num_blocks), dtype=np.int64)
            for block in epoch_permutation(places, num_blocks, SEED, epoch=0).tolist():
                file.write(numbers[starts[block] : starts[block + 1]].tobytes())
    shuffled.replace(records)


def _changes(numbers: npt.NDArray[np.int64], listing: Listing) -> list[npt.NDArray[np.int64]]:
    """Return the places in ``numbers`` at which a block begins, but for the first."""
    found = []
    for start in range(0, len(numbers), _PIECE):
        rows = listing.rows[numbers[start : start + _PIECE + 1]]
        changes = (rows["file"][1:] != rows["file"][:-1]) | (rows["offset"][1:] != rows["offset"][:-1])
        found.append(start + 1 + np.flatnonzero(changes))
    return found
