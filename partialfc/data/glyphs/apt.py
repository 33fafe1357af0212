"""Debian packages, fetched and unpacked without root or installation (``apt-get download``, ``dpkg-deb -x``)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_TIMEOUTS = ["-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::https::Timeout=30"]
_LONGEST_CALL = 1800.0  # seconds: the largest font package has 60 MB


class PackageError(Exception):
    """A package could not be fetched; the message is the tool's."""


class Apt:
    """Unpacks packages into ``cache/<package>``; each appears there complete or not at all.

    The machine's package lists are tried first. If they are empty or out of date, current lists are fetched into
    directories of the cache, which works for any user.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._private_lists = False
        self._update_problem = ""

    def unpack(self, package: str) -> Path:
        """Return the folder with a package's files, fetched if absent.

        Raises:
            PackageError: apt is missing, the package unknown, the network down, or the disk full.
        """
        target = self.cache / package
        if target.is_dir():
            return target
        missing = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
        if missing:
            raise PackageError(f"{' and '.join(missing)} not found on this machine")
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix=f".{package}.") as scratch:
            archive = self._download(package, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            self._run(["dpkg-deb", "-x", str(archive), str(unpacked)], Path(scratch))
            try:
                unpacked.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
        return target

    def _download(self, package: str, folder: Path) -> Path:
        try:
            self._run(["apt-get", *self._options(), "download", package], folder)
        except PackageError as error:
            if not self._private_lists:
                self._update_private_lists()
                return self._download(package, folder)
            raise PackageError(self._update_problem or str(error)) from error
        archives = list(folder.glob("*.deb"))
        if len(archives) != 1:
            raise PackageError(f"apt-get download {package} left {len(archives)} archives instead of one")
        return archives[0]

    def _update_private_lists(self) -> None:
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (self.cache / ".apt" / folder).mkdir(parents=True, exist_ok=True)
        self._private_lists = True
        try:
            # Without Error-Mode=any apt reports success although it reached no server.
            self._run(["apt-get", *self._options(), "-o", "APT::Update::Error-Mode=any", "update"], self.cache)
        except PackageError as error:
            self._update_problem = str(error)  # one of several sources may be down while another has the package

    def _options(self) -> list[str]:
        options = ["-q", *_TIMEOUTS]
        if os.geteuid() == 0:
            # apt would drop to its own user, who may not enter this cache. Packages are signed anyway.
            options += ["-o", "APT::Sandbox::User=root"]
        if self._private_lists:
            own = (self.cache / ".apt").absolute()
            options += ["-o", f"Dir::State={own}/state", "-o", "Dir::State::status=/var/lib/dpkg/status"]
            options += ["-o", f"Dir::Cache={own}/cache"]
        return options

    def _run(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LONGEST_CALL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PackageError(str(error)) from error
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
            said = " ".join(errors[:2]) or done.stderr.strip()[-300:] or "no message"
            raise PackageError(f"{command[0]} ended with {done.returncode}: {said}")
