"""A run in which something breaks: faulty_run.py CONFIG FAULT RANK STEPS [key=value …], as a rank or alone.

FAULT breaks, on one RANK, in the steps whose numbers are given (the first step is 1; ``8-`` means from there on):
``embeddings`` (of one sample), ``gradient`` (of a backbone parameter), ``row_gradient`` (of the head's shard),
``shard`` (the weight of one class), ``backbone`` (its weights become noise), ``silence`` (the process stops itself),
``slow`` (it takes longer than the others), ``hang`` (it gets no further, and collectives wait for it, as on GPUs), or
``nothing``. When the run has ended well, each rank leaves in the run
folder a ``rank0.json``: digests of what it has of the backbone, and how its engine counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

import torch

from partialfc.config import load_config
from partialfc.engines.state import OPTIMIZER
from partialfc.errors import PartialFCError
from partialfc.runtime.process import ProcessContext, joined
from partialfc.train.trainer import Trainer
from tests.harness.hurried import HURRIED
from tests.harness.machine import pretend_fp16


def steps_of(text: str) -> range | set[int]:
    if text.endswith("-"):
        return range(int(text[:-1]), 1 << 30)
    return {int(step) for step in text.split(",")}


def install(trainer: Trainer, process: ProcessContext, fault: str, at_fault: int, steps: Any) -> None:
    def due() -> bool:
        return process.rank == at_fault and trainer.backbone.training and trainer.step + 1 in steps

    def spoil_embeddings(module: Any, images: Any, embeddings: torch.Tensor) -> torch.Tensor | None:
        if not due():
            return None
        spoilt = embeddings.clone()
        spoilt[1] = torch.nan
        return spoilt

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.inf) if due() else gradient

    def spoil_rows(weight: torch.Tensor) -> None:
        if due() and weight.grad is not None:
            weight.grad._values()[0, 0] = torch.nan

    begin = trainer.engine.begin_step

    def begin_step(lr: float) -> None:
        if due() and fault == "shard":
            trainer.head.weight.data[2] = torch.nan
        if trainer.step + 1 in steps and fault == "backbone":  # on every rank, as a bad update would
            torch.manual_seed(trainer.step)
            for parameter in trainer.backbone.parameters():
                parameter.data = torch.randn_like(parameter)
        if due() and fault == "slow":
            time.sleep(0.3)
        if due() and fault == "hang":
            time.sleep(3600)
        if due() and fault == "silence":
            os.kill(os.getpid(), signal.SIGSTOP)
        begin(lr)

    trainer.engine.begin_step = begin_step  # type: ignore[method-assign]
    if fault == "embeddings":
        trainer.backbone.register_forward_hook(spoil_embeddings)
    elif fault == "gradient":
        next(iter(trainer.backbone.parameters())).register_hook(spoil_gradient)
    elif fault == "row_gradient":
        trainer.head.weight.register_post_accumulate_grad_hook(spoil_rows)


def digest_of(trainer: Trainer) -> str:
    """Of the float32 weights and the buffers."""
    digest = hashlib.sha256()
    with trainer.engine.evaluating() as backbone:
        for value in backbone.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def stepped(trainer: Trainer) -> bool:
    """Return True if the backbone's optimizer has a non-zero state; always False on ranks other than 0."""
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


def main() -> None:
    path, fault, at_fault, steps, *overrides = sys.argv[1:]
    config = load_config(path, overrides)
    if config.engine.name == "deepspeed" and config.engine.precision == "fp16":
        pretend_fp16()
    try:
        group_of_one = config.engine.name == "deepspeed"
        with joined(config.run.dir, config.run.timeout, group_of_one, HURRIED) as process:
            trainer = Trainer(config, process)
            first, has_stepped = digest_of(trainer), stepped(trainer)
            install(trainer, process, fault, int(at_fault), steps_of(steps))
            if fault == "hang":
                process._set_group_timeouts = lambda timeout: None  # type: ignore[method-assign]
            trainer.train()
            write_down(trainer, first, has_stepped)
    except PartialFCError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # as the command ends


if __name__ == "__main__":
    main()
