"""A head in the files of arcface_torch, one a rank: ``checkpoint_gpu_0.pt``, ``rank_0_softmax_weight.pt`` …"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from partialfc.errors import ConfigError, DataError
from partialfc.head import PartialFC
from partialfc.models.weights import check_finite, plain_name, read_weights

# The last two are of arcface_torch before 2022: the matrix alone.
_SETS = ("checkpoint_gpu_*.pt", "softmax_fc_gpu_*.pt", "rank_*_softmax_weight.pt", "rank:*_softmax_weight.pt")
_NUMBERED = re.compile(r"(.*?)(\d+)((?:_softmax_weight)?\.pth?)")


def load_head(head: PartialFC, path: Path) -> None:
    """Fill this rank's rows of a head from a set of shards; each rank reads only the rows that it needs.

    Raises:
        ConfigError: number of classes, dimension or sub-centers differ.
        DataError: a shard is missing, cannot be read, has the wrong size for its rank, or holds NaN.
    """
    shards = find_shards(path)
    sizes = [len(read_rows(shard)) for shard in shards]  # mapped, not read
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
    copy_rows(head, shards, read_rows, head.weight)


def copy_rows(head: PartialFC, shards: list[Path], read: Callable[[Path], Tensor], target: Tensor) -> None:
    """Copy this rank's rows of all shards into ``target``, a tensor with one row per class of this rank.

    Args:
        read: returns the rows of a shard, [n, …]; it is called for every shard.

    Raises:
        ConfigError: the rows have another shape.
        DataError: they hold NaN.
    """
    first_of_shard = 0
    with torch.no_grad():
        for shard in shards:
            all_rows = read(shard)
            first = max(first_of_shard, head.first_class)
            last = min(first_of_shard + len(all_rows), head.first_class + len(target))
            if first < last:
                rows = all_rows[first - first_of_shard : last - first_of_shard]
                own = target[first - head.first_class : last - head.first_class]
                if rows.shape != own.shape:
                    raise ConfigError(
                        f"{shard}: weights have shape {list(rows.shape[1:])} per class, but {list(own.shape[1:])} "
                        "in this head (model.embedding_dim, sub-centers)"
                    )
                check_finite(f"{shard}: weight", rows)
                own.copy_(rows)
            first_of_shard += len(all_rows)


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


def read_rows(shard: Path) -> Tensor:
    """Return the weights of a shard's classes, [n, D].

    Raises:
        DataError: it cannot be read, or holds no such matrix.
    """
    content = read_weights(shard, "state_dict_softmax_fc")
    weight = {plain_name(name): value for name, value in content.items()}.get("weight")
    if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.is_floating_point():
        raise DataError(
            f"{shard}: expected a head's state dict with a matrix 'weight', found {', '.join(content) or 'none'}"
        )
    return weight
