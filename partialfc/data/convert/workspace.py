"""``OUT/.convert``: what an unfinished conversion knows, so that the same command goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from partialfc.data.index import INDEX
from partialfc.data.writer import check_target, remove_dataset
from partialfc.errors import ConfigError, DataError
from partialfc.files import FileLock, read_json, write_atomically

VERIFICATION, PROTOCOL, BAD = "verification", "protocol.json", "bad.csv"

_FOLDER, _JOB, _LOCK = ".convert", "job.json", "lock"
_MAX_JOB_BYTES = 1 << 20


class Workspace:
    """Context manager of a folder in which a data set is made; no other process makes one there meanwhile.

    Args:
        out: of the data set; created if it is missing.
        job: what decides the content, as JSON; what was begun with another one is not gone on with.
        overwrite: clear what is there of an earlier data set or an unfinished one; other files stay.

    Raises:
        ConfigError: the folder holds something else, or another job.
        DataError: another process works there.
    """

    def __init__(self, out: Path, job: dict[str, Any], overwrite: bool) -> None:
        self.out = out
        self.folder = out / _FOLDER
        check_target(out, overwrite or self.folder.is_dir())
        self.listing = self.folder / "listing"
        self.listing.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / _LOCK)
        if not self._lock.acquire():
            self._lock.release()
            raise DataError(f"another process converts to {out}")
        try:
            self._begin(json.loads(json.dumps(job)), overwrite)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, job: dict[str, Any], overwrite: bool) -> None:
        found = self._found_job()
        if found is None and (self.out / INDEX).exists():  # complete, whatever is left of the workspace
            check_target(self.out, overwrite)
        self.resumed = found == job and not overwrite
        if not self.resumed:
            begun = any(self.folder.glob("shards-*/*.json"))
            if found is not None and begun and not overwrite:
                differing = ", ".join(sorted(name for name in job if found.get(name) != job[name]))
                raise ConfigError(
                    f"{self.out} holds an unfinished conversion with other options or another source ({differing}); "
                    "give the same ones to go on with it, or pass --overwrite to begin anew"
                )
            same_source = found is not None and found.get("source") == job["source"]
            self._clear(keep_listing=same_source and not overwrite)
            write_atomically(self.folder / _JOB, json.dumps(job))
        for folder in (self.out, self.out / VERIFICATION):
            for path in folder.glob("shard-*.tar.*.tmp"):
                path.unlink()

    def results(self, name: str) -> Path:
        """Return the folder of what is known of the finished shards of a set."""
        return self.folder / f"shards-{name}"

    def finish(self) -> None:
        """Remove the folder: what is made is complete."""
        (self.folder / _JOB).unlink()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _found_job(self) -> dict[str, Any] | None:
        try:
            found = read_json(self.folder / _JOB, _MAX_JOB_BYTES)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _clear(self, keep_listing: bool) -> None:
        for folder in (self.out, self.out / VERIFICATION):
            remove_dataset(folder)
            for name in (PROTOCOL, BAD):
                (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or holds other files
            (self.out / VERIFICATION).rmdir()
        for path in self.folder.iterdir():
            if path.name == _LOCK or (path == self.listing and keep_listing):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.listing.mkdir(exist_ok=True)
