"""The index of a data set folder, ``index.json``, and the digest that binds shards and class table to it."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from partialfc.errors import InvalidData
from partialfc.files import open_regular, read_json, unreadable

INDEX, CLASSES = "index.json", "classes.jsonl"

_MAX_INDEX_BYTES = 32 << 20  # of 170,000 shards; parsed, it may take twenty times as much
_MAX_COUNT = 1 << 53  # the largest integers that every reader of JSON takes for what they are
_PIECE = 1 << 20
_MADE = "`partialfc data convert` makes such folders of other formats"


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file of a data set."""

    path: Path
    num_bytes: int
    modified: int  # nanoseconds
    inode: int


def read_index(folder: Path | str) -> dict[str, Any]:
    """Read ``index.json`` of a data set folder and check its fields, not the shards.

    Raises:
        InvalidData, DataUnavailable: it is missing, cannot be read, or a field is wrong.
    """
    path = Path(folder) / INDEX
    try:
        index = read_json(path, _MAX_INDEX_BYTES)
    except FileNotFoundError as error:
        raise InvalidData(f"{folder} is not a complete data set folder: {INDEX} is missing; {_MADE}") from error
    except NotADirectoryError as error:
        raise InvalidData(f"{folder} is a file; expected a data set folder with {INDEX}; {_MADE}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise InvalidData(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("shardlist"), list):
        raise InvalidData(f"{path}: expected an object with a list 'shardlist'")
    for field in ("num_classes", "num_samples"):
        if not _is_count(index.get(field)):
            raise InvalidData(f"{path}: {field!r} must be a count, got {shortened(index.get(field))}")
    if not isinstance(index.get("digest", ""), str):
        raise InvalidData(f"{path}: 'digest' must be a text, got {shortened(index['digest'])}")
    for entry in index["shardlist"]:
        _check_shard_entry(entry, path)
    if len({entry["url"] for entry in index["shardlist"]}) < len(index["shardlist"]):
        raise InvalidData(f"{path}: a shard is listed twice")
    total = sum(entry["nsamples"] for entry in index["shardlist"])
    if total != index["num_samples"]:
        raise InvalidData(f"{path}: num_samples is {index['num_samples']}, but the shards hold {total}")
    return index


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _check_shard_entry(entry: object, path: Path) -> None:
    if not isinstance(entry, dict) or not _is_count(entry.get("nsamples")) or not _is_count(entry.get("nbytes")):
        raise InvalidData(f"{path}: a shard needs 'url', 'nsamples' and 'nbytes', got {shortened(entry)}")
    url = entry.get("url")
    if not isinstance(url, str) or url in ("", ".", "..") or any(c in url for c in "/\\|:") or not url.isprintable():
        raise InvalidData(f"{path}: a shard's url must be the name of a file in the folder, got {shortened(url)}")
    if not isinstance(entry.get("sha256", ""), str):
        raise InvalidData(f"{path}: sha256 of {url} must be a text, got {shortened(entry['sha256'])}")


def find_shards(folder: Path, index: dict[str, Any]) -> list[Shard]:
    """Return the shards that an index lists. Costs one look at each file's inode.

    Raises:
        InvalidData: one is missing, not a regular file, or of another size.
    """
    shards = []
    for entry in index["shardlist"]:
        shard = find_shard(folder / entry["url"])
        if shard.num_bytes != entry["nbytes"]:
            raise InvalidData(f"{shard.path}: {INDEX} says {entry['nbytes']} bytes, the file has {shard.num_bytes}")
        shards.append(shard)
    return shards


def find_shard(path: Path) -> Shard:
    """Return the shard in a file. Costs one look at its inode.

    Raises:
        InvalidData: it is missing, or not a regular file.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise InvalidData(f"{path.parent}: shard {path.name} is missing") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise InvalidData(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InvalidData(f"{path} is not a regular file")
    return Shard(path, found.st_size, found.st_mtime_ns, found.st_ino)


def content_digest(shard_digests: Iterable[str], class_table: Iterable[bytes]) -> str:
    """Return the ``digest`` of a data set: SHA-256 of its shards' digests, a line each, and of its class table."""
    digest = hashlib.sha256("".join(f"{shard}\n" for shard in shard_digests).encode("utf-8", "surrogatepass"))
    for piece in class_table:
        digest.update(piece)
    return digest.hexdigest()


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a regular file; raises OSError if it cannot be read."""
    with open_regular(path) as file:
        yield from iter(lambda: file.read(_PIECE), b"")


def shard_lines(shards: list[dict[str, Any]]) -> list[str]:
    """Return what stands for each shard in a digest: its ``sha256``, or else its name and sizes."""
    return [entry.get("sha256") or json.dumps([entry["url"], entry["nsamples"], entry["nbytes"]]) for entry in shards]


def checked_digest(folder: Path, index: dict[str, Any]) -> str:
    """Return the digest of a data set. Where shards have a ``sha256``, it is recomputed from these and the class table.

    This costs one reading of the class table, a second for ten million classes. The shards are not read.

    Raises:
        InvalidData: the index gives another digest, or the class table cannot be read.
    """
    shards, named = index["shardlist"], index.get("digest", "")
    if named and not all(entry.get("sha256") for entry in shards):
        return str(named)  # nothing to compare it with
    # A data set of other tools may lack digests, and an evaluation set the table: then names and sizes stand for them.
    lines = shard_lines(shards)
    try:
        digest = content_digest(lines, file_pieces(folder / CLASSES))
    except FileNotFoundError as error:
        if named:
            raise InvalidData(f"{folder} is not a complete data set folder: {CLASSES} is missing") from error
        return content_digest(lines, ())
    except OSError as error:
        raise unreadable(folder / CLASSES, error) from error
    if named and digest != named:
        raise InvalidData(
            f"{folder / INDEX}: the digest is {shortened(named)}, but {CLASSES} and the sha256 of the shards give "
            f"{digest}: one of them was changed after the data set was written"
        )
    return digest
