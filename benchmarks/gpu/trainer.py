"""A short training by the trainer itself, if its packages and a data set are present."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .measure import Bench, Entries

_PACKAGES = ("pydantic", "yaml", "typer", "rich", "PIL", "webdataset")
_CHECKOUT = Path(__file__).parents[2]
_BATCH, _STEPS = 256, 300


def run(bench: Bench, entries: Entries) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    data = os.environ.get("PARTIALFC_DATA", "")
    if missing:
        entries["training"] = {"skipped": f"not installed: {', '.join(missing)}"}
    elif not data:
        entries["training"] = {"skipped": "PARTIALFC_DATA names no data set folder"}
    elif not (Path(data) / "index.json").exists():
        entries["training"] = {"skipped": f"{data} has no index.json: not a data set folder"}
    else:
        entries.measure("training", lambda: train(bench, Path(data).resolve()), need=20)


def train(bench: Bench, data: Path) -> dict[str, Any]:
    """Train a few hundred steps with the quick start's settings, or as many as there is time for; return its last log
    line.
    """
    folder = bench.out / "trainer"
    shutil.rmtree(folder, ignore_errors=True)
    samples = json.loads((data / "index.json").read_text())["num_samples"]
    epochs = (10 if bench.small else _STEPS) * _BATCH / samples
    settings = {
        "run.dir": folder,
        "data.train": data,
        "data.global_batch_size": _BATCH,
        "optim.epochs": epochs,
        "optim.warmup": min(0.25, epochs),
        "evaluation.sets": "[]",
        "tracking.log_every": 5 if bench.small else 20,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = ["-m", "partialfc", "train", str(_CHECKOUT / "configs" / "quickstart.yaml")]
    words = [*torchrun, *command, *(f"{key}={value}" for key, value in settings.items())]
    log = bench.out / "trainer.log"
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, cwd=bench.out, start_new_session=True)
        try:
            code = process.wait(timeout=max(1.0, bench.left() - 2))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
    if code:
        raise RuntimeError(" | ".join(log.read_text().splitlines()[-3:]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    if not trained:
        raise RuntimeError("there was no time for the first log line")
    last = trained[-1]
    wanted = ("step", "loss", "target_cosine", "samples_per_s")
    seconds = {f"{name} s": value for name, value in last.get("seconds", {}).items()}
    return {"finished": code == 0} | {name: last[name] for name in wanted if name in last} | seconds
