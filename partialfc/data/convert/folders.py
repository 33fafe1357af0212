"""A folder per identity as a source: the images below ``SOURCE/<identity>/``, at any depth.

Links are not followed. Hidden files and folders are left out, and what Macs and Windows leave behind.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from partialfc.data.convert.image_root import too_large
from partialfc.data.convert.source import EXTENSIONS, MAX_SIZE, Record, Skipped, Source, Unreadable, sample_key
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import read_bounded

_BYTES = "utf-8", "surrogateescape"
_LEFT_BEHIND = (b"__MACOSX", b"Thumbs.db", b"desktop.ini")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")  # as tools call parts of a data set
_IDENTITIES_IN_PART = 256
_LINK = Skipped("symbolic link, which is not followed")
_SPECIAL = Skipped("device, socket or FIFO")
_OTHER = Skipped(f"file that is not called {', '.join(f'.{extension}' for extension in EXTENSIONS)}")
_EMPTY = Skipped("identity folder without an image")
_STRAY = Skipped("image beside the identity folders, which tells no identity")


@dataclass(frozen=True)
class FolderPerIdentity(Source):
    """A folder with a folder for each identity, whose name is the identity's."""

    root: Path
    kind = "folders"
    in_blocks = False

    @staticmethod
    def matches(path: Path) -> bool:
        """Return True if a path is a folder."""
        return path.is_dir()

    @classmethod
    def open(cls, path: Path) -> FolderPerIdentity:
        """Return the source for a folder.

        Raises:
            InvalidData: it is not one.
        """
        if not path.is_dir():
            raise InvalidData(f"{path} is not a folder; expected one with a folder for each identity")
        return cls(path)

    def fingerprint(self) -> Any:
        """Return a digest of the names of the identities and of the times at which their folders were changed.

        A file that is replaced, or added deeper below, is not noticed: that would take a look at every file.
        """
        digest, names = hashlib.sha256(), self._identities()
        for name in names:
            digest.update(name.encode(*_BYTES) + b"\0%d\n" % self._modified(name))
        return [len(names), digest.hexdigest()]

    def parts(self) -> Sequence[Sequence[str]]:
        """Return lists of identity folders; the first one is empty, and stands for the files beside them."""
        names = self._identities()
        return [[], *(names[i : i + _IDENTITIES_IN_PART] for i in range(0, len(names), _IDENTITIES_IN_PART))]

    def list_part(self, part: Sequence[str]) -> Iterator[Record | Skipped]:
        """Yield the images of these identities, in the order of the bytes of their paths."""
        if not part:
            for name, entry in self._entries(""):
                if entry.is_symlink():
                    yield _LINK
                elif entry.is_file() and _is_image(name):
                    yield _STRAY
        for name in part:
            found = 0
            for each in self._walk(name):
                found += isinstance(each, Record)
                yield each
            if not found:
                yield _EMPTY

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        """Yield the content of the files; one that the permissions forbid is unreadable."""
        for record in records:
            if refused := too_large(record.size):
                yield refused
                continue
            try:
                # No more than was listed, which bounds the memory.
                yield read_bounded(self._native(record.path), record.size)
            except PermissionError:
                yield Unreadable("permission denied")
            except OSError as error:
                raise self._unavailable(record.path, error) from error

    def _identities(self) -> list[str]:
        names = [name for name, entry in self._entries("") if entry.is_dir(follow_symlinks=False)]
        if not names:
            raise InvalidData(f"{self.root}: expected a folder for each identity, found none (links are not followed)")
        if len(names) > 1 and all(name.lower() in _SPLITS for name in names):
            raise InvalidData(
                f"{self.root}: its folders are called {', '.join(names)}: splits, not identities; give one of them, "
                f"such as {self.root / names[0]}"
            )
        known = set(names)
        for name in names:
            if _shown(name) != name and _shown(name) in known:
                raise InvalidData(f"{self.root}: two folders would be identity {_shown(name)!r}; rename one")
        return names

    def _walk(self, identity: str) -> Iterator[Record | Skipped]:
        inside = [self._inside(identity, _shown(identity))]
        while inside:
            each = next(inside[-1], None)
            if each is None:
                inside.pop()
            elif isinstance(each, str):
                inside.append(self._inside(each, _shown(identity)))
            else:
                yield each

    def _inside(self, folder: str, identity: str) -> Iterator[Record | Skipped | str]:
        """Yield what a folder holds: images, what is left out, and the paths of folders."""
        stems = set[str]()
        for name, entry in self._entries(folder):
            path = f"{folder}/{name}"
            if entry.is_symlink():
                yield _LINK
            elif entry.is_dir():
                yield path
            elif not entry.is_file():
                yield _SPECIAL
            elif not _is_image(name):
                yield _OTHER
            else:
                # Of files that differ only by extension, all but the first have it in their keys.
                stem = name.rpartition(".")[0]
                key = sample_key(path if stem in stems else f"{folder}/{stem}")
                stems.add(name if stem in stems else stem)
                yield Record(key, identity, path, size=min(self._size(path, entry), MAX_SIZE))

    def _entries(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the entries of a folder that are not hidden, in the order of the bytes of their names."""
        try:
            with os.scandir(self._native(folder)) as entries:
                named = [(os.fsencode(entry.name), entry) for entry in entries]
        except OSError as error:
            raise self._unavailable(folder, error) from error
        named.sort(key=itemgetter(0), reverse=True)
        while named:
            name, entry = named.pop()  # not kept: an entry that was looked at holds hundreds of bytes
            if not name.startswith(b".") and name not in _LEFT_BEHIND:
                yield name.decode(*_BYTES), entry

    def _modified(self, folder: str) -> int:
        try:
            return os.stat(self._native(folder)).st_mtime_ns
        except OSError as error:
            raise self._unavailable(folder, error) from error

    def _size(self, path: str, entry: os.DirEntry[str]) -> int:
        try:
            return entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise self._unavailable(path, error) from error

    def _native(self, path: str) -> str:
        """Return a path as the system takes it; a record's is UTF-8 in any locale."""
        return os.path.join(self.root, os.fsdecode(path.encode(*_BYTES)))

    def _unavailable(self, path: str, error: OSError) -> DataUnavailable:
        return DataUnavailable(f"{self._native(path)} cannot be read: {error.strerror}; was the source changed?")


def _shown(name: str) -> str:
    """Return the identity of a folder: its name, with ``\\xff`` for bytes that are not UTF-8."""
    return name.encode(*_BYTES).decode(errors="backslashreplace")


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS and "." in name
