"""Facts in which all ranks of a run must agree, compared before anything is computed.

Facts are short texts by name. Ranks that differ in one would train on in silence, or wait for each other; all of them
refuse, with the same words.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from partialfc import __version__
from partialfc.errors import ConfigError
from partialfc.runtime.collectives import all_gather_object

Facts = Mapping[str, str]

_MOST_FACTS, _MOST_VALUES = 8, 4  # in a message
_READ_WITHIN = timedelta(seconds=10)
_PACKAGES = ("numpy", "Pillow")  # which decode and augment


def require_same(facts: Facts) -> None:
    """Compare ``facts`` over all ranks. A collective.

    Raises:
        ConfigError: on every rank, if they differ; the message names the facts, their values and ranks.
    """
    if len(set(all_gather_object(digest([json.dumps(facts, sort_keys=True).encode()])))) > 1:
        raise ConfigError(describe_differences(all_gather_object(facts)))


def require_same_over(store: dist.Store, rank: int, world_size: int, facts: Facts) -> None:
    """Compare ``facts`` as :func:`require_same` does, where there is no process group yet."""
    store.set(f"facts-{rank}", json.dumps(facts))
    if rank == 0:
        everyone = [json.loads(store.get(f"facts-{other}")) for other in range(world_size)]
        store.set("differences", describe_differences(everyone))
    differences = store.get("differences").decode()
    if differences:
        store.set(f"has-read-{rank}", "")
        if rank == 0:  # the store may end with this process
            with suppress(RuntimeError):
                store.wait([f"has-read-{other}" for other in range(world_size)], _READ_WITHIN)
        raise ConfigError(differences)


def describe_differences(everyone: list[Facts]) -> str:
    """Return one line on the facts that differ, ``""`` if none do.

    Args:
        everyone: the facts of each rank, in the order of the ranks.
    """
    names = list(dict.fromkeys(name for facts in everyone for name in facts))
    parts = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            values = [f"{value} on {_describe_ranks(those)}" for value, those in ranks.items()]
            more = "; …" if len(values) > _MOST_VALUES else ""
            parts.append(f"{name} ({'; '.join(values[:_MOST_VALUES])}{more})")
    if not parts:
        return ""
    more = f" and {len(parts) - _MOST_FACTS} more" if len(parts) > _MOST_FACTS else ""
    return (
        f"the ranks differ in {', '.join(parts[:_MOST_FACTS])}{more}. Give every rank the same config, data and "
        "software; only paths and data.workers may differ"
    )


def software(device: torch.device) -> dict[str, str]:
    """Return the facts of this process: versions, the code of this package, and the kind of device."""
    return {
        "partialfc": __version__,
        "the code of partialfc": code_digest(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version_of(name) for name in _PACKAGES},
        "device": device.type,
    }


def version_of(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def code_digest(folder: Path) -> str:
    """Return the digest of the Python files below a folder, their names included."""
    files = sorted(folder.rglob("*.py"))
    return digest(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return a short digest of a sequence of byte strings."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:16]


def _describe_ranks(ranks: list[int]) -> str:
    """Return ``rank 3`` or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
