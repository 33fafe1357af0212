"""``partialfc data inspect``: what a set holds, in numbers and in pictures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from partialfc.data.class_table import class_names
from partialfc.data.dataset import TarDataset
from partialfc.data.decode import BadImage, open_image, require_plausible_size, to_8_bits
from partialfc.data.offsets import Integers
from partialfc.tracking.console import format_bytes, printable

_MAX_PIXELS = 178_956_970  # Pillow's own limit
_LOOKED_AT = 1000  # images, of which sizes and modes are counted
_BAR = 40  # characters
_CLASSES, _IMAGES, _SIDE, _MARGIN, _TEXT = 12, 8, 96, 6, 22  # of the sheet; the last three in pixels
_PAPER, _INK, _MISSING = (250, 250, 250), (30, 30, 30), (225, 225, 225)
_PIECE = 1 << 24  # labels


def count_samples(dataset: TarDataset) -> Integers:
    """Return the number of samples of each class, int64 [num_classes]."""
    counts, labels = np.zeros(dataset.num_classes, dtype=np.int64), dataset.labels
    for start in range(0, len(labels), _PIECE):
        counts += np.bincount(labels[start : start + _PIECE], minlength=len(counts))
    return counts


def describe_set(dataset: TarDataset, counts: Integers, seed: int = 0) -> list[str]:
    """Return lines on classes, samples, samples per class, image sizes and modes, and shards.

    Args:
        counts: samples of each class, of :func:`count_samples`.
        seed: of the choice of images that are looked at.

    Raises:
        InvalidData: a shard was replaced.
        DataUnavailable: a shard cannot be read.
    """
    sizes = [shard.num_bytes for shard in dataset.shards]
    lines = [
        f"{dataset.folder}: {dataset.num_samples:,} samples of {dataset.num_classes:,} classes, "
        f"{len(sizes):,} shards, {format_bytes(sum(sizes))}",
        *_samples_per_class(counts),
    ]
    if dataset.num_samples:
        lines += _images(dataset, np.random.default_rng(seed))
    if sizes:
        middle = statistics.median(sizes)
        words = f"{format_bytes(min(sizes))} … {format_bytes(middle)} … {format_bytes(max(sizes))}"
        lines.append(f"shards: {words} (smallest, median, largest)")
    source = dataset.index.get("source")
    return [*lines, f"source: {json.dumps(source, ensure_ascii=False)}"] if source else lines


def _samples_per_class(counts: Integers) -> list[str]:
    """Return a histogram over the powers of two."""
    if not len(counts):
        return []
    words = f"least {counts.min():,}, median {np.median(counts):,.0f}, most {counts.max():,}"
    buckets = np.where(counts > 0, np.frexp(counts)[1], 0)  # 0: none; k: 2**(k-1) … 2**k - 1
    numbers = np.bincount(buckets)
    rows = []
    for bucket in range(np.flatnonzero(numbers)[0], len(numbers)):
        first, last = (2 ** (bucket - 1), 2**bucket - 1) if bucket else (0, 0)
        rows.append((f"{first:,}" if first == last else f"{first:,}–{last:,}", int(numbers[bucket])))
    width, longest = max(len(name) for name, _ in rows), max(number for _, number in rows)
    bars = [f"  {name:>{width}}  {'█' * -(-_BAR * number // longest):<{_BAR}}  {number:,}" for name, number in rows]
    return [f"samples per class: {words}; classes by their samples:", *bars]


@dataclass(frozen=True)
class _Look:
    """What the header of an image says."""

    size: str
    kind: str  # format and mode
    num_bytes: int


def _images(dataset: TarDataset, draw: np.random.Generator) -> list[str]:
    some = np.sort(draw.choice(dataset.num_samples, min(_LOOKED_AT, dataset.num_samples), replace=False))
    looks, bad = [], []
    for index in some.tolist():
        try:
            looks.append(_look(dataset, index))
        except BadImage as error:
            bad.append(f"{dataset.describe(index)} {error}")
    lines = [f"images, of {len(some):,} looked at:"]
    for name, found in (("sizes", [look.size for look in looks]), ("kinds", [look.kind for look in looks])):
        common = Counter(found).most_common(6)
        words = ", ".join(f"{value} {count / len(some):.1%}" for value, count in common)
        rest = len(set(found)) - len(common)
        lines.append(f"  {name}: {words or 'none'}" + (f" and {rest:,} more" if rest else ""))
    if looks:
        sizes = [look.num_bytes for look in looks]
        middle = format_bytes(statistics.median(sizes))
        lines.append(f"  bytes: {format_bytes(min(sizes))} … {middle} … {format_bytes(max(sizes))}")
    return lines + ([f"  {len(bad):,} cannot be used, the first: {bad[0]}"] if bad else [])


def _look(dataset: TarDataset, index: int) -> _Look:
    with _open(dataset, index) as image:
        return _Look(f"{image.width}×{image.height}", f"{image.format} {image.mode}", dataset.num_bytes(index))


def _open(dataset: TarDataset, index: int) -> AbstractContextManager[Image.Image]:
    require_plausible_size(dataset.num_bytes(index), _MAX_PIXELS)
    return open_image(dataset.read(index), _MAX_PIXELS)


def draw_sheet(dataset: TarDataset, counts: Integers, file: Path, seed: int = 0) -> int:
    """Draw a PNG of random classes that have samples, one a row, with name, count and some images of each.

    Args:
        counts: samples of each class, of :func:`count_samples`.
        seed: of the choice.

    Returns:
        number of classes drawn.

    Raises:
        OSError: the file cannot be written.
        InvalidData: the class table is damaged.
        DataUnavailable: a shard cannot be read.
    """
    draw = np.random.default_rng(seed)
    filled = np.flatnonzero(counts)
    chosen: list[int] = np.sort(draw.choice(filled, min(_CLASSES, len(filled)), replace=False)).tolist()
    names = _names(dataset, chosen)
    width = _MARGIN + _IMAGES * (_SIDE + _MARGIN)
    sheet = Image.new("RGB", (width, _MARGIN + max(1, len(chosen)) * (_SIDE + _TEXT + _MARGIN)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), _font()
    for row, label in enumerate(chosen):
        top = _MARGIN + row * (_SIDE + _TEXT + _MARGIN)
        samples = _samples_of(dataset, label)
        some = np.sort(draw.choice(samples, min(_IMAGES, len(samples)), replace=False))
        pen.text((_MARGIN, top), f"class {label:,}, {len(samples):,} images  {names[label]}", _INK, font)
        for column, index in enumerate(some.tolist()):
            place = (_MARGIN + column * (_SIDE + _MARGIN), top + _TEXT)
            image = _thumbnail(dataset, index)
            if image is None:
                pen.rectangle((*place, place[0] + _SIDE - 1, place[1] + _SIDE - 1), _MISSING)
                pen.line((*place, place[0] + _SIDE - 1, place[1] + _SIDE - 1), _INK)
            else:
                sheet.paste(image, (place[0] + (_SIDE - image.width) // 2, place[1] + (_SIDE - image.height) // 2))
    sheet.save(file, "PNG")
    return len(chosen)


def _names(dataset: TarDataset, chosen: list[int]) -> dict[int, str]:
    names = {}
    if dataset.class_table.exists() and chosen:
        wanted = set(chosen)
        for label, name in enumerate(islice(class_names(dataset.class_table), max(chosen) + 1)):
            if label in wanted:
                names[label] = printable(name)
    return {label: names.get(label, "") for label in chosen}


def _samples_of(dataset: TarDataset, label: int) -> Integers:
    labels = dataset.labels
    pieces = range(0, len(labels), _PIECE)
    return np.concatenate([start + np.flatnonzero(labels[start : start + _PIECE] == label) for start in pieces])


def _thumbnail(dataset: TarDataset, index: int) -> Image.Image | None:
    """Return an image that fits into its place on the sheet; None of one that cannot be used."""
    try:
        with _open(dataset, index) as image:
            small = to_8_bits(image).convert("RGB")
    except BadImage:
        return None
    scale = _SIDE / max(small.size)
    return small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))


def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # whose font has more letters than Pillow's

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 13)
