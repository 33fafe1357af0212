"""``partialfc evaluate``: the newest checkpoint of a run, on its own evaluation sets or on others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partialfc import models
from partialfc.build.backbone import build_backbone
from partialfc.build.head import build_head
from partialfc.checkpoint.folders import latest_valid, require_run
from partialfc.checkpoint.reader import class_count
from partialfc.checkpoint.state import TrainingState
from partialfc.config import parse_config
from partialfc.data.index import CLASSES
from partialfc.engines.state import ReplicatedBackbone
from partialfc.errors import ConfigError, DamagedCheckpoint
from partialfc.evaluate.runner import Evaluation, describe_results, why_not_writable
from partialfc.runtime.collectives import broadcast_from_rank0, run_alike
from partialfc.runtime.process import joined
from partialfc.tracking.console import log

_TIMEOUT = 120.0  # seconds of silence after which a rank counts as lost
_MOST_CHARACTERS = 100  # of the names of sets in a file's name


def evaluate(run: Path, sets: Sequence[Path] = (), model: str | None = None) -> dict[str, Any] | None:
    """Evaluate a run's newest valid checkpoint, on the ranks that torchrun started, or in this process alone.

    Results are printed, and written into the run's ``evaluation/`` if that can be written.

    Args:
        sets: evaluation sets instead of those of the run's config; the file is named after their names and places.
        model: confirms the run's ``model.name`` if that is not built in, since it names code to execute.

    Returns:
        The results, or None if a stop was requested meanwhile.

    Raises:
        ConfigError: ``run`` is not a run with checkpoints, no evaluation set is given, or ``model`` is missing.
        DataError: all checkpoints are damaged, or a set is missing, incomplete or malformed.
    """
    with joined(None, _TIMEOUT) as process:  # the file `stop` in the run folder is for a training run
        broadcast_from_rank0(lambda: require_run(run))
        found = latest_valid(run / "checkpoints")
        if found is None:
            raise DamagedCheckpoint(f"all checkpoints in {run / 'checkpoints'} are damaged")
        path, manifest = found
        config = parse_config(manifest.get("config", {}))
        config.run.dir = run
        config.evaluation.sets = list(sets) or config.evaluation.sets
        if not config.evaluation.sets:
            raise ConfigError(f"the config of {run} names no evaluation.sets; give one: --set FOLDER")
        problem = broadcast_from_rank0(lambda: why_not_writable(run))
        if problem and process.is_first:
            log(f"WARNING: {problem}; the results are only printed")
        num_classes = class_count(path, manifest)
        evaluation = run_alike(lambda: Evaluation(config))
        evaluation.match_classes(num_classes, path / CLASSES if CLASSES in manifest["files"] else None)
        models.require_trust(config.model.name, model, f"{path}")
        backbone = build_backbone(config, process)
        head = build_head(config, num_classes, device=process.device)
        TrainingState(ReplicatedBackbone(backbone), head).load(path)
        where = f"{process.world_size} ranks on {process.device.type}"
        if process.is_first:
            log(f"evaluating {path} over {where}")
        name = None if problem else _name_of(manifest["step"], sets)
        results = evaluation.run(backbone, head, process, name)
        if process.is_first:
            for line in describe_results(results) if results is not None else ["stopped on request"]:
                log(line)
        return results


def _name_of(step: int, sets: Sequence[Path]) -> str:
    """Return the name of the results' file. Sets whose folders have the same name differ by a digest of their paths."""
    if not sets:
        return f"step-{step:08d}"
    places = [folder.resolve() for folder in sets]
    names = "-".join(place.name for place in places)[:_MOST_CHARACTERS]
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, places))).hexdigest()
    return f"step-{step:08d}-{names}-{digest[:8]}"
