"""Samples of a shard, in the WebDataset convention: consecutive members with one key, among them an image and a label.

The key is a member's name up to the first dot of its last part, folder kept; the rest, in lower case, is its extension.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from partialfc.data.tar import IMAGE_EXTENSIONS, Member, TarReader
from partialfc.errors import InvalidData
from partialfc.files import open_regular

READ_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "jpeg"))
MAX_LABEL_BYTES = 1024

_MAX_DIGITS = 18  # of an int64


class Sample(NamedTuple):
    """An image and its class in a shard."""

    key: str
    label: bytes  # content of the .cls, without white space around it
    offset: int  # of the image
    size: int


def class_id(label: bytes) -> int | None:
    """Return the class id that a label gives in decimal; None if it is a name."""
    return int(label) if label.isdigit() and len(label) <= _MAX_DIGITS else None


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and extension of a member; None for what belongs to no sample: no dot, a hidden file, ``__x__``."""
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot <= start or (name.startswith("__") and "__" in name[2:].partition("/")[0]):
        return None
    return name[:dot], name[dot + 1 :].lower()


def walk_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard. A group without image and label, such as a README, is none.

    Raises:
        OSError: the file cannot be read.
        InvalidData: a sample lacks its image or label, or has two; or as :meth:`TarReader.members`.
    """
    with open_regular(path) as file:
        tar = TarReader(file, path)
        key, members = "", dict[str, Member]()
        for member in tar.members():
            parts = split_name(member.name)
            if parts is None:
                continue
            if parts[0] != key:
                if (sample := _sample(key, members, tar)) is not None:
                    yield sample
                key, members = parts[0], {}
            if parts[1] in members:
                raise InvalidData(f"{path}: sample {key!r} has two members .{parts[1]}")
            members[parts[1]] = member
        if (sample := _sample(key, members, tar)) is not None:
            yield sample


def _sample(key: str, members: dict[str, Member], tar: TarReader) -> Sample | None:
    label, images = members.get("cls"), members.keys() & READ_EXTENSIONS
    if label is None and not images and not any(_is_image(extension) for extension in members):
        return None
    if label is None or len(images) != 1:
        raise InvalidData(
            f"{tar.path}: sample {key!r} needs one image ({', '.join(IMAGE_EXTENSIONS)}) and one .cls with its class, "
            f"directly after one another; it has {', '.join('.' + extension for extension in members)}. "
            "`partialfc data convert` takes other labels and arrangements"
        )
    if label.size > MAX_LABEL_BYTES:
        raise InvalidData(f"{tar.path}: label of sample {key!r} has {label.size:,} bytes; it must be a class, not data")
    text = tar.read(label.offset, label.size).strip()
    if not text:
        raise InvalidData(f"{tar.path}: label of sample {key!r} is empty")
    image = members[images.pop()]
    return Sample(key, text, image.offset, image.size)


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in READ_EXTENSIONS
