"""Conversions in the tests: sources, the call with few arguments, and what came of it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image

from partialfc.data.convert.detect import open_source
from partialfc.data.convert.images import ImageSettings
from partialfc.data.convert.pipeline import ConvertReport, Options, convert
from partialfc.data.convert.plan import Selection
from partialfc.data.dataset import TarDataset
from partialfc.data.offsets import OFFSETS

FIXTURES = Path(__file__).parents[1] / "fixtures" / "insightface"


def picture(number: int, extension: str = "png") -> bytes:
    """Return an image of few bytes, another one for each number below 2**24."""
    encoded = io.BytesIO()
    pixels = Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536))
    pixels.save(encoded, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension))
    return encoded.getvalue()


def write_folders(root: Path, identities: dict[str, int]) -> Path:
    """Write so many images for each identity, called 000.png and so on; no two are equal."""
    number = 0
    for name, images in identities.items():
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i:03d}.png").write_bytes(picture(number))
            number += 1
    return root


def run(source: Path, out: Path, *, workers: int = 1, overwrite: bool = False, **options: Any) -> ConvertReport:
    """Convert; keywords are fields of the options, of the selection and of the image settings."""
    selection = {name: options.pop(name) for name in Selection.__dataclass_fields__ if name in options}
    images = {name: options.pop(name) for name in ImageSettings.__dataclass_fields__ if name in options}
    chosen = Options(selection=Selection(**selection), images=ImageSettings(**images), **options)
    return convert(open_source(source), source, out, chosen, workers, overwrite)


def samples(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the class name and the SHA-256 of each sample, by key."""
    data = TarDataset(folder)
    found = {}
    for i in range(len(data)):
        name = data.classes[int(data.labels[i])]["name"]
        found[data.key(i)] = (name, hashlib.sha256(data.read(i)).hexdigest())
    assert len(found) == len(data), "two samples have one key"
    return found


def class_names(folder: Path) -> list[str]:
    return [entry["name"] for entry in TarDataset(folder).classes]


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, but for the index that reading makes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and OFFSETS not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
