"""Choice of training and held-out characters, and of pairs too alike to be told apart.

Pure functions of the fonts' content: the result depends neither on the image size nor on the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partialfc.data.glyphs.render import Scan
from partialfc.data.permutation import mix_array
from partialfc.errors import ConfigError

Codepoints = npt.NDArray[np.int64]

MIN_DESIGNS = 3  # fewest training designs of a class
PLACEHOLDER_REPEATS = 4  # a bitmap shared by this many code points of a font means "missing"
LOOK_ALIKE_CORRELATION = 0.98


@dataclass(frozen=True, slots=True)
class Choice:
    """Characters of the training set and of the verification set."""

    training: Codepoints  # [num_classes], ascending: position = class id
    held_out: Codepoints  # ascending: position = class id in the verification set


def num_held_out(num_classes: int) -> int:
    """Return the number of characters held out for verification."""
    return min(2000, max(100, num_classes // 2))


def without_placeholders(scans: Sequence[Scan]) -> Codepoints:
    """Return the code points of a font that have a drawing of their own, ascending."""
    codepoints = np.concatenate([scan.codepoints for scan in scans])
    hashes = np.concatenate([scan.hashes for scan in scans])
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    kept = codepoints[counts[inverse] < PLACEHOLDER_REPEATS]
    kept.sort()
    return kept


def designs_required(num_training_designs: int) -> int:
    """Return the number of training designs that must have a character: MIN_DESIGNS, or all if there are fewer."""
    return min(MIN_DESIGNS, num_training_designs)


def count_designs(designs: Sequence[Codepoints]) -> tuple[Codepoints, npt.NDArray[np.int64]]:
    """Return all code points of the designs, ascending, and the number of designs that have each."""
    return np.unique(np.concatenate(designs), return_counts=True)


def choose(training: Sequence[Codepoints], held_out: Sequence[Codepoints], num_classes: int) -> Choice:
    """Hold out characters, then take the ``num_classes`` most widely drawn ones; a hash breaks ties.

    Args:
        training: the code points of each training design.
        held_out: the code points of each held-out design; a held-out character must be in all of them.
    Raises:
        ConfigError: there are too few characters; the message says how many classes are possible.
    """
    codepoints, counts = count_designs(training)
    enough = counts >= designs_required(len(training))
    codepoints, counts = codepoints[enough], counts[enough]
    ranked = codepoints[np.lexsort((_hash(codepoints, "choice"), -counts))]
    in_all = np.ones(len(ranked), dtype=bool)
    for design in held_out:
        in_all &= np.isin(ranked, design)
    for_verification = np.flatnonzero(in_all)[: num_held_out(num_classes)]
    remaining = np.delete(ranked, for_verification)
    if len(remaining) < num_classes:
        possible = most_classes(len(ranked), int(in_all.sum()))
        raise ConfigError(
            f"{num_classes} classes are requested, but these fonts allow at most {possible}: {len(ranked)} characters "
            f"are drawn by at least {designs_required(len(training))} training designs, and some are held out. "
            f"Request at most {possible} classes, or use more fonts (small < core < all)"
        )
    return Choice(np.sort(remaining[:num_classes]), np.sort(ranked[for_verification]))


def most_classes(num_characters: int, num_verifiable: int) -> int:
    """Return the largest number of classes for which :func:`choose` succeeds."""
    low, high = 0, num_characters
    while low < high:  # bisection: the characters needed grow with the number of classes
        middle = (low + high + 1) // 2
        fits = middle + min(num_held_out(middle), num_verifiable) <= num_characters
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def shuffle_keys(codepoints: Codepoints, design: str) -> npt.NDArray[np.uint64]:
    """Return sort keys that put the samples of all designs into one fixed order, with the classes mixed."""
    return _hash(codepoints, f"order {design}")


def look_alikes(images: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of a design's images whose normalised correlation exceeds LOOK_ALIKE_CORRELATION.

    Args:
        images: [n, pixels].
    """
    centred = images - images.mean(axis=1, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    pairs = list[tuple[int, int]]()
    for start in range(0, len(centred), 1024):
        correlation = centred[start : start + 1024] @ centred[start:].T
        first, second = np.nonzero(np.triu(correlation, k=1) > LOOK_ALIKE_CORRELATION)
        pairs += zip((first + start).tolist(), (second + start).tolist(), strict=True)
    return pairs


def _hash(codepoints: Codepoints, purpose: str) -> npt.NDArray[np.uint64]:
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return mix_array(codepoints.astype(np.uint64), key)
