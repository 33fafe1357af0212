"""Python processes that start in no time: forks of a server that has imported everything; see ``warm_server.py``."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # a server must have no thread but one
_SERVER = str(Path(__file__).with_name("warm_server.py"))


class Process:
    """A process that a server has forked; used like ``subprocess.Popen``, as far as it goes.

    Args:
        requests: the socket of the server.
        args: the command, which begins with this Python.
        stdout, stderr: open files, descriptors, or what subprocess has for them; None: as here.
    """

    def __init__(
        self,
        requests: socket.socket,
        args: Any,
        env: dict[str, str] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        cwd: Path | None = None,
        start_new_session: bool = False,
        text: bool = False,
    ) -> None:
        python, *words = map(str, args)
        assert python == sys.executable, "another program cannot be a fork of Python"
        self.args, self.returncode = args, None
        request = {
            "words": words,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "session": start_new_session,
        }
        null = os.open(os.devnull, os.O_RDWR)
        self.stdout: IO[Any] | None = None
        piped: list[int] = []
        if stdout == subprocess.PIPE:
            source, stdout = os.pipe()
            self.stdout, piped = os.fdopen(source, "r" if text else "rb"), [stdout]
        out = _descriptor(stdout, null, 1)
        error = out if stderr == subprocess.STDOUT else _descriptor(stderr, null, 2)
        self._reports, report = os.pipe()
        socket.send_fds(requests, [json.dumps(request).encode()], [null, out, error, report])
        for descriptor in (null, report, *piped):
            os.close(descriptor)
        self.pid = int(self._report())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None and select.select([self._reports], [], [], 0)[0]:
            self.returncode = int(self._report())
            os.close(self._reports)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        if self.returncode is None and not select.select([self._reports], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[Any, None]:
        """Its output, if that is a pipe, once it has ended."""
        output = self.stdout.read() if self.stdout else None
        self.wait(timeout)
        return output, None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stdout:
            self.stdout.close()
        self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _report(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._reports, 1)
            assert byte, "the server of warm processes has ended"
            line += byte
        return line


def _descriptor(stream: IO[Any] | int | None, null: int, default: int) -> int:
    if stream is None:
        return default
    if isinstance(stream, int):
        return null if stream == subprocess.DEVNULL else stream
    return stream.fileno()


def starter(requests: socket.socket) -> Callable[..., Any]:
    """A stand-in for ``subprocess.Popen``: where it starts this Python, the process is a fork of the server."""
    cold = subprocess.Popen

    def start(args: Any, *more: Any, **options: Any) -> Any:
        if more or isinstance(args, str) or args[0] != sys.executable:
            return cold(args, *more, **options)
        return Process(requests, args, **options)

    return start


@functools.cache
def server(*modules: str) -> Callable[..., Any]:
    """The ``starter`` of a server that has imported ``modules``; ``end_servers`` ends it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, _SERVER, str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()],
            env=os.environ | dict.fromkeys(_THREADS, "1"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    _SERVERS.append((ours, process))
    return starter(ours)


_SERVERS: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


def end_servers() -> None:
    """End all servers, and what they have started and nobody has ended."""
    for requests, process in _SERVERS:
        requests.close()
        process.wait(30)
