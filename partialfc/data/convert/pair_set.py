"""Conversion of a set of pairs into a verification folder: tars of its images, equal ones once, and ``pairs.csv``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from partialfc.data.convert.images import ImageSettings, prepare
from partialfc.data.convert.pair_bin import read_pair_bin
from partialfc.data.convert.pair_lists import is_pair_list, read_pair_list
from partialfc.data.convert.provenance import describe_source
from partialfc.data.convert.source import Unreadable, sample_key
from partialfc.data.dataset import DatasetWriter
from partialfc.data.pairs import Pair, folds_in_order, write_pairs
from partialfc.errors import ConfigError, DataError, DataUnavailable, InvalidData
from partialfc.files import open_regular, read_bounded
from partialfc.tracking.console import Progress, no_progress

_MAX_IMAGE_BYTES = 1 << 30
_EXTENSIONS = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class PairReport:
    """What was converted.

    Attributes:
        images: images that the pairs name, before equal ones became one.
        stored: samples of the folder.
        contradictions: impostor pairs of images that genuine pairs declare to show the same identity.
    """

    pairs: int
    genuine: int
    folds: int
    images: int
    stored: int
    contradictions: int


@dataclass(frozen=True)
class _Source:
    """Pairs of images by name, whatever holds them."""

    kind: str
    pairs: list[Pair]
    read: Callable[[str], bytes]  # raises DataError
    key: Callable[[str], str]


def is_pair_set(source: Path) -> bool:
    """Return True if ``source`` is a set of pairs: a ``.bin`` of InsightFace, or a list."""
    return _is_bin(source) or is_pair_list(source)


def convert_pairs(
    source: Path,
    out: Path,
    images: Path | None = None,
    settings: ImageSettings = ImageSettings(),  # noqa: B008  # immutable
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> PairReport:
    """Write a verification folder from a ``.bin`` of InsightFace, or from a list of pairs and the images it names.

    The identities of such a set are unknown but for its pairs: two images are of one class if genuine pairs link them,
    directly or over others. The class is named after the first of them.

    Args:
        images: folder of the images; default: the list's own, or for CFP the folder that ``Protocol`` lies in.
        settings: what becomes of every image; all are decoded.
        overwrite: replace the contents of ``out``.

    Raises:
        ConfigError: ``images`` is given for a ``.bin``, or ``out`` is not empty.
        InvalidData: the source is not what it seems, or an image is missing or cannot be decoded: a benchmark without
            some of its pairs is another one.
        DataUnavailable: an image cannot be read, or ``out`` cannot be written.
    """
    is_bin = _is_bin(source)
    if is_bin and images is not None:
        raise ConfigError(f"--images: {source} holds its images itself")
    found = _open_bin(source) if is_bin else _open_list(source, images)
    names = list(dict.fromkeys(name for pair in found.pairs for name in (pair.first, pair.second)))
    settings = replace(settings, decode=True)
    digests = _check_images(found, names, source, settings, progress)
    first_of = dict(zip(reversed([digests[name] for name in names]), reversed(names), strict=True))
    stored = {name: first_of[digests[name]] for name in names}  # name of the image that stands for it
    labels, classes = _link((stored[pair.first], stored[pair.second]) for pair in found.pairs if pair.same)
    kept = list(dict.fromkeys(stored.values()))
    for name in kept:  # of impostor pairs only
        if name not in labels:
            labels[name] = len(classes)
            classes.append(name)
    keys = _keys(kept, found.key, digests)
    pairs = [pair._replace(first=keys[stored[pair.first]], second=keys[stored[pair.second]]) for pair in found.pairs]
    try:
        with DatasetWriter(out, overwrite=overwrite) as writer, progress(f"writing {out}", len(kept)) as advance:
            for name in kept:
                data, extension = _prepared(found.read(name), settings, name, source)
                writer.write(keys[name], data, extension, labels[name])
                advance()
            write_pairs(out, pairs)
            recorded = {"images": {"resize": settings.resize, "fit": settings.fit}}
            extra = {"source": describe_source(found.kind, source), "options": recorded}
            writer.finish([{"name": keys[name]} for name in classes], extra)
    except OSError as error:
        raise DataUnavailable(f"{error.filename or out} cannot be written: {error.strerror}") from error
    return PairReport(
        pairs=len(pairs),
        genuine=sum(pair.same for pair in pairs),
        folds=len({pair.fold for pair in pairs}),
        images=len(names),
        stored=len(kept),
        contradictions=sum(
            not pair.same and labels[stored[pair.first]] == labels[stored[pair.second]] for pair in found.pairs
        ),
    )


def _is_bin(source: Path) -> bool:
    if source.suffix != ".bin":
        return False
    try:
        with open_regular(source) as file:
            return file.read(1) in (b"\x80", b"(", b"]")
    except OSError:
        return False


def _open_bin(source: Path) -> _Source:
    encoded, same = read_pair_bin(source)
    folds = folds_in_order(len(same)).tolist()
    pairs = [Pair(str(2 * i), str(2 * i + 1), same[i], folds[i]) for i in range(len(same))]
    digits = len(str(len(encoded) - 1))
    return _Source("insightface-bin", pairs, lambda name: encoded[int(name)], lambda name: name.zfill(digits))


def _open_list(source: Path, images: Path | None) -> _Source:
    pairs = read_pair_list(source)
    root = images or (source.absolute().parents[2] if source.is_dir() else source.parent)
    places: dict[str, Path] = {}

    def read(name: str) -> bytes:
        path = places.get(name) or places.setdefault(name, _find_image(root, name, source))
        try:
            return read_bounded(path, _MAX_IMAGE_BYTES)
        except OSError as error:
            raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error

    def key(name: str) -> str:
        stem, extension = os.path.splitext(name)
        return sample_key(stem if extension.lower() in _EXTENSIONS else name)  # or a part of a name: "J.K._Name_0001"

    return _Source("pair-list", pairs, read, key)


def _find_image(root: Path, name: str, source: Path) -> Path:
    for extension in ("", *_EXTENSIONS):  # a list may leave it out
        path = root / f"{name}{extension}"
        if path.is_file():
            if not path.resolve().is_relative_to(root.resolve()):
                raise InvalidData(f"{path} is a link that leads out of {root}")
            return path
    raise InvalidData(
        f"{source} names {name}, and there is no such image in {root}; name the folder of the images: --images FOLDER"
    )


def _check_images(
    found: _Source, names: list[str], source: Path, settings: ImageSettings, progress: Progress
) -> dict[str, bytes]:
    """Decode each image, and return the digests of their bytes by name."""
    digests = {}
    with progress(f"checking {source.name}", len(names)) as advance:
        for name in names:
            data = found.read(name)
            digests[name] = hashlib.sha256(data).digest()
            _prepared(data, settings, name, source)
            advance()
    return digests


def _prepared(data: bytes, settings: ImageSettings, name: str, source: Path) -> tuple[bytes, str]:
    result = prepare(data, settings)
    if isinstance(result, Unreadable):
        raise InvalidData(f"{source}: image {name} {result.reason}")
    return result


def _link(pairs: Iterable[tuple[str, str]]) -> tuple[dict[str, int], list[str]]:
    """Return the class of each name, pairs of which are linked, and the first name of each class."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = name = parents[parents[name]]
        return name

    for first, second in pairs:
        parents[root(second)] = root(first)
    numbers: dict[str, int] = {}
    labels = {name: numbers.setdefault(root(name), len(numbers)) for name in list(parents)}
    firsts: dict[int, str] = {}
    for name, label in labels.items():
        firsts.setdefault(label, name)
    return labels, list(firsts.values())


def _keys(names: list[str], key: Callable[[str], str], digests: dict[str, bytes]) -> dict[str, str]:
    """Return a key for each name; where two would have the same one, the second ends in digits of its digest."""
    keys: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        found = key(name)
        if found in used:
            found = f"{found[:70]}~{digests[name].hex()[:16]}"
        if found in used:
            raise DataError(f"two images have the key {found!r}")
        used.add(found)
        keys[name] = found
    return keys
