"""``protocol.json`` of a verification set: which pairs to compare, read and checked against the set's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
import numpy.typing as npt

from partialfc.errors import InvalidData
from partialfc.files import read_json
from partialfc.options import describe_unknown

PROTOCOL = "protocol.json"
LookAlikes = list[tuple[int, int]]

_ALL = "all"  # in place of a list of designs
_MAX_BYTES = 32 << 20  # of two million pairs of look-alikes
_MAX_NAME = 128  # characters


@dataclass(frozen=True)
class Protocol:
    """Pairs to compare: every sample of a probe design with every sample of a gallery design; None: of all designs."""

    name: str
    probe: frozenset[str] | None
    gallery: frozenset[str] | None

    def sides(self, designs: Sequence[str]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return which samples are probes, and which are in the gallery: [N] each, from the designs of N samples."""
        return _is_one_of(designs, self.probe), _is_one_of(designs, self.gallery)


def _is_one_of(designs: Sequence[str], side: frozenset[str] | None) -> npt.NDArray[np.bool_]:
    if side is None:
        return np.ones(len(designs), dtype=np.bool_)
    return np.fromiter((design in side for design in designs), dtype=np.bool_, count=len(designs))


def read_protocols(folder: Path) -> tuple[list[Protocol], LookAlikes]:
    """Return the protocols of a verification set, and the pairs of classes that are neither genuine nor impostor.

    Raises:
        InvalidData: protocol.json is missing or malformed.
    """
    path = folder / PROTOCOL
    try:
        content = read_json(path, _MAX_BYTES)
        if not isinstance(content, dict):
            raise ValueError("expected an object of protocols by name")
        look_alikes = [_parse_pair(pair) for pair in _as_list(content.pop("look_alikes", []), "look_alikes")]
        protocols = [_parse_protocol(name, sides) for name, sides in content.items()]
        if not protocols:
            raise ValueError("it names no protocol")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidData(f"{path} is not a verification protocol: {reason}") from error
    return protocols, look_alikes


def _as_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {shortened(value)}")
    return value


def _parse_pair(pair: Any) -> tuple[int, int]:
    if not isinstance(pair, list) or len(pair) != 2 or any(type(label) is not int or label < 0 for label in pair):
        raise ValueError(f"look_alikes must hold pairs of class ids, got {shortened(pair)}")
    return pair[0], pair[1]


def _parse_protocol(name: str, sides: Any) -> Protocol:
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():  # lone surrogates are not printable either
        raise ValueError(f"a protocol's name must be 1 to {_MAX_NAME} printable characters, got {shortened(name)}")
    if not isinstance(sides, dict):
        raise ValueError(f"{name!r} must be an object with 'probe' and 'gallery', got {shortened(sides)}")
    probe, gallery = (_parse_designs(name, side, sides.get(side)) for side in ("probe", "gallery"))
    return Protocol(name, probe, gallery)


def _parse_designs(name: str, side: str, designs: Any) -> frozenset[str] | None:
    if designs == _ALL:
        return None
    if not isinstance(designs, list) or not designs or not all(isinstance(design, str) for design in designs):
        raise ValueError(
            f"{side!r} of {name!r} must be a list of designs, got {shortened(designs)}; {_ALL!r} means any"
        )
    return frozenset(designs)


def check_protocol(
    folder: Path,
    protocol: Protocol,
    look_alikes: LookAlikes,
    labels: npt.NDArray[np.int64],
    designs: Sequence[str],
) -> None:
    """Check that a protocol has something to compare. Time follows the samples, not the pairs.

    Args:
        labels: [N], class ids of the set's samples.
        designs: N names, of the samples' designs.

    Raises:
        InvalidData: a design does not occur, or there is no genuine or no impostor pair.
    """
    where = f"{folder / PROTOCOL}: protocol {protocol.name!r}"
    known = set(designs)
    for design in sorted((protocol.probe or frozenset()) | (protocol.gallery or frozenset())):
        if design not in known:
            shown = [name for name in sorted(known) if name.isprintable()][:20]
            raise InvalidData(f"{where}, design: {describe_unknown(design, shown)}")
    genuine, impostors = count_pairs(protocol, look_alikes, labels, designs)
    for kind, count in (("genuine pairs, of two samples of a class", genuine), ("impostor pairs", impostors)):
        if not count:
            raise InvalidData(f"{where} has no {kind}; nothing can be measured")


def count_pairs(
    protocol: Protocol, look_alikes: LookAlikes, labels: npt.NDArray[np.int64], designs: Sequence[str]
) -> tuple[int, int]:
    """Return the numbers of genuine and of impostor pairs, as :func:`~partialfc.evaluate.verification.score_pairs`
    compares them.
    """
    probe, gallery = protocol.sides(designs)
    classes = int(labels.max(initial=-1)) + 1
    # Of each class: its probes, its gallery, and the samples that are both.
    p, g, b = (np.bincount(labels[side], minlength=classes).tolist() for side in (probe, gallery, probe & gallery))

    def pairs(probes: int, others: int, both: int) -> int:
        return probes * others - both - both * (both - 1) // 2  # not with itself, and in one of two orders

    genuine = sum(map(pairs, p, g, b))
    left_out = {(min(pair), max(pair)) for pair in look_alikes if pair[0] != pair[1] and max(pair) < classes}
    alike = sum(p[x] * g[y] + p[y] * g[x] - b[x] * b[y] for x, y in left_out)
    return genuine, pairs(sum(p), sum(g), sum(b)) - genuine - alike
