"""Import of InsightFace's arcface_torch weights, and any backbone's, as a run's first checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from partialfc.checkpoint.folders import step_folder, step_folders
from partialfc.config import Config
from partialfc.errors import ConfigError, DataError, PartialFCError
from partialfc.head import PartialFC
from partialfc.models.weights import check_finite, load_backbone, plain_name, read_weights
from partialfc.runtime.collectives import all_gather_object
from partialfc.runtime.process import joined
from partialfc.tracking.console import log
from partialfc.train.trainer import Trainer

# The last two are of arcface_torch before 2022: the matrix alone.
_SETS = ("checkpoint_gpu_*.pt", "softmax_fc_gpu_*.pt", "rank_*_softmax_weight.pt", "rank:*_softmax_weight.pt")
_NUMBERED = re.compile(r"(.*?)(\d+)((?:_softmax_weight)?\.pth?)")


def import_weights(config: Config, backbone: Path | None, head: Path | None) -> Path:
    """Write the checkpoint of step 0 into a run folder, on the ranks that torchrun started or in this process alone.

    ``partialfc train`` with the same config then starts from these weights. A part that is not given is initialised as
    usual; optimizer state is empty.

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
        except PartialFCError as error:
            problem = error
        for found in all_gather_object(problem):  # only the rank that read a bad file knows
            if found is not None:
                raise found
        trainer.checkpoints.save(0)
        trainer.checkpoints.report(None, wait=True)
        path = step_folder(trainer.checkpoints.folder, 0)
        if process.is_first:
            log(f"{path} written: `partialfc train` with this config starts from it")
        return path


def load_head(head: PartialFC, path: Path) -> None:
    """Fill this rank's rows of a head from a set of shards; each rank reads only the rows that it needs.

    Raises:
        ConfigError: number of classes, dimension or sub-centers differ.
        DataError: a shard is missing, cannot be read, has the wrong size for its rank, or holds NaN.
    """
    shards = find_shards(path)
    sizes = [len(_rows(shard)) for shard in shards]  # mapped, not read
    total, world_size = sum(sizes), len(shards)
    for number, (shard, size) in enumerate(zip(shards, sizes, strict=True)):
        # arcface_torch gives the first (total mod W) ranks one extra class.
        expected = total // world_size + (number < total % world_size)
        if size != expected:
            raise DataError(
                f"{shard} has {size:,} classes; of {total:,} classes over {world_size} ranks it should have "
                f"{expected:,}; are files of two runs mixed, or is the last one missing?"
            )
    if total != head.num_classes:
        raise ConfigError(f"{path} has {total:,} classes, but data.train has {head.num_classes:,}")
    first_of_shard = 0
    with torch.no_grad():
        for shard, size in zip(shards, sizes, strict=True):
            first = max(first_of_shard, head.first_class)
            last = min(first_of_shard + size, head.first_class + len(head.weight))
            if first < last:
                rows = _rows(shard)[first - first_of_shard : last - first_of_shard]
                target = head.weight[first - head.first_class : last - head.first_class]
                if rows.shape != target.shape:
                    raise ConfigError(
                        f"{shard}: weights have shape {list(rows.shape[1:])} per class, but {list(target.shape[1:])} "
                        "in this head (model.embedding_dim, sub-centers)"
                    )
                check_finite(f"{shard}: weight", rows)
                target.copy_(rows)
            first_of_shard += size


def find_shards(path: Path) -> list[Path]:
    """Return the files of a set in the order of their ranks, given one of them or their folder.

    Raises:
        DataError: there is no set, there are two, or a rank's file is missing.
    """
    if path.is_dir():
        sets = [found for pattern in _SETS if (found := list(path.glob(pattern)))]
        if len(sets) != 1:
            found_instead = f"{len(sets)} sets; name one file of the set to use" if sets else "none"
            raise DataError(f"{path}: expected files {' or '.join(_SETS)}, found {found_instead}")
        files = sets[0]
    else:
        match = _NUMBERED.fullmatch(path.name)
        if match is None or not path.exists():
            raise DataError(f"{path}: expected a file such as checkpoint_gpu_0.pt, or a folder of them")
        files = [other for other in path.parent.iterdir() if _number(other, match) is not None]
    like = _NUMBERED.fullmatch(files[0].name)
    assert like is not None
    by_rank = {_number(file, like): file for file in files}
    missing = [rank for rank in range(len(files)) if rank not in by_rank]
    if missing:
        raise DataError(f"{files[0].parent}: the file of rank {missing[0]} is missing, beside {len(files)} others")
    return [by_rank[rank] for rank in range(len(files))]


def _number(file: Path, like: re.Match[str]) -> int | None:
    """Return the rank in a file's name, if the rest of the name is as in ``like``."""
    match = _NUMBERED.fullmatch(file.name)
    return int(match[2]) if match and (match[1], match[3]) == (like[1], like[3]) else None


def _rows(shard: Path) -> Tensor:
    """Return the weights of a shard's classes, [n, D]."""
    content = read_weights(shard, "state_dict_softmax_fc")
    weight = {plain_name(name): value for name, value in content.items()}.get("weight")
    if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.is_floating_point():
        raise DataError(
            f"{shard}: expected a head's state dict with a matrix 'weight', found {', '.join(content) or 'none'}"
        )
    return weight
