"""Several runs, one after the other in the same processes: many_runs.py CONFIG RUNS, under torchrun or alone.

RUNS is a JSON list of ``{"overrides": [key=value, …], "fault": [FAULT, RANK, STEPS]}``, the fault as in faulty_run.py,
or none. Starting processes takes longer than a small run, and importing DeepSpeed longer still. Each rank leaves a
``rank0.json`` in the run folder: what it has of the backbone, and its loss scale. A run that fails is told and left;
the exit code is the number of those.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from partialfc.config import load_config
from partialfc.engines.state import OPTIMIZER
from partialfc.runtime.process import joined
from partialfc.train.trainer import Trainer
from tests.harness.faulty_run import install, steps_of


def digest_of(trainer: Trainer) -> str:
    """Of the float32 weights and the buffers."""
    digest = hashlib.sha256()
    with trainer.engine.evaluating() as backbone:
        for value in backbone.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def stepped(trainer: Trainer) -> bool:
    """Whether the backbone's optimizer has anything in its state but zeros; on other ranks than the first, no."""
    tensors = trainer.engine.state.tensors()
    return any(bool(value.any()) for name, value in tensors.items() if name.startswith(OPTIMIZER))


def write_down(trainer: Trainer, first: str, stepped_at_first: bool) -> None:
    used = hashlib.sha256()  # the weights of the forward pass, as far as they lie here
    for parameter in trainer.backbone.parameters():
        used.update(parameter.detach().float().cpu().numpy().tobytes())
    found = {
        "first": first,
        "stepped at first": stepped_at_first,
        "whole": digest_of(trainer),
        "used": used.hexdigest(),
        "step": trainer.step,
        "skipped": trainer.skipped_steps,
        **trainer.engine.counts(),
    }
    (trainer.config.run.dir / f"rank{trainer.process.rank}.json").write_text(json.dumps(found))


def main() -> int:
    path, runs = sys.argv[1:]
    failed = 0
    with joined(Path(runs).parent, 120, group_of_one=True) as rank:
        for run in json.loads(Path(runs).read_text()):
            config = load_config(path, run["overrides"])
            try:
                trainer = Trainer(config, rank)
                if run.get("fault"):
                    fault, at_fault, steps = run["fault"]
                    install(trainer, rank, fault, at_fault, steps_of(steps))
                first, has_stepped = digest_of(trainer), stepped(trainer)
                trainer.train()
                dist.barrier()
                write_down(trainer, first, has_stepped)
            except Exception:
                print(f"failed: {config.run.dir}", file=sys.stderr)
                traceback.print_exc()
                failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
