"""A Python that has imported torch and the trainer already, and forks: each fork becomes the requested process.

warm_server.py SOCKET MODULE…: imports the modules, then serves requests of ``tests.harness.warm`` over the socket.
Starting a process this way takes milliseconds instead of seconds, and the process is a real one: with an environment,
a working directory, output, signals, threads and an exit code of its own. What it does not have of its own is what
Python and torch settle as they start: the seed of ``hash``, encodings, the number of threads.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

LARGEST_REQUEST = 1 << 20
NAME = "warm-server"
LAUNCHERS = ("torch.distributed.run", "partialfc.launch.torchrun")
_PR_SET_NAME = 15


class Server:
    """Forks on request; one thread, no process group, nothing but imported modules in it."""

    def __init__(self, requests: socket.socket, kill_at_end: bool) -> None:
        self._requests, self._kill_at_end = requests, kill_at_end
        self._reports: dict[int, int] = {}  # by the number of a child: where its end is to be reported
        self._ended, self._wake = os.pipe()  # has something to read when a child has ended
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> dict[str, Any]:
        """Serve until the other end is closed. Returns in the forks only, with the request of each."""
        assert len(os.listdir("/proc/self/task")) == 1, "a fork has the thread that forks, and no other"
        set_name(NAME)
        while True:
            ready, _, _ = select.select([self._requests, self._ended], [], [])
            if self._ended in ready:
                self._report_ends()
            if self._requests in ready:
                request = self._accept()
                if request is not None:
                    return request

    def _accept(self) -> dict[str, Any] | None:
        message, descriptors, _, _ = socket.recv_fds(self._requests, LARGEST_REQUEST, 4)
        if not message:
            if self._kill_at_end:
                for pid in self._reports:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            os._exit(0)
        *streams, report = descriptors
        pid = os.fork()
        if pid == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            self._forget(descriptors)
            return dict(json.loads(message))
        self._reports[pid] = report
        for stream in streams:
            os.close(stream)
        os.write(report, f"{pid}\n".encode())
        return None

    def _report_ends(self) -> None:
        os.read(self._ended, 4096)
        for pid in list(self._reports):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                report = self._reports.pop(pid)
                os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os.close(report)

    def _forget(self, descriptors: list[int]) -> None:
        """Drop the server's resources in a fork."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._requests.close()
        for descriptor in (*descriptors, *self._reports.values(), self._ended, self._wake):
            os.close(descriptor)


def set_name(name: str) -> None:
    """Set the name in ``/proc/PID/comm``; up to 15 characters."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def prepare(request: dict[str, Any], base_path: list[str]) -> list[str]:
    """Give this fork the state of a new process; return the rest of the command, from -m, -c or a script on."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    set_name(f"rank-{os.environ['RANK']}" if "RANK" in os.environ else "python")
    words: list[str] = request["words"]
    if words[0] == "-u" or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        sys.stderr.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[words[0] == "-u" :]
    first = {"-m": os.getcwd(), "-c": ""}.get(words[0], str(Path(words[0]).resolve().parent))
    own = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *own, *(entry for entry in base_path if entry not in own)]
    importlib.invalidate_caches()
    return words


def serve_below() -> None:
    """Start a launcher's processes warm, too, by a separate server, forked before the launcher has threads."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from tests.harness import warm

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        os.setsid()  # signals to the launcher's group are not for the server
        run(Server(theirs, kill_at_end=False).serve())
    theirs.close()
    subprocess.Popen = subprocess_handler.Popen = warm.starter(ours)  # type: ignore[misc, assignment]


def run(request: dict[str, Any]) -> None:
    """Become the requested process, to its end."""
    words = prepare(request, BASE_PATH)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    kind = words[0]
    if kind == "-m" and words[1] in LAUNCHERS:
        serve_below()
    if kind == "-m":
        sys.argv[:] = ["-m", *words[2:]]
        sys.modules.pop(words[1], None)  # else Python warns that it has been imported before
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = words
        main.__file__ = kind
        exec(compile(Path(kind).read_text(), kind, "exec"), main.__dict__)
    sys.exit()


if __name__ == "__main__":
    BASE_PATH = sys.path[1:]
    sys.path[0] = str(Path(__file__).parents[2])
    number, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    run(Server(socket.socket(fileno=int(number)), kill_at_end=True).serve())
