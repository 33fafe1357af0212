"""The glyph data set: classes are Han characters, samples are their drawings in different typeface designs.

A real task shaped like face recognition: many classes, few samples each, large differences within a class, tiny
ones between classes, and an open-set protocol with characters and designs that training never sees.

The folder holds the training set itself, ``verification/`` (held-out characters in all designs, with
``protocol.json``) and ``closed_set/`` (the training characters in the held-out designs). The key of a sample is
``u<code point>-<design>``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from partialfc.data.dataset import read_index
from partialfc.data.glyphs import choice as glyph_choice
from partialfc.data.glyphs import render
from partialfc.data.glyphs.choice import Choice, Codepoints
from partialfc.data.glyphs.fonts import Design, FontFile, design_set, fetch_fonts, find_fonts
from partialfc.data.pool import Pool
from partialfc.data.writer import INDEX, DatasetWriter, check_target
from partialfc.errors import ConfigError, DataError
from partialfc.files import write_atomically
from partialfc.tracking.console import Progress, no_progress

SIZES = (32, 64, 112)
VERIFICATION, CLOSED_SET, PROTOCOL = "verification", "closed_set", "protocol.json"
_FORMAT = 1  # increment when the same arguments give different bytes
_CODEPOINTS_PER_TASK = 1024
_SPOOL = ".glyphs.spool"


@dataclass(frozen=True)
class GlyphReport:
    """Summary of the data set that :func:`make_glyphs` wrote, or found."""

    folder: Path
    num_classes: int
    num_samples: int
    held_out_characters: int
    verification_samples: int
    closed_set_samples: int
    look_alikes: int
    training_designs: list[str]
    held_out_designs: list[str]
    digests: dict[str, str]  # of the data set folders: training, verification, closed_set
    seconds: float
    reused: bool

    @property
    def verification(self) -> Path:
        return self.folder / VERIFICATION

    @property
    def closed_set(self) -> Path:
        return self.folder / CLOSED_SET


def make_glyphs(
    out: Path,
    num_classes: int,
    size: int = 32,
    fonts: str = "small",
    cache_dir: Path | None = None,
    font_dir: Path | None = None,
    workers: int | None = None,
    progress: Progress = no_progress,
    overwrite: bool = False,
) -> GlyphReport:
    """Fetch the fonts, choose and draw the characters, and write the data set folders below ``out``.

    The same arguments and font files give the same bytes, for any ``workers``. A folder that already holds this data
    set is left unchanged; one that holds another is refused unless ``overwrite``.

    Args:
        size: width and height of the images: 32, 64 or 112.
        fonts: ``small``, ``core`` or ``all``.
        workers: drawing processes; None: one per core.
    Raises:
        ConfigError: an argument is out of range, or the fonts have too few characters.
        DataError: fonts cannot be fetched, or ``out`` holds something else.
    """
    started = time.monotonic()
    out = Path(out)
    if size not in SIZES:
        raise ConfigError(f"size must be one of {', '.join(map(str, SIZES))}, got {size}")
    if num_classes < 2:
        raise ConfigError(f"num_classes must be at least 2, got {num_classes}")
    designs = design_set(fonts)
    arguments = {"kind": "glyphs", "format": _FORMAT, "num_classes": num_classes, "size": size, "fonts": fonts}
    if not overwrite and (out / INDEX).exists():
        _require_same_data_set(out, arguments, find_fonts(designs, cache_dir, font_dir))
        return _report(out, designs, started, reused=True)
    check_target(out, overwrite)  # before the long work, not after it
    files = fetch_fonts(designs, cache_dir, font_dir, progress)
    source = {**arguments, "files": _digests(files), "made_with": {"pillow": PIL.__version__}}
    with Pool(workers) as pool:
        choice, drawn = _scan_and_choose(designs, files, num_classes, pool, progress)
        with DatasetWriter(out, overwrite=overwrite) as writer, _Spool(out / _SPOOL) as spool:
            spool.draw(_wanted(drawn, choice), size, pool, progress)
            _write_verification(out / VERIFICATION, drawn, choice, spool, source, progress)
            _write_closed_set(out / CLOSED_SET, drawn, choice, spool, source, progress)
            training = [design for design in drawn if not design.held_out]
            _write(writer, training, choice.training, spool, source, progress)  # last: it completes the data set
    return _report(out, designs, started, reused=False)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A design as it will be drawn: the code points from each of its font files, and their typical size."""

    name: str
    held_out: bool
    parts: tuple[tuple[FontFile, Codepoints], ...]  # disjoint
    typical_extent: float

    @property
    def codepoints(self) -> Codepoints:
        return np.sort(np.concatenate([codepoints for _, codepoints in self.parts]))


