"""The process beside rank 0 that lets the W&B client work, and ends it when it does not.

``python -m partialfc.tracking.wandb_supervisor RUN_FOLDER OPTIONS`` reads nothing of the network itself. It starts the
client (:mod:`partialfc.tracking.wandb_client`) in a process group of its own, and gives it the configured time to reach
its server and, at the end of the run, to finish. A client that fails or does not come to an end is killed, and another
one writes offline what is left. The end of the run is a line on stdin, or the end of the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from partialfc.tracking.wandb_lock import alone
from partialfc.tracking.wandb_run import GRACE, light_command

_POLL = 0.3  # seconds
_ALL = "it is written offline and"


class Supervisor:
    """Follows one run folder to the end of its run."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.timeout: float = options["timeout"]
        self.shown: str = options["shown"]
        self._ended = False
        self._warned = False

    def run(self) -> None:
        """Returns when everything is written, sent, or given up."""
        # An earlier attempt's may still be sending; when its time is over, this one goes on all the same.
        with alone(self.folder, 2 * self.timeout + GRACE):
            if not self._follow(self.options["mode"]):
                self._follow("offline")

    def _follow(self, mode: str) -> bool:
        """Let one client work; whether all lines have been written by it."""
        client = Client(self.folder, self.options | {"mode": mode})
        try:
            where = self._expect(client, "started")
            if where is None:
                return False
            if not self._warned:
                _say(f"W&B: {where}")
            while not self._has_ended():
                if client.has_died():
                    self._warn(client.says(0)[1] or "its client has died")
                    return False
            client.tell_end()
            if self._expect(client, "logged") is None:
                return False
            self._expect(client, "finished", "the rest")
            return True
        finally:
            client.kill()

    def _expect(self, client: Client, expected: str, what: str = _ALL) -> str | None:
        """What the client says with the next word, if that is the expected one; else None, and a warning."""
        # The client itself keeps to the timeout at the start, and then says what the matter is.
        word, text = client.says(self.timeout + GRACE if expected == "started" else max(self.timeout, GRACE))
        if word == expected:
            return text
        self._warn(text or f"no answer within {self.timeout:g} s", what)
        return None

    def _has_ended(self) -> bool:
        """Whether the run has ended; looks on for a moment."""
        if not self._ended:
            told, _, _ = select.select([sys.stdin], [], [], _POLL)
            self._ended = bool(told) or os.getppid() != self.options["trainer"]
        return self._ended

    def _warn(self, reason: str, what: str = _ALL) -> None:
        """Say, once, that W&B does not have everything; its log has every reason."""
        text = f"WARNING: W&B: {reason}; the run goes on, {what} can be sent later: partialfc runs sync {self.shown}"
        print(text, file=sys.stderr, flush=True)
        if not self._warned:
            _say(text)
        self._warned = True


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the trainer, which would print it, has ended
        print(text, flush=True)


class Client:
    """A client process. It says ``started …``, then ``logged`` and ``finished``, or ``failed …``."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            light_command("partialfc.tracking.wandb_client", str(folder), json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._words: queue.Queue[tuple[str, str]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, text = line.rstrip("\n").partition(" ")
            self._words.put((word, text))
        self._words.put(("", ""))

    def says(self, seconds: float) -> tuple[str, str]:
        """Its next word and what goes with it; empty if none comes."""
        with contextlib.suppress(queue.Empty):
            return self._words.get(timeout=max(seconds, _POLL))
        return "", ""

    def has_died(self) -> bool:
        return self._process.poll() is not None

    def tell_end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End it, and the service process that the W&B client has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Supervisor(Path(sys.argv[2]), json.loads(sys.argv[3])).run()
