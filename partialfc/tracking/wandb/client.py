"""Process that talks to W&B: it follows ``metrics.jsonl`` and hands every line to W&B's client, in order.

``python -m partialfc.tracking.wandb.client RUN_FOLDER OPTIONS`` is started by :mod:`partialfc.tracking.wandb.run`. A
line on stdin, its end, or the death of the trainer ends the run. The process writes to stdout: ``started URL``, then
``finished``, ``unfinished REASON`` (W&B does not have everything, another client would not help) or ``failed REASON``.

Each start asks the server for its number of rows and sends the rest, however the earlier attempt ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import select
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO
from urllib.parse import urlparse

import yaml

from partialfc.tracking.wandb.lock import client_lock
from partialfc.tracking.wandb.rows import best, row, table
from partialfc.tracking.wandb.run import GRACE, SENT, UNSENT
from partialfc.tracking.wandb.sent import Sent, SentLog, UnsentLines

_POLL = 1.0  # seconds
_FLUSH = 1.0  # seconds after which a line is in the file of an offline run, whatever happens


class WandbFeeder:
    """Feeds the lines of one run folder to one W&B run."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self._unsent = folder / "wandb" / UNSENT
        self._unsent.touch()
        self.run = _start_run(folder, options)
        if not self.run.offline:
            # Artifacts need it; the first one would fail if the server were away just then.
            getattr(self.run, "_public_api", lambda: None)()
        # Rows are numbered over all attempts, as offline ones do not know of each other; charts are over `step`.
        self.run.define_metric("*", step_metric="step")
        self._log = SentLog(folder / "wandb" / SENT, None if self.run.offline else self.run.starting_step)
        self._lines = UnsentLines(folder / "metrics.jsonl", self._log.sent)
        self._best: dict[str, float] = _best_before(folder / "metrics.jsonl")

    def send_new(self) -> None:
        """Hand over the lines that have appeared since the last call."""
        for line in self._lines.read():
            self._send(line)

    def _send(self, line: dict[str, Any]) -> None:
        values = row(line)
        sent = self._lines.sent
        # An event may concern an earlier step; it is shown at the run's newest one.
        values["step"] = max(0, sent.train, sent.evaluation) if line["kind"] == "event" else line["step"]
        if line["kind"] == "evaluation":
            self._best = best(values, self._best)
            self.run.summary.update(self._best)
            values |= self._tables(line)
        if line["kind"] == "event" and line.get("event") in ("checkpoint", "export"):
            self._log_reference(line["event"], line)
        self._log.add(line)  # last: a failure before this has sent no row
        self.run.log(values, step=sent.rows, commit=True)

    def _tables(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return an evaluation's table of results and its ROC curves as W&B shows them."""
        import wandb

        step = line["step"]
        columns, rows = table(line.get("results", {}), step)
        found: dict[str, Any] = {"evaluation/results": wandb.Table(columns=columns, data=rows)}
        try:
            text = (self.folder / "evaluation" / f"roc-step-{step:08d}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return found
        points = [
            [name, far, math.log10(far), tar]
            for name, curve in json.loads(text).items()
            for far, tar in zip(curve["far"], curve["tar"], strict=True)
            if far > 0
        ]
        roc = wandb.Table(columns=["set", "FAR", "log10 FAR", "TAR"], data=points)
        title = f"ROC at step {step}"
        found["evaluation/roc"] = wandb.plot.line(roc, "log10 FAR", "TAR", stroke="set", title=title)
        return found

    def _log_reference(self, kind: str, line: dict[str, Any]) -> None:
        """Log the path of a checkpoint or an export as an artifact; its files are neither uploaded nor read."""
        import wandb

        path = Path(line["path"])
        if kind == "checkpoint":  # as the trainer saw it, from its working directory
            path = self.folder / "checkpoints" / path.name
        metadata = {key: value for key, value in line.items() if key not in ("kind", "event")} | {"path": str(path)}
        artifact = wandb.Artifact(f"{self.run.id}-{kind}", type=kind, metadata=metadata)
        try:
            artifact.add_reference(path.as_uri(), checksum=False)
        except (OSError, ValueError):  # it has been removed: a newer one has replaced it
            return
        aliases = ["latest"] + ([f"step-{line['step']}"] if "step" in line else [])
        self.run.log_artifact(artifact, aliases=aliases)

    def finish(self) -> None:
        """End the run as its ``state.json`` says, once W&B has everything."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, LookupError):
            state = "unknown"
        if state == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if state == "finished" else 1)
        if not self.run.offline and self._lines.all_read():  # else the next attempt has begun meanwhile
            self._unsent.unlink(missing_ok=True)


def _start_run(folder: Path, options: dict[str, Any]) -> Any:
    import wandb

    mode = options["mode"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb.setup().settings.base_url) else "offline")
    wanted = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "init_timeout": options["timeout"],
        "allow_val_change": True,
        "x_save_requirements": False,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": not options["system_metrics"],
        "x_stats_pid": options["trainer"],
        "x_transaction_log_flush_interval": _FLUSH,
    }
    known = wandb.Settings.model_fields  # the names that begin with x_ may change
    return wandb.init(
        dir=str(folder),
        id=options["id"],
        resume="allow",
        mode=mode,
        project=options["project"],
        entity=options["entity"],
        name=options["name"],
        group=options["group"],
        tags=options["tags"],
        config=yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
    )


def _has_key(url: str) -> bool:
    """Return True if W&B's client finds a key for the server without prompting."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _best_before(metrics: Path) -> dict[str, float]:
    """Return the best values of all evaluations in the file: W&B's summary covers the run, not an attempt."""
    found: dict[str, float] = {}
    for line in UnsentLines(metrics, Sent()).read():
        if line["kind"] == "evaluation":
            found = best(row(line), found)
    return found


class TrainerPipe:
    """Pipes to and from the trainer, which reads ``output`` and announces the end of its run on stdin."""

    def __init__(self, pid: int, output: TextIO) -> None:
        self._pid, self._output = pid, output
        self._ended = False

    def tell(self, word: str, text: str = "") -> None:
        """Write one line to the trainer, without the key and line breaks."""
        with contextlib.suppress(OSError):  # the trainer has died: the run still has to end in W&B
            print(f"{word} {_without_key(text)}".replace("\n", " ").rstrip(), file=self._output, flush=True)

    def has_ended(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for the end of the run; return True once it has ended."""
        if not self._ended:
            told, _, _ = select.select([sys.stdin], [], [], seconds)
            # Loader processes may keep the pipe open after the trainer's death.
            self._ended = bool(told) or os.getppid() != self._pid
        return self._ended


@contextlib.contextmanager
def _time_limit(trainer: TrainerPipe, seconds: float | None, word: str, reason: str) -> Iterator[None]:
    """End this process, with ``word`` and ``reason``, if the block takes longer than ``seconds``; None: no limit.

    W&B's calls cannot be interrupted. Its service process ends by itself when this one has ended.
    """

    def give_up() -> None:
        trainer.tell(word, reason)
        os._exit(1)

    timer = threading.Timer(seconds or 0, give_up)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _without_key(text: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


@contextlib.contextmanager
def _wait_for_lock(folder: Path, trainer: TrainerPipe) -> Iterator[bool]:
    """Wait until no client of an earlier attempt or of ``runs sync`` sends the run; yield False if it ends before."""
    while True:
        with client_lock(folder) as free:
            if free:
                yield True
                return
        if trainer.has_ended(_POLL):
            yield False
            return


def feed(folder: Path, options: dict[str, Any], trainer: TrainerPipe) -> None:
    """Send a run until it has ended, and wait for W&B to accept it; the process ends if that takes too long."""
    timeout = options["timeout"]
    start_limit = finish_limit = None
    if options["limited"]:
        start_limit, finish_limit = timeout + GRACE, max(timeout, GRACE)
    no_answer = f"no answer within {timeout:g} s"
    with _wait_for_lock(folder, trainer) as free:
        if not free:
            trainer.tell("unfinished", "another process is still sending this run")
            return
        with _time_limit(trainer, start_limit, "failed", no_answer):
            feeder = WandbFeeder(folder, options)
        trainer.tell("started", feeder.run.url or f"offline; send it with: partialfc runs sync {options['shown']}")
        while not trainer.has_ended(_POLL):
            feeder.send_new()
        with _time_limit(trainer, finish_limit, "unfinished", no_answer):
            feeder.send_new()
            feeder.finish()
        trainer.tell("finished")


def main(folder: Path, options: dict[str, Any], output: TextIO) -> NoReturn:
    """Feed a run to W&B, report a failure to the trainer, and end the process."""
    trainer = TrainerPipe(options["trainer"], output)
    try:
        feed(folder, options, trainer)
    except BaseException as error:
        print(_without_key(traceback.format_exc()), file=sys.stderr, flush=True)
        trainer.tell("failed", f"{type(error).__name__}: {error}")
    os._exit(0)  # at a usual end W&B's client would wait for its service again


if __name__ == "__main__":
    to_trainer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # messages of W&B's client and service go to the log
    os.environ.pop("WANDB_SERVICE", None)  # of another process
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports of crashes to third parties
    run_folder = Path(sys.argv[1])
    os.environ.setdefault("WANDB_DATA_DIR", str(run_folder / "wandb" / "data"))  # an offline run needs it later
    os.nice(5)
    main(run_folder, json.loads(sys.argv[2]), to_trainer)
