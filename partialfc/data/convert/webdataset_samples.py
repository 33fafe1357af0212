"""Samples in a tar of WebDataset's convention, as others write them: their members need not follow each other.

The key of a member is its name up to the first dot of its last part; the rest, in lower case, is its extension. An
extension may have dots itself: of ``a.left.jpg`` it is ``left.jpg``, and ``left`` is its stem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from partialfc.data.convert.source import EXTENSIONS, Skipped
from partialfc.data.samples import split_name
from partialfc.data.tar import Member, TarReader
from partialfc.errors import InvalidData

_NO_SAMPLE = Skipped("member of a tar that belongs to no sample")
_NO_IMAGE = Skipped("sample without an image")


class LabelledImage(NamedTuple):
    """An image and the member that tells its class."""

    key: str
    image: Member
    label: Member


class Wanted(NamedTuple):
    """Which members are taken.

    Attributes:
        label: last part of the label's extension: ``cls``, ``txt``, ``json``.
        image: extension of the image; None takes those of image files.
    """

    label: str
    image: str | None

    def is_image(self, extension: str) -> bool:
        """Return True if a member of this extension is an image."""
        return extension == self.image if self.image else _stem_and_type(extension)[1] in EXTENSIONS

    def is_label(self, extension: str) -> bool:
        """Return True if a member of this extension is a label."""
        return extension == self.label or _stem_and_type(extension)[1] == self.label


def labelled_images(tar: TarReader, wanted: Wanted) -> Iterator[LabelledImage | Skipped]:
    """Yield the images of a tar with their labels. Only samples whose members lie apart take memory, until they meet.

    Raises:
        InvalidData: a member occurs twice in a sample, or several images share a label; or as ``TarReader.members``.
    """
    waiting: dict[str, dict[str, Member]] = {}
    key, members = "", dict[str, Member]()
    for member in tar.members():
        parts = split_name(member.name)
        if parts is None:
            yield _NO_SAMPLE
            continue
        if parts[0] != key:
            if members:
                yield from _complete(key, members, wanted, tar, waiting)
            key, members = parts[0], waiting.pop(parts[0], {})
        if parts[1] in members:
            raise InvalidData(f"{tar.path}: sample {key!r} has two members .{parts[1]}, one at byte {member.offset}")
        members[parts[1]] = member
    if members:
        yield from _complete(key, members, wanted, tar, waiting)
    for members in waiting.values():
        yield _rest(members, wanted)


def _complete(
    key: str, members: dict[str, Member], wanted: Wanted, tar: TarReader, waiting: dict[str, dict[str, Member]]
) -> Iterator[LabelledImage]:
    """Yield the images of a sample that have labels, or keep its members."""
    images = {_stem_and_type(extension)[0]: each for extension, each in members.items() if wanted.is_image(extension)}
    labels = {_stem_and_type(extension)[0]: each for extension, each in members.items() if wanted.is_label(extension)}
    num_images = sum(map(wanted.is_image, members))
    if num_images > len(images):
        raise InvalidData(_too_many(key, members, tar))
    together = images.keys() & labels.keys()
    if together:
        for stem in images:
            if stem in together:
                yield LabelledImage(f"{key}.{stem}" if len(together) > 1 and stem else key, images[stem], labels[stem])
    elif len(images) == 1 and len(labels) == 1:
        yield LabelledImage(key, *images.values(), *labels.values())
    elif images and labels:
        raise InvalidData(_too_many(key, members, tar))
    else:
        waiting[key] = members


def _too_many(key: str, members: Mapping[str, Member], tar: TarReader) -> str:
    extensions = ", ".join("." + extension for extension in members)
    return (
        f"{tar.path}: sample {key!r} has {extensions}: which is the image of which label? "
        "Choose an extension with --image-field"
    )


def _rest(members: Mapping[str, Member], wanted: Wanted) -> Skipped:
    return Skipped(f"image without .{wanted.label}") if any(map(wanted.is_image, members)) else _NO_IMAGE


def _stem_and_type(extension: str) -> tuple[str, str]:
    stem, _, type = extension.rpartition(".")
    return stem, type
