"""Choice of records by key and by class, in pieces: a byte of memory a record, and eight for classes that are cut."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partialfc.data.convert.listing import Listing
from partialfc.data.permutation import mix_array

NONE = -1  # in place of the number of a group

_PIECE = 1 << 20  # records looked at together


@dataclass
class Choice:
    """The records that stay.

    Attributes:
        listing: all records.
        group: number of the class of each identity, int32; :data:`NONE` leaves it out.
        num_groups: number of classes.
        kept: bool [num_records]; only those with a class count.
    """

    listing: Listing
    group: npt.NDArray[np.int32]
    num_groups: int

    def __post_init__(self) -> None:
        self.kept = np.ones(len(self.listing.rows), dtype=np.bool_)

    def drop_keys(self, keys: frozenset[str]) -> set[str]:
        """Leave out the records with these keys; return the keys that occur."""
        hashes = np.unique(np.array([zlib.crc32(key.encode()) for key in keys], dtype=np.uint32))
        found = set[str]()
        if not keys:
            return found
        for numbers, _, found_hashes in self._pieces():
            candidates = numbers[np.isin(found_hashes, hashes)]
            for number, record in zip(candidates.tolist(), self.listing.records(candidates), strict=True):
                if record.key in keys:
                    found.add(record.key)
                    self.kept[number] = False
        return found

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of records of each class, int64 [num_groups]."""
        counts = np.zeros(self.num_groups, dtype=np.int64)
        for _, groups, _ in self._pieces():
            counts += np.bincount(groups, minlength=self.num_groups)
        return counts

    def cut(self, most: int) -> None:
        """Leave ``most`` records of each class that has more: those whose keys have the smallest hashes.

        Where other records come or go, all but a few of the chosen ones stay.
        """
        counts = self.counts()
        large = counts > most
        places = np.empty(int(counts[large].sum()), dtype=np.uint64)
        filled = 0
        for _, groups, hashes in self._pieces(large):
            places[filled : filled + len(groups)] = _places(groups, hashes)
            filled += len(groups)
        places.sort()
        stops = np.cumsum(counts[large]) - counts[large] + most
        last = np.zeros(self.num_groups, dtype=np.uint64)  # of the places that stay in each class
        last[large] = places[stops - 1]
        # Equal keys have equal places: of these, the first ones stay.
        left = np.zeros(self.num_groups, dtype=np.int64)
        left[large] = stops - np.searchsorted(places, places[stops - 1])
        del places
        for numbers, groups, hashes in self._pieces(large):
            places = _places(groups, hashes)
            self.kept[numbers[places > last[groups]]] = False
            for i in np.flatnonzero(places == last[groups]).tolist():
                left[groups[i]] -= 1
                self.kept[numbers[i]] = left[groups[i]] >= 0

    def write(self, path: Path, chosen: npt.NDArray[np.bool_]) -> None:
        """Write the numbers of the records of the chosen classes, int64.

        Args:
            chosen: bool [num_groups].
        """
        with open(path, "wb") as file:
            for numbers, _, _ in self._pieces(chosen):
                file.write(numbers.tobytes())

    def _pieces(
        self, chosen: npt.NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.uint32]]]:
        """Yield number, class and hash of the key of the records that stay, of the chosen classes if any are given."""
        for start in range(0, len(self.listing.rows), _PIECE):
            rows = self.listing.rows[start : start + _PIECE]
            groups = self.group[rows["identity"]]
            numbers = np.flatnonzero(self.kept[start : start + _PIECE] & (groups >= 0))
            if chosen is not None:
                numbers = numbers[chosen[groups[numbers]]]
            yield start + numbers, groups[numbers], rows["hash"][numbers]


def _places(groups: npt.NDArray[np.int32], hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Return numbers that sort by class first, and within a class by a hash that spreads evenly."""
    return (groups.astype(np.uint64) << np.uint64(32)) | (mix_array(hashes.astype(np.uint64), 0) >> np.uint64(32))