def _scan_and_choose(
    designs: Sequence[Design], files: dict[str, tuple[FontFile, ...]], num_classes: int, pool: Pool, progress: Progress
) -> tuple[Choice, list[_Drawn]]:
    """Draw all characters of as few Unicode blocks as ``num_classes`` needs, then choose among those that exist."""
    faces = list(dict.fromkeys(file for design in designs for file in files[design.name]))
    mapped = dict(zip(faces, pool.map(render.han_codepoints, [(face,) for face in faces]), strict=True))
    training = [design for design in designs if not design.held_out]
    in_cmap = [np.unique(np.concatenate([mapped[file] for file in files[design.name]])) for design in training]
    codepoints, counts = glyph_choice.count_designs(in_cmap)
    promised = codepoints[counts >= glyph_choice.designs_required(len(training))]
    scans: dict[FontFile, list[render.Scan]] = {face: [] for face in faces}
    needed = num_classes + glyph_choice.num_held_out(num_classes)
    pending: list[tuple[int, int]] = []
    reach = 0
    for number, block in enumerate(render.HAN_BLOCKS):
        pending += block
        reach += int(_inside(promised, block).sum())
        last = number == len(render.HAN_BLOCKS) - 1
        if reach < needed and not last:
            continue
        _scan(scans, mapped, pending, pool, progress)
        pending = []
        drawn = [_merge(design, files[design.name], scans) for design in designs]
        try:
            choice = glyph_choice.choose(
                [design.codepoints for design in drawn if not design.held_out],
                [design.codepoints for design in drawn if design.held_out],
                num_classes,
            )
        except ConfigError:  # the cmaps promised more characters than the fonts have
            if last:
                raise
            continue
        return choice, drawn
    raise AssertionError("the last block either gives a choice or raises")


