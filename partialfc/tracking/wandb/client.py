"""The process that talks to W&B: it follows metrics.jsonl and hands every line to the client, in order.

Started and, if need be, ended by :mod:`partialfc.tracking.wandb.supervisor`. A line on its stdin says that the run has
ended. What W&B lacks is found anew at each start: the server says how many rows it has, and the lines of the others are
sent again. So it does not matter how an earlier attempt ended, whether it was online, or what was lost on the way.

Nothing here waits for anything but W&B itself, and nothing else waits for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

import yaml

from partialfc.tracking.wandb.rows import Lines, Notes, Sent, best, row, table
from partialfc.tracking.wandb.run import GRACE, SENT, UNSENT

_POLL = 1.0  # seconds
_FLUSH = 1.0  # seconds after which a line is in the file of an offline run, whatever happens


class Follower:
    """Sends one run folder to one W&B run."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self._unsent = folder / "wandb" / UNSENT
        self._unsent.touch()
        self.run = _start(folder, options)
        if not self.run.offline:
            # Artifacts need it; the first one would fail if the server were away just then.
            getattr(self.run, "_public_api", lambda: None)()
        # Rows are numbered over all attempts, as offline ones do not know of each other; charts are over `step`.
        self.run.define_metric("*", step_metric="step")
        self._notes = Notes(folder / "wandb" / SENT, None if self.run.offline else self.run.starting_step)
        self._lines = Lines(folder / "metrics.jsonl", self._notes.sent)
        self._best: dict[str, float] = _best_before(folder / "metrics.jsonl")

    def send_new(self) -> None:
        """Hand over the lines that have come since the last call."""
        for line in self._lines.new():
            self._send(line)

    def _send(self, line: dict[str, Any]) -> None:
        values = row(line)
        sent = self._lines.sent
        # An event may tell of an earlier step: it is shown where the run stands.
        values["step"] = max(0, sent.train, sent.evaluation) if line["kind"] == "event" else line["step"]
        if line["kind"] == "evaluation":
            self._best = best(values, self._best)
            self.run.summary.update(self._best)
            values |= self._tables(line)
        if line["kind"] == "event" and line.get("event") in ("checkpoint", "export"):
            self._refer_to(line["event"], line)
        self._notes.add(line)  # last: what fails before has sent no row
        self.run.log(values, step=sent.rows, commit=True)

    def _tables(self, line: dict[str, Any]) -> dict[str, Any]:
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

    def _refer_to(self, kind: str, line: dict[str, Any]) -> None:
        """Tell W&B where a checkpoint or an export lies: neither uploaded nor read."""
        import wandb

        path = Path(line["path"])
        if kind == "checkpoint":  # as the trainer saw it, from its working directory
            path = self.folder / "checkpoints" / path.name
        metadata = {key: value for key, value in line.items() if key not in ("kind", "event")} | {"path": str(path)}
        artifact = wandb.Artifact(f"{self.run.id}-{kind}", type=kind, metadata=metadata)
        try:
            artifact.add_reference(path.as_uri(), checksum=False)
        except (OSError, ValueError):  # it is gone: another one has replaced it
            return
        aliases = ["latest"] + ([f"step-{line['step']}"] if "step" in line else [])
        self.run.log_artifact(artifact, aliases=aliases)

    def finish(self) -> None:
        """End the run as its state.json says; waits until W&B has everything."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, LookupError):
            state = "unknown"
        if state == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if state == "finished" else 1)
        if not self.run.offline and self._lines.are_all():  # else the next attempt has begun meanwhile
            self._unsent.unlink(missing_ok=True)


def _start(folder: Path, options: dict[str, Any]) -> Any:
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
    """Whether W&B's client would find a key without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _best_before(metrics: Path) -> dict[str, float]:
    """The best values of all evaluations that the file holds; a summary is of the whole run, not of an attempt."""
    found: dict[str, float] = {}
    for line in Lines(metrics, Sent()).new():
        if line["kind"] == "evaluation":
            found = best(row(line), found)
    return found


def _without_key(text: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


def main(folder: Path, options: dict[str, Any], supervisor: TextIO) -> None:
    """Follow a run to its end, and say how far it is."""

    def say(word: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the run ends in W&B all the same
            print(word, _without_key(text).replace("\n", " "), file=supervisor, flush=True)

    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.readline()
        ended.set()
        sys.stdin.read()  # whoever started this process is gone; nobody else would end it
        time.sleep(2 * (options["timeout"] + GRACE))
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        follower = Follower(folder, options)
        later = f"offline; send it with: partialfc runs sync {options['shown']}"
        say("started", follower.run.url or later)
        is_last = False
        while not is_last:
            is_last = ended.is_set()
            follower.send_new()
            if not is_last:
                ended.wait(_POLL)
        say("logged")
        follower.finish()
        say("finished")
    except BaseException as error:
        say("failed", f"{type(error).__name__}: {error}")
        print(_without_key(traceback.format_exc()), file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever W&B's client and service print goes to the log
    os.environ.pop("WANDB_SERVICE", None)  # of somebody else
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports of crashes to third parties
    run_folder = Path(sys.argv[2])
    os.environ.setdefault("WANDB_DATA_DIR", str(run_folder / "wandb" / "data"))  # an offline run needs it later
    os.nice(5)
    main(run_folder, json.loads(sys.argv[3]), words)
