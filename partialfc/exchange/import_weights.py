"""Import of InsightFace's arcface_torch weights, and any backbone's, as a run's first checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partialfc.checkpoint.folders import step_folder, step_folders
from partialfc.config import Config
from partialfc.errors import ConfigError, PartialFCError
from partialfc.exchange.head_shards import load_head
from partialfc.exchange.import_progress import (
    NotKept,
    common_position,
    continuing_step,
    load_backbone_state,
    load_head_state,
)
from partialfc.models.weights import load_backbone
from partialfc.runtime.collectives import all_gather_object
from partialfc.runtime.process import joined
from partialfc.tracking.console import log
from partialfc.train.trainer import Trainer


def import_weights(config: Config, backbone: Path | None, head: Path | None) -> Path:
    """Write the first checkpoint into a run folder, on the ranks that torchrun started or in this process alone.

    ``partialfc train`` with the same config then starts from these weights. A part that is not given is initialised as
    usual. Optimizer state is kept where the files have it, and with a head and a backbone of one place also the epoch,
    if an epoch has as many steps in this run; the log says what is kept, and what not and why.

    Args:
        backbone: a state dict (``backbone.pth``, ``model.pt``), a ``checkpoint_gpu_*.pt``, or a safetensors file.
        head: one file of a set ``checkpoint_gpu_{0..W-1}.pt``, ``softmax_fc_gpu_{0..W-1}.pt`` or
            ``rank_{0..W-1}_softmax_weight.pt`` written by any number W of ranks, or their folder.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: the weights do not fit the config, or the run folder already holds checkpoints.
        DataError: a file is missing, cannot be read, or holds NaN or anything but plain tensors.
    """
    if backbone is None and head is None:
        raise ConfigError("nothing to import: give --backbone, --head or both")
    with joined(config.run.dir, config.run.timeout) as process:
        present = any(all_gather_object(bool(step_folders(config.run.dir / "checkpoints"))))
        if present:
            raise ConfigError(f"{config.run.dir} already holds checkpoints; choose another run.dir")
        plain = config.engine.model_copy(update={"name": "ddp"})  # each rank has a backbone to fill
        trainer = Trainer(config.model_copy(update={"engine": plain}), process)
        trainer.checkpoints.config = config  # the manifest must hold the config of the run itself
        problem = None
        try:
            if backbone is not None:
                left_out = load_backbone(trainer.backbone, backbone)
                if left_out and process.is_first:
                    log(f"left out, since the backbone has no classifier: {', '.join(left_out)} of {backbone}")
            if head is not None:
                load_head(trainer.head, head)
            step, told = _keep_progress(trainer, config, backbone, head)
        except PartialFCError as error:
            problem = error
        for found in all_gather_object(problem):  # only the rank that read a bad file knows
            if found is not None:
                raise found
        trainer.head.step.fill_(step)
        trainer.checkpoints.save(step)
        trainer.checkpoints.report(None, wait=True)
        path = step_folder(trainer.checkpoints.folder, step)
        if process.is_first:
            for line in told:
                log(line)
            log(f"{path} written: `partialfc train` with this config starts from it")
        return path


def _keep_progress(trainer: Trainer, config: Config, backbone: Path | None, head: Path | None) -> tuple[int, list[str]]:
    """Load optimizer state where the files have it; return the step at which the run starts, and what was kept."""
    kept, left = list[str](), list[str]()
    step = 0
    with _noting(left):
        position = common_position(backbone, head)
        if position is not None:
            step = continuing_step(config, trainer.schedule.order, trainer.schedule.total_steps, position)
            kept.append(f"epoch {position.epoch}, so that the run continues at step {step:,}")
    with _noting(left):
        if backbone is not None:
            load_backbone_state(config, trainer.backbone, trainer.engine.state, backbone)
            kept.append("the backbone's optimizer state")
    with _noting(left):
        if head is not None:
            load_head_state(config, trainer.head, trainer.head_optimizer, head, step)
            kept.append("the head's optimizer state")
    return step, [f"{what}: {'; '.join(found)}" for what, found in (("kept", kept), ("not kept", left)) if found]


@contextmanager
def _noting(left: list[str]) -> Iterator[None]:
    try:
        yield
    except NotKept as why:
        left.append(str(why))