def _inside(codepoints: Codepoints, block: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    return np.any([(first <= codepoints) & (codepoints <= last) for first, last in block], axis=0)


def _scan(
    scans: dict[FontFile, list[render.Scan]],
    mapped: dict[FontFile, Codepoints],
    block: Sequence[tuple[int, int]],
    pool: Pool,
    progress: Progress,
) -> None:
    tasks = [(face, part) for face in mapped for part in _pieces(mapped[face][_inside(mapped[face], block)])]
    with progress("scanning fonts", sum(len(part) for _, part in tasks)) as advance:
        for (face, part), result in zip(tasks, pool.map(render.scan, tasks), strict=True):
            scans[face].append(result)
            advance(len(part))


def _pieces(codepoints: Codepoints) -> list[Codepoints]:
    return [codepoints[i : i + _CODEPOINTS_PER_TASK] for i in range(0, len(codepoints), _CODEPOINTS_PER_TASK)]


def _merge(design: Design, files: Sequence[FontFile], scans: dict[FontFile, list[render.Scan]]) -> _Drawn:
    """Combine the font files of a design: each character comes from the first file that really has it."""
    parts, seen = list[tuple[FontFile, Codepoints]](), np.empty(0, dtype=np.int64)
    for file in files:
        if scans[file]:
            usable = np.setdiff1d(glyph_choice.without_placeholders(scans[file]), seen)
            parts.append((file, usable))
            seen = np.concatenate([seen, usable])
    if not len(seen):
        raise DataError(f"font {files[0].path} has no usable Han characters; is it the right file for {design.name}?")
    extents = np.concatenate([scan.extents for file in files for scan in scans[file]])
    return _Drawn(design.name, design.held_out, tuple(parts), float(np.median(extents)))


def _wanted(drawn: Sequence[_Drawn], choice: Choice) -> list[_Drawn]:
    """Return the designs, reduced to the chosen characters."""
    chosen = np.concatenate([choice.training, choice.held_out])
    return [
        _Drawn(
            design.name,
            design.held_out,
            tuple((file, codepoints[np.isin(codepoints, chosen)]) for file, codepoints in design.parts),
            design.typical_extent,
        )
        for design in drawn
    ]


class _Spool:
    """Temporary file of encoded images: a large set exceeds memory, and is written in a different order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by __exit__
        self._places: dict[str, tuple[Codepoints, npt.NDArray[np.int64]]] = {}  # design -> code points, byte limits

    def draw(self, designs: Sequence[_Drawn], size: int, pool: Pool, progress: Progress) -> None:
        tasks = [
            (design, (file, part, size, render.em_for(size, design.typical_extent)))
            for design in designs
            for file, codepoints in design.parts
            for part in _pieces(codepoints)
        ]
        codepoints: dict[str, list[Codepoints]] = {design.name: [] for design in designs}
        limits: dict[str, list[tuple[int, int]]] = {design.name: [] for design in designs}
        position = 0
        with progress("drawing", sum(len(task[1]) for _, task in tasks)) as advance:
            results = pool.map(render.render, [task for _, task in tasks])
            for (design, task), images in zip(tasks, results, strict=True):
                codepoints[design.name].append(task[1])
                for image in images:
                    limits[design.name].append((position, position + len(image)))
                    position += len(image)
                self._file.write(b"".join(images))
                advance(len(images))
        self._file.flush()
        for design in designs:
            if limits[design.name]:
                drawn = np.concatenate(codepoints[design.name])
                order = np.argsort(drawn)
                self._places[design.name] = drawn[order], np.array(limits[design.name], dtype=np.int64)[order]

    def codepoints(self, design: str) -> Codepoints:
        """Return the drawn characters of a design, ascending."""
        return self._places[design][0] if design in self._places else np.empty(0, dtype=np.int64)

    def read(self, design: str, codepoint: int) -> bytes:
        codepoints, limits = self._places[design]
        start, stop = limits[np.searchsorted(codepoints, codepoint)].tolist()
        return os.pread(self._file.fileno(), stop - start, start)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _write(
    writer: DatasetWriter,
    designs: Sequence[_Drawn],
    classes: Codepoints,  # [num_classes]: position = label
    spool: _Spool,
    source: dict[str, Any],
    progress: Progress,
) -> None:
    """Write these characters in these designs as one data set folder."""
    samples = list[tuple[int, int, str, int]]()  # (place in the order, label, design, code point)
    for design in designs:
        present = spool.codepoints(design.name)
        present = present[np.isin(present, classes)]
        keys = glyph_choice.shuffle_keys(present, design.name)
        labels = np.searchsorted(classes, present)
        samples += zip(keys.tolist(), labels.tolist(), [design.name] * len(present), present.tolist(), strict=True)
    samples.sort()
    with progress(f"writing {writer.folder}", len(samples)) as advance:
        for _, label, name, codepoint in samples:
            writer.write(f"u{codepoint:04X}-{name}", spool.read(name, codepoint), "png", label)
            advance()
    table = [{"name": chr(codepoint), "codepoint": f"U+{codepoint:04X}"} for codepoint in classes.tolist()]
    writer.finish(table, {"source": source})


def _write_closed_set(
    folder: Path, drawn: Sequence[_Drawn], choice: Choice, spool: _Spool, source: dict[str, Any], progress: Progress
) -> None:
    with DatasetWriter(folder, overwrite=True) as writer:
        _write(writer, [design for design in drawn if design.held_out], choice.training, spool, source, progress)


def _write_verification(
    folder: Path, drawn: Sequence[_Drawn], choice: Choice, spool: _Spool, source: dict[str, Any], progress: Progress
) -> None:
    # A design that has none of these characters has nothing to be compared.
    shown = [design for design in drawn if np.isin(spool.codepoints(design.name), choice.held_out).any()]
    training = [design.name for design in shown if not design.held_out]
    held_out = [design.name for design in shown if design.held_out]
    protocol = {
        "unseen_characters": {"probe": training, "gallery": training},
        "unseen_font": {"probe": held_out, "gallery": training},
        "look_alikes": _look_alikes(training, choice.held_out, spool, progress),
    }
    with DatasetWriter(folder, overwrite=True) as writer:
        write_atomically(folder / PROTOCOL, json.dumps(protocol, indent=1))
        _write(writer, drawn, choice.held_out, spool, source, progress)


def _look_alikes(designs: Sequence[str], held_out: Codepoints, spool: _Spool, progress: Progress) -> list[list[int]]:
    """Return the pairs of held-out class ids that some training design draws (nearly) alike."""
    pairs = set[tuple[int, int]]()
    with progress("comparing held-out characters", len(designs)) as advance:
        for name in designs:
            present = np.intersect1d(spool.codepoints(name), held_out)
            if len(present):
                images = np.stack([_pixels(spool.read(name, codepoint)) for codepoint in present.tolist()])
                labels = np.searchsorted(held_out, present)
                pairs.update((int(labels[i]), int(labels[j])) for i, j in glyph_choice.look_alikes(images))
            advance()
    return [list(pair) for pair in sorted(pairs)]


def _pixels(png: bytes) -> npt.NDArray[np.float32]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image, dtype=np.float32).ravel()


def _digests(files: dict[str, tuple[FontFile, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"file": font.path.name, "index": font.index, "sha256": font.digest()} for font in fonts]
        for name, fonts in files.items()
    }


def _require_same_data_set(out: Path, arguments: dict[str, Any], fonts: dict[str, tuple[FontFile, ...] | None]) -> None:
    """Raise a DataError unless ``out`` holds the complete data set of these arguments and this machine's fonts."""
    source = read_index(out).get("source")
    source = source if isinstance(source, dict) else {}
    found = {name: source.get(name) for name in arguments}
    if found != arguments:
        differing = ", ".join(f"{name}={found[name]}" for name in arguments if found[name] != arguments[name])
        raise DataError(f"{out} holds a different data set ({differing}); choose another folder, or pass --overwrite")
    here = _digests({name: files for name, files in fonts.items() if files is not None})
    recorded = source.get("files", {})
    if any(recorded.get(name) != files for name, files in here.items()):
        raise DataError(f"{out} was made from other versions of the fonts; choose another folder, or pass --overwrite")
    for folder in (out, out / VERIFICATION, out / CLOSED_SET):
        for shard in read_index(folder)["shardlist"]:
            path = folder / shard["url"]
            if not path.is_file() or path.stat().st_size != shard["nbytes"]:
                raise DataError(f"{path} is missing or damaged; pass --overwrite to make the data set again")


def _report(out: Path, designs: Sequence[Design], started: float, reused: bool) -> GlyphReport:
    training, verification, closed_set = (read_index(out / name) for name in ("", VERIFICATION, CLOSED_SET))
    protocol = json.loads((out / VERIFICATION / PROTOCOL).read_bytes())
    return GlyphReport(
        folder=out,
        num_classes=training["num_classes"],
        num_samples=training["num_samples"],
        held_out_characters=verification["num_classes"],
        verification_samples=verification["num_samples"],
        closed_set_samples=closed_set["num_samples"],
        look_alikes=len(protocol["look_alikes"]),
        training_designs=[design.name for design in designs if not design.held_out],
        held_out_designs=[design.name for design in designs if design.held_out],
        digests={
            "training": training["digest"],
            "verification": verification["digest"],
            "closed_set": closed_set["digest"],
        },
        seconds=time.monotonic() - started,
        reused=reused,
    )
