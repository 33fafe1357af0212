"""The trainer's part of same_numbers.py: a small data set, runs of the command line on it, and their results."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

Line = dict[str, Any]
NOT_PASSED_ON = ("PARTIALFC_", "WANDB_", "SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
HEAD = Path(__file__).with_name("same_numbers_head.py")


class RunFailed(Exception):
    """A run failed or did not end; the message is its last line."""


@dataclass(frozen=True)
class Leg:
    """One start of a run; 0 ranks: without torchrun."""

    ranks: int = 2
    settings: tuple[str, ...] = ()
    force: bool = False
    stop: bool = False  # immediately, by the file `stop`


CONFIG: dict[str, Any] = {
    "run": {"dir": "run", "seed": 3, "timeout": 120},
    "data": {"train": "task/train", "global_batch_size": 20, "image_size": 16},
    "model": {"embedding_dim": 32},
    "head": {"loss": {"name": "arcface", "scale": 16, "margin": 0.1}, "sample_rate": 0.5},
    "optim": {"epochs": 2, "lr": 0.05, "warmup": 0.5, "head_lr_factor": 5, "clip": 1.0},
    "evaluation": {"sets": ["task/verification", "task/known"], "every": 12},
    "checkpoint": {"every": 12},
    "tracking": {"log_every": 1},
}
STATEFUL = "head.loss={name: subcenter, sub_centers: 2, loss: {name: curricularface, scale: 16, margin: 0.1}}"
CENTER = "head.center_loss={weight: 0.001, alpha: 0.5}"
DECAYED = ("head.sample_rate=0.3", "optim.unsampled_rows=decayed")
ADAMW = ("optim.name=adamw", "optim.lr=2e-3", "optim.head_lr_factor=1")
CARRYING = (STATEFUL, CENTER, *DECAYED)  # much state for a checkpoint

#: Runs by name; those with "ZeRO" need DeepSpeed.
RUNS: dict[str, tuple[Leg, ...]] = {
    "two ranks": (Leg(),),
    "one rank alone": (Leg(ranks=0),),
    "ZeRO 1": (Leg(settings=("engine.name=deepspeed", "engine.zero_stage=1")),),
    "ZeRO 3": (Leg(settings=("engine.name=deepspeed", "engine.zero_stage=3")),),
    "ZeRO 2, bf16, AdamW": (
        Leg(settings=("engine.name=deepspeed", "engine.zero_stage=2", "engine.precision=bf16", *ADAMW)),
    ),
    "accumulation 2": (Leg(settings=("optim.accumulation=2", STATEFUL)),),
    "center loss": (Leg(settings=(CENTER,)),),
    "rate 0.3, decayed rows": (Leg(settings=DECAYED),),
    "rate from 0.1 to 1": (
        Leg(settings=("head.sample_rate_schedule={schedule: linear, rates: [0.1, 1], epochs: [0, 2]}",)),
    ),
    "AdamW": (Leg(settings=ADAMW),),
    "Adagrad of the head": (Leg(settings=("optim.head=adagrad",)),),
    "bf16": (Leg(settings=("engine.precision=bf16", "head.weight_dtype=bfloat16", "optim.head_state_dtype=bfloat16")),),
    "loader processes, flips": (Leg(settings=("data.workers=1", "data.augment=flip", "optim.schedule=cosine")),),
    "stopped and resumed": (
        Leg(settings=(*CARRYING, "optim.epochs=1", "optim.warmup=0"), stop=True),
        Leg(settings=(*CARRYING, "optim.epochs=1", "optim.warmup=0")),
        Leg(settings=(*CARRYING, "optim.epochs=2", "optim.warmup=0"), ranks=0, force=True),  # now 28 steps
    ),
}


# --- processes --------------------------------------------------------------------------------------------------------


def source_of(checkout: Path) -> Path:
    """Return the folder that holds the package of a checkout."""
    for folder in (checkout / "src", checkout):
        if (folder / "partialfc" / "__init__.py").is_file():
            return folder.resolve()
    raise FileNotFoundError(f"{checkout} is no checkout of partialfc: it has neither partialfc/ nor src/partialfc/")


def python(checkout: Path, *words: str, folder: Path, ranks: int = 0, seconds: float = 600) -> str:
    """Return the output of Python, or of torchrun on ``ranks`` ranks, with the package of a checkout.

    Raises:
        RunFailed: it ended with another code than 0, or did not end in time.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    process = subprocess.Popen(
        [sys.executable, *launcher, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(source_of(checkout)), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks
        process.communicate()
        raise RunFailed(f"not finished after {seconds:g} s") from None
    if process.returncode not in (0, 75):  # 75: stopped on request, without torchrun
        lines = output.splitlines() or ["no output"]
        said = [line for line in lines if line.startswith("[rank") or "error: " in line] or lines
        raise RunFailed(f"code {process.returncode}: {said[-1].strip()}")
    return output


# --- runs -------------------------------------------------------------------------------------------------------------


def trainer_run(checkout: Path, folder: Path, task: Path, name: str) -> list[Line]:
    """Run the trainer on a copy of the data set, in which caches may be left."""
    shutil.copytree(task, folder / "task")
    config = folder / "config.yaml"  # its paths are relative to the folder that a run is started in
    config.write_text(yaml.safe_dump(CONFIG))
    return train(checkout, folder, config, RUNS[name])


def quick_start(checkout: Path, folder: Path, glyphs: Path) -> list[Line]:
    """Run the checkout's quick start on a copy of the glyphs."""
    config = (checkout / "configs" / "quickstart.yaml").resolve()
    shutil.copytree(glyphs, folder / "glyphs", ignore=shutil.ignore_patterns("samples.index"))
    settings = ("run.dir=run", "data.train=glyphs", "evaluation.sets=[glyphs/verification, glyphs/closed_set]")
    digest = json.loads((glyphs / "index.json").read_text())["digest"]
    lines = train(checkout, folder, config, (Leg(settings=settings),), seconds=7200)
    return [{"where": "the glyphs", "values": {"digest": digest}}, *lines]


def train(checkout: Path, folder: Path, config: Path, legs: tuple[Leg, ...], seconds: float = 600) -> list[Line]:
    """Return the rows of metrics.jsonl of all legs of a run, and digests of the tensors in the last checkpoint."""
    run, merged = folder / "run", folder / "merged.safetensors"
    for leg in legs:
        if leg.stop:
            run.mkdir()
            (run / "stop").touch()
        words = ["-m", "partialfc", "train", str(config), *leg.settings, *(["--force"] if leg.force else [])]
        python(checkout, *words, folder=folder, ranks=leg.ranks, seconds=seconds)
    python(checkout, "-m", "partialfc", "checkpoint", "merge", str(run), str(merged), folder=folder)
    return [*metrics(run / "metrics.jsonl"), {"where": "the last checkpoint", "values": dict(tensor_digests(merged))}]


def head_runs(checkout: Path, folder: Path, ranks: int, words: str) -> dict[str, list[Line]]:
    """Return the head's cases whose names contain ``words``, with the values of all ranks side by side."""
    python(checkout, str(HEAD), str(folder), words, folder=folder, ranks=ranks)
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [beside(lines) for lines in zip(*(one[name] for one in found), strict=True)] for name in found[0]}


def beside(lines: tuple[Line, ...]) -> Line:
    """Merge the same line of all ranks into one."""
    values = {
        f"{key} on rank {rank}": value for rank, line in enumerate(lines) for key, value in line["values"].items()
    }
    return {"where": lines[0]["where"], "values": values}


def metrics(path: Path) -> Iterator[Line]:
    """Return the train and evaluation lines of a metrics.jsonl, without times."""
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] in ("train", "evaluation"):
            kind, step = line.pop("kind"), line.pop("step")
            where = f"step {step}" if kind == "train" else f"the {kind} of step {step}"
            yield {"where": where, "values": dict(flat(line))}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return leaves by dotted key, except times and speeds."""
    for key, value in tree.items():
        if key in ("time", "slowest_rank") or key.endswith(("seconds", "_per_s", "_delay")):
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def tensor_digests(path: Path) -> Iterator[tuple[str, str]]:
    """Yield digests of the tensors in a safetensors file, by name."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        first, last = entry["data_offsets"]
        found = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode() + content[start + first : start + last])
        yield name, found.hexdigest()[:16]


