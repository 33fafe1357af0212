"""Two hosts on one machine: network namespaces with names and addresses of their own, and a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


class TwoHosts:
    """The hosts ``host-a`` and ``host-b``, which see nothing but each other.

    Args:
        folder: where the file lies that tells them their addresses.
    """

    names = ("host-a", "host-b")

    def __init__(self, folder: Path) -> None:
        self._hosts = folder / "hosts"
        self._spaces = [f"pfc{os.getpid()}{letter}" for letter in "ab"]
        self._ends = [f"v{os.getpid()}{letter}" for letter in "ab"]

    def start(self) -> None:
        for space in self._spaces:
            _ip("netns", "add", space)
        _ip("link", "add", self._ends[0], "netns", self._spaces[0], "type", "veth", "peer", "name", self._ends[1],
            "netns", self._spaces[1])  # fmt: skip
        for number, (space, end) in enumerate(zip(self._spaces, self._ends, strict=True), 1):
            _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            for name in (end, "lo"):
                _ip("-n", space, "link", "set", name, "up")
        self._hosts.write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")

    def stop(self) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)  # and its end of the cable

    def command(self, host: int, *words: str) -> list[str]:
        """``words`` as a command that runs on a host."""
        enter = f'hostname {self.names[host]} && mount --bind {self._hosts} /etc/hosts && exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self._spaces[host],
            "unshare",
            "--uts",
            "--mount",
            "bash",
            "-c",
            enter,
            "-",
            *words,
        ]

    def cable(self, state: str) -> None:
        """``down`` cuts the cable, ``up`` mends it."""
        _ip("-n", self._spaces[0], "link", "set", self._ends[0], state)


def why_not() -> str | None:
    """Return the reason there can be no two hosts here, or None."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    name = f"pfc{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    entered = subprocess.run(["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "true"], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if made.returncode == entered.returncode == 0 else f"this machine allows none: {made.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Provide two hosts, removed at the end; end their processes before."""
    hosts = TwoHosts(folder)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
