"""Plan of a conversion, from the listing alone: which records stay, in which set, and the id of each class."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partialfc.data.class_table import class_names
from partialfc.data.convert.choice import NONE, Choice
from partialfc.data.convert.cleaning import Exclusions, Merges, read_exclusions, read_merges
from partialfc.data.convert.listing import Listing
from partialfc.data.samples import class_id
from partialfc.errors import ConfigError, InvalidData

Indices = npt.NDArray[np.int64]

_SHOWN = 5  # names in a remark


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to take from a source.

    Attributes:
        classes: ``classes.jsonl`` of an earlier set, whose ids stay.
        exclude: cleaning list, see :func:`~partialfc.data.convert.cleaning.read_exclusions`.
        merge: cleaning list, see :func:`~partialfc.data.convert.cleaning.read_merges`.
        min_samples: of a class; those with fewer are left out.
        max_samples: of a class; of those with more, a choice stays that hardly changes when the source grows.
        holdout: number of identities set aside as a verification set.
    """

    classes: Path | None = None
    exclude: Path | None = None
    merge: Path | None = None
    min_samples: int = 1
    max_samples: int | None = None
    holdout: int = 0

    def __post_init__(self) -> None:
        if self.holdout == 1:
            raise ConfigError("holdout: one identity has no other to be compared with; expected 0, or 2 or more")


@dataclass(frozen=True)
class SetPlan:
    """The records and classes of one set.

    Attributes:
        records: file of the numbers of its records, int64, in the order of the source.
        labels: file of the class id of each identity number of the listing, int32; -1 if it is not in this set.
        num_records: number of its records.
        names: of the classes, by id.
        samples: records of each class, int64 [classes].
    """

    records: Path
    labels: Path
    num_records: int
    names: list[str]
    samples: Indices


@dataclass(frozen=True)
class Plan:
    """The sets of a conversion, and remarks on what the lists name without effect."""

    training: SetPlan
    verification: SetPlan | None
    remarks: list[str]


def make_plan(listing: Listing, selection: Selection, folder: Path) -> Plan:
    """Choose records and classes; the numbers of the records are written into ``folder``.

    Raises:
        InvalidData: a list is wrong, or nothing remains.
        ConfigError: there are fewer identities to set aside than ``holdout`` asks for.
    """
    old = _old_classes(selection.classes)
    exclusions = read_exclusions(selection.exclude) if selection.exclude else Exclusions()
    merges = read_merges(selection.merge) if selection.merge else Merges()
    identities = listing.names()
    numbers: dict[str, int] = {}  # of the names of classes
    group = np.full(len(identities), NONE, dtype=np.int32)
    for i, identity in enumerate(identities):
        if identity not in exclusions.identities:
            group[i] = numbers.setdefault(merges.into.get(identity, identity), len(numbers))
    choice = Choice(listing, group, len(numbers))
    found_keys = choice.drop_keys(exclusions.keys)
    known = {*identities, *old}
    remarks = [
        *_remark(selection.exclude, "keys", exclusions.keys - found_keys),
        *_remark(selection.exclude, "identities", exclusions.identities - known),
        *_remark(selection.merge, "identities", merges.named - known),
    ]
    few = choice.counts() < selection.min_samples
    if selection.max_samples is not None:
        choice.cut(selection.max_samples)
    counts = np.where(few, 0, choice.counts())
    names = list(numbers)
    held_out = _hold_out(names, counts, old, selection.holdout)
    training = _plan_set(choice, names, np.where(held_out, 0, counts), old, folder / "training")
    if not training.num_records:
        raise InvalidData("nothing is left to train on: no image is kept by the lists and limits given")
    verification = None
    if selection.holdout:
        verification = _plan_set(choice, names, np.where(held_out, counts, 0), {}, folder / "verification")
    return Plan(training, verification, remarks)


def _plan_set(choice: Choice, names: list[str], counts: Indices, first: dict[str, int], stem: Path) -> SetPlan:
    """Plan a set of the classes that have a count, behind those that come ``first`` with the ids they have."""
    chosen = counts > 0
    new = [name for name, taken in zip(names, chosen.tolist(), strict=True) if taken and name not in first]
    ids = first | {name: i for i, name in enumerate(sorted(new, key=_place_of_name), start=len(first))}
    label = np.array([ids.get(name, NONE) for name in names] + [NONE], dtype=np.int32)
    label[:-1][~chosen] = NONE
    samples = np.zeros(len(ids), dtype=np.int64)
    samples[label[:-1][chosen]] = counts[chosen]
    records, labels = stem.with_suffix(".records"), stem.with_suffix(".labels")
    choice.write(records, chosen)
    label[choice.group].tofile(labels)  # without a class, NONE takes the last
    return SetPlan(records, labels, int(samples.sum()), list(ids), samples)


def _hold_out(names: list[str], counts: Indices, old: dict[str, int], number: int) -> npt.NDArray[np.bool_]:
    """Choose identities by a hash of their names, so that most stay held out when others come or go."""
    able = [i for i, count in enumerate(counts.tolist()) if count >= 2 and names[i] not in old] if number else []
    if len(able) < number:
        raise ConfigError(
            f"holdout: {number:,} identities are to be set aside, but only {len(able):,} have two images or more"
            + (" and are not in the earlier classes" if old else "")
        )
    chosen = np.zeros(len(names), dtype=np.bool_)
    chosen[sorted(able, key=lambda i: hashlib.sha256(names[i].encode()).digest())[:number]] = True
    return chosen


def _place_of_name(name: str) -> tuple[bool, int, str]:
    """Return what sorts names: numbers by size, then all others by their code points, and so by their UTF-8 bytes."""
    number = class_id(name.encode())
    return number is None, number or 0, name


def _old_classes(table: Path | None) -> dict[str, int]:
    ids: dict[str, int] = {}
    for number, name in enumerate(class_names(table) if table else ()):
        if ids.setdefault(name, number) != number:
            raise InvalidData(f"{table}: classes {ids[name]} and {number} are both called {name!r}")
    if table and not ids:
        raise InvalidData(f"{table} is empty; expected the classes of an earlier set, one a line")
    return ids


def _remark(path: Path | None, what: str, unknown: Set[str]) -> list[str]:
    if not unknown:
        return []
    shown = ", ".join(repr(name) for name in sorted(unknown)[:_SHOWN]) + (", …" if len(unknown) > _SHOWN else "")
    return [f"{path}: {len(unknown):,} {what} do not occur in the source: {shown}"]