# --- the data set -----------------------------------------------------------------------------------------------------


def write_task(folder: Path) -> str:
    """Write training images of 35 classes, a verification set of others, and known ones; return a digest of all."""
    found = hashlib.sha256()
    for part, classes, samples, seed, first in (
        ("train", 35, 8, 1, 0),  # whole batches: versions differ in what they make of the rest
        ("known", 35, 2, 2, 0),
        ("verification", 12, 6, 3, 500),
    ):
        found.update(write_set(folder / part, classes, samples, seed, first).encode())
    protocol = {"plain": {"probe": ["plain"], "gallery": ["plain", "odd"]}, "look_alikes": []}
    (folder / "verification" / "protocol.json").write_text(json.dumps(protocol))
    return found.hexdigest()[:16]


def write_set(folder: Path, classes: int, samples: int, seed: int, first: int) -> str:
    """Write a data set folder of noisy copies of one random picture per class; return a digest of its pixels."""
    rng, pixels = np.random.default_rng(seed), hashlib.sha256()
    folder.mkdir(parents=True)
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in range(samples):
            for label in range(classes):
                picture = np.random.default_rng(1000 + first + label).integers(0, 255, (16, 16))
                noisy = (picture + rng.normal(0, 40, (16, 16))).clip(0, 255).astype(np.uint8)
                pixels.update(noisy.tobytes())
                png = io.BytesIO()
                Image.fromarray(noisy).save(png, "PNG")
                key = f"c{label}s{sample}-{'plain' if sample % 2 else 'odd'}"
                for name, content in ((f"{key}.png", png.getvalue()), (f"{key}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    content, count = shard.read_bytes(), classes * samples
    described = {"nsamples": count, "nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    table = [
        json.dumps({"id": label, "name": f"class {first + label}", "samples": samples}) for label in range(classes)
    ]
    lines = "\n".join(table) + "\n"
    (folder / "classes.jsonl").write_text(lines)
    digest = hashlib.sha256(f"{described['sha256']}\n{lines}".encode()).hexdigest()  # as any version checks it
    index = {"shardlist": [{"url": shard.name, **described}], "num_classes": classes, "num_samples": count}
    (folder / "index.json").write_text(json.dumps({**index, "digest": digest}))
    return pixels.hexdigest()
