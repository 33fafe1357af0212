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
from partialfc.errors import ConfigError, InvalidData
from partialfc.evaluate.protocol import PROTOCOL, LookAlikes, Protocol, check_protocol, read_protocols


@dataclass
class EvaluationSet:
    """A set of a config.

    Attributes:
        protocols: of a verification set; empty for identification.
        designs: of the samples of a verification set, [N].
        class_ids: int64 [classes of the set], the ids of its classes in the training set, for identification.
    """

    folder: Path
    dataset: TarDataset
    protocols: list[Protocol] = field(default_factory=list)
    look_alikes: LookAlikes = field(default_factory=list)
    designs: list[str] = field(default_factory=list)
    class_ids: npt.NDArray[np.int64] | None = None

    @property
    def result_names(self) -> list[str]:
        """Names of its results."""
        return [protocol.name for protocol in self.protocols] or [self.folder.name]


def open_set(folder: Path) -> EvaluationSet:
    """Open an evaluation set, and check its protocols against its samples.

    Raises:
        InvalidData: it is missing, incomplete or empty, or a protocol compares nothing.
    """
    dataset = TarDataset(folder)
    require_samples(dataset)
    found = EvaluationSet(folder, dataset)
    if is_verification(folder):
        found.protocols, found.look_alikes = read_protocols(folder)
        found.designs = [intern(key.partition("-")[2]) for key in dataset.keys]
        for protocol in found.protocols:
            check_protocol(folder, protocol, found.look_alikes, dataset.labels, found.designs)
    return found


def is_verification(folder: Path) -> bool:
    """Return True if a set has protocols; one that cannot be read is no reason to take it for another kind."""
    return os.path.lexists(folder / PROTOCOL)


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
