"""The process beside rank 0 that lets the W&B client work, and ends it when it does not.

``python -m partialfc.tracking.wandb.supervisor RUN_FOLDER OPTIONS`` reads nothing of the network itself. It starts the
client (:mod:`partialfc.tracking.wandb.client`) in a process group of its own, and gives it the configured time to reach
its server and, at the end of the run, to finish. After a client that dies another one goes on; after one that does not
reach its server, or dies again and again, the rest is written offline. One that does not come to an end is killed. The
end of the run is a line on stdin, or the end of the trainer.

The signals that ask a run to stop reach neither this process nor the client (see :mod:`partialfc.tracking.wandb.run`).
W&B's own service, which the client starts, insists on dying of SIGTERM and SIGINT; its client then dies, too.
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
from typing import Any, TextIO

from partialfc.tracking.wandb.lock import alone
from partialfc.tracking.wandb.run import GRACE, light_command

_POLL = 0.3  # seconds
_CLIENTS = 4  # one after the other: who stops a job sends a few signals, not many
_ALL = "it is written offline and"


class ClientFailed(Exception):
    """A client has not done what it is there for. ``again``: it was at work and died, so another one may do better."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class Supervisor:
    """Follows one run folder to the end of its run."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.timeout: float = options["timeout"]
        self.shown: str = options["shown"]
        self._ended = False
        self._told = self._warned = False  # where the run is; what is wrong

    def run(self) -> None:
        """Returns when everything is written, sent, or given up."""
        while True:  # an earlier attempt's may still be sending, or `runs sync`; metrics.jsonl keeps what comes
            with alone(self.folder, 2 * self.timeout + GRACE) as nobody_else:
                if nobody_else:
                    return self._to_the_end()
            if self._has_ended():
                return self._warn("another process is still sending this run", "it")

    def _to_the_end(self) -> None:
        for _ in range(_CLIENTS):
            try:
                return self._follow(self.options["mode"])
            except ClientFailed as error:
                reason = str(error)
                print(f"W&B: {reason}", file=sys.stderr, flush=True)
                if not error.again:
                    break
        self._warn(reason)
        try:
            self._follow("offline")
        except ClientFailed as error:
            self._warn(str(error), "it")

    def _follow(self, mode: str) -> None:
        """Let one client work until the run has ended, and W&B has it or has had its time.

        Raises:
            ClientFailed: the client cannot begin, or did not write all lines, or died.
        """
        client = Client(self.folder, self.options | {"mode": mode})
        patience = max(self.timeout, GRACE)
        try:
            # The client itself keeps to the timeout at the start, and then says what the matter is.
            where = self._expect(client, "started", self.timeout + GRACE)
            if not self._told:
                _say(f"W&B: {where}")
                self._told = True
            while not self._has_ended() and not client.has_spoken():
                pass  # unasked, it only says that it has failed
            client.tell_end()
            self._expect(client, "logged", patience)
            word, text = client.says(patience)
            if word == "failed":
                raise ClientFailed(text, again=True)
            if word != "finished":
                self._warn(f"no answer within {self.timeout:g} s", "the rest")
        finally:
            client.kill()

    def _expect(self, client: Client, expected: str, seconds: float) -> str:
        """What the client says with the next word, which shall be the expected one."""
        word, text = client.says(seconds)
        if word == expected:
            return text
        again = word == "failed" and expected != "started"
        raise ClientFailed(text or f"no answer within {self.timeout:g} s", again)

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
        self._warned = self._told = True


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the trainer, which would print it, has ended
        print(text, flush=True)


class Client:
    """A client process. It says ``started …``, then ``logged`` and ``finished``, or ``failed …``, also by its death.

    Args:
        log: where it writes what only a developer wants to know; None: where this process does.
    """

    def __init__(self, folder: Path, options: dict[str, Any], log: TextIO | None = None) -> None:
        self._process = subprocess.Popen(
            light_command("partialfc.tracking.wandb.client", str(folder), json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
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
        self._words.put(("failed", "its client has died"))

    def says(self, seconds: float | None) -> tuple[str, str]:
        """Its next word and what goes with it; empty if none comes. None waits for ever."""
        with contextlib.suppress(queue.Empty):
            return self._words.get(timeout=None if seconds is None else max(seconds, _POLL))
        return "", ""

    def has_spoken(self) -> bool:
        return not self._words.empty()

    def tell_end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write("end\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End it; the service process that W&B's client has started ends by itself when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


if __name__ == "__main__":
    Supervisor(Path(sys.argv[2]), json.loads(sys.argv[3])).run()
