"""``partialfc evaluate``: the newest checkpoint of a run, on its own evaluation sets or on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partialfc import models
from partialfc.build.backbone import build_backbone
from partialfc.build.head import build_head
from partialfc.checkpoint.folders import latest_valid, step_folders
from partialfc.checkpoint.state import TrainingState
from partialfc.config import parse_config
from partialfc.data.index import CLASSES
from partialfc.engines.state import ReplicatedBackbone
from partialfc.errors import ConfigError, DamagedCheckpoint
from partialfc.evaluate.runner import Evaluation, describe_results
from partialfc.runtime.collectives import broadcast_from_rank0, run_alike
from partialfc.runtime.process import joined
from partialfc.tracking.console import log

_TIMEOUT = 120.0  # seconds of silence after which a rank counts as lost


def evaluate(run: Path, sets: Sequence[Path] = (), model: str | None = None) -> dict[str, Any] | None:
    """Evaluate a run's newest valid checkpoint, on the ranks that torchrun started, or in this process alone.

    Results are printed, and written into the run's ``evaluation/``.

    Args:
        sets: evaluation sets instead of those of the run's config; their names become part of the file's name.
        model: confirms the run's ``model.name`` if that is not built in, since it names code to execute.

    Returns:
        The results, or None if a stop was requested meanwhile.

    Raises:
        ConfigError: ``run`` is not a run with checkpoints, no evaluation set is given, or ``model`` is missing.
        DataError: all checkpoints are damaged, or a set is missing, incomplete or malformed.
    """
    with joined(None, _TIMEOUT) as process:  # the file `stop` in the run folder is for a training run
        if not broadcast_from_rank0(lambda: step_folders(run / "checkpoints")):
            raise ConfigError(f"{run} is not the folder of a run with checkpoints")
        found = latest_valid(run / "checkpoints")
        if found is None:
            raise DamagedCheckpoint(f"all checkpoints in {run / 'checkpoints'} are damaged")
        path, manifest = found
        config = parse_config(manifest["config"])
        config.run.dir = run
        config.evaluation.sets = list(sets) or config.evaluation.sets
        if not config.evaluation.sets:
            raise ConfigError(f"the config of {run} names no evaluation.sets; give one: --set FOLDER")
        table = path / CLASSES if CLASSES in manifest["files"] else None
        evaluation = run_alike(lambda: Evaluation(config))
        evaluation.match_classes(manifest["num_classes"], table)
        models.require_trust(config.model.name, model, f"{path}")
        backbone = build_backbone(config, process)
        head = build_head(config, manifest["num_classes"], device=process.device)
        TrainingState(ReplicatedBackbone(backbone), head).load(path)
        where = f"{process.world_size} ranks on {process.device.type}"
        if process.is_first:
            log(f"evaluating {path} over {where}")
        name = f"step-{manifest['step']:08d}" + "".join(f"-{folder.name}" for folder in sets)
        results = evaluation.run(backbone, head, process, name)
        if process.is_first:
            for line in describe_results(results) if results is not None else ["stopped on request"]:
                log(line)
        return results
