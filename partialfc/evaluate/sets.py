"""Evaluation sets: opened and checked at the start of a run, so that no evaluation fails after hours of training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern

import numpy as np
import numpy.typing as npt

from partialfc.data.class_table import match_classes
from partialfc.data.dataset import TarDataset
from partialfc.data.loader import require_samples
from partialfc.data.pairs import PAIRS, PairList, read_pairs
from partialfc.errors import ConfigError, InvalidData
from partialfc.evaluate.protocol import PROTOCOL, LookAlikes, Protocol, check_protocol, read_protocols


@dataclass
class EvaluationSet:
    """A set of a config: for verification by protocols or by listed pairs, or for identification.

    Attributes:
        protocols: of a verification set.
        designs: of the samples of a set with protocols, [N].
        pairs: listed pairs of a verification set.
        class_ids: int64 [classes of the set], the ids of its classes in the training set, for identification.
    """

    folder: Path
    dataset: TarDataset
    protocols: list[Protocol] = field(default_factory=list)
    look_alikes: LookAlikes = field(default_factory=list)
    designs: list[str] = field(default_factory=list)
    pairs: PairList | None = None
    class_ids: npt.NDArray[np.int64] | None = None

    @property
    def by_class(self) -> bool:
        """True if it is for identification, with samples of the training classes."""
        return not self.protocols and self.pairs is None

    @property
    def result_names(self) -> list[str]:
        """Names of its results."""
        return [protocol.name for protocol in self.protocols] or [self.folder.name]


def open_set(folder: Path) -> EvaluationSet:
    """Open an evaluation set, and check its protocols or pairs against its samples.

    Raises:
        InvalidData: it is missing, incomplete or empty, or a protocol or its list of pairs compares nothing.
    """
    dataset = TarDataset(folder)
    require_samples(dataset)
    found = EvaluationSet(folder, dataset)
    # A file that cannot be read is no reason to take a set for another kind.
    by_protocols, by_pairs = (os.path.lexists(folder / name) for name in (PROTOCOL, PAIRS))
    if by_protocols and by_pairs:
        raise InvalidData(f"{folder} has both {PROTOCOL} and {PAIRS}; remove the one that it is not to be evaluated by")
    if by_pairs:
        found.pairs = read_pairs(folder, dataset.keys)
    if by_protocols:
        found.protocols, found.look_alikes = read_protocols(folder)
        found.designs = [intern(key.partition("-")[2]) for key in dataset.keys]
        for protocol in found.protocols:
            check_protocol(folder, protocol, found.look_alikes, dataset.labels, found.designs)
    return found


def training_ids(table: Path, num_classes: int, trained: Path | None, num_trained: int) -> npt.NDArray[np.int64]:
    """Return the training id of each class of an identification set, by name: int64 [num_classes].

    Args:
        table: class table of the set.
        trained: class table of the training set; None: checkpoints of early versions have none, and ids must do.
        num_trained: number of classes of the training set.

    Raises:
        InvalidData: a table is damaged, or a class of the set is not one of the training set.
    """
    if trained is not None:
        return match_classes(table, trained, num_classes)
    if num_classes != num_trained:
        raise InvalidData(
            f"evaluation set {table.parent} has {num_classes} classes, but the training set {num_trained}, without a "
            "class table to compare names with"
        )
    return np.arange(num_classes, dtype=np.int64)


def require_different_names(sets: list[EvaluationSet]) -> None:
    """Raise ConfigError if two sets would give results of the same name."""
    names = [name for found in sets for name in found.result_names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"evaluation.sets: two sets give results called {', '.join(twice)}; rename one of them")
