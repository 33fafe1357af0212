"""Image files that a table names: none outside one folder, whatever the table says."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from partialfc.data.convert.source import Unreadable
from partialfc.errors import DataUnavailable, InvalidData
from partialfc.files import read_bounded

_MAX_IMAGE_BYTES = 512 << 20  # more than any image that the trainer takes by default
_NO_NAME = "cannot be opened: no file can have such a name"  # a NUL, half of a UTF-16 pair

# What is wrong with one file; other errors are of the disk or the network, and may be gone next time.
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EFBIG, errno.ENXIO}


def too_large(num_bytes: int) -> Unreadable | None:
    """Return why an image of so many bytes is not read; None if it may be one."""
    if num_bytes <= _MAX_IMAGE_BYTES:
        return None
    return Unreadable(f"has {num_bytes:,} bytes, more than an image can have")


def read_image(path: str) -> bytes | Unreadable:
    """Return the content of an image file.

    Raises:
        DataUnavailable: the disk or the network fails.
    """
    try:
        return read_bounded(path, _MAX_IMAGE_BYTES)
    except ValueError:
        return Unreadable(_NO_NAME)
    except OSError as error:
        if error.errno not in _NO_FILE | _REFUSED:
            raise DataUnavailable(f"{path} cannot be read: {error.strerror}") from error
        return Unreadable(f"cannot be read: {error.strerror}")


@dataclass(frozen=True)
class ImageRoot:
    """A folder that holds all images of a table."""

    folder: Path

    def require(self) -> None:
        """Raise InvalidData if it is no folder."""
        if not self.folder.is_dir():
            raise InvalidData(f"{self.folder}, the folder of the images, does not exist or is no folder")

    def relative(self, path: str) -> str:
        """Return a table's path relative to the folder; absolute ones may lie in it.

        Raises:
            ValueError: it leads out of the folder, or is a URL.
        """
        if "://" in path:
            raise ValueError(f"{path[:200]!r} is a URL; download the images first")
        normal = os.path.normpath(path)
        if normal.startswith("/"):
            normal = os.path.relpath(normal, os.path.abspath(self.folder))
        if normal in (".", "..") or normal.startswith("../"):
            raise ValueError(f"{path[:200]!r} leads out of {self.folder}; pass --images with the folder of all images")
        return normal

    def read(self, path: str) -> bytes | Unreadable:
        """Return the content of a file; symbolic links are followed as far as they stay in the folder.

        Args:
            path: as :meth:`relative` returns it.

        Raises:
            DataUnavailable: the disk or the network fails.
        """
        try:
            # Tables are UTF-8 in any locale.
            folder, name = os.path.split(os.path.join(self.folder, os.fsdecode(path.encode())))
            real = os.path.join(_real_folder(folder), name)
            if os.path.islink(real):
                real = os.path.realpath(real)
        except ValueError:
            return Unreadable(_NO_NAME)
        if not real.startswith(os.path.join(_real_folder(os.fspath(self.folder)), "")):
            return Unreadable(f"leads out of {self.folder} by a symbolic link")
        return read_image(real)


@lru_cache(maxsize=1 << 14)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
