"""Facts in which the ranks of a run must agree: config, data and backbone."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from partialfc.config import Config
from partialfc.data.dataset import TarDataset
from partialfc.data.index import CLASSES
from partialfc.data.pairs import PAIRS
from partialfc.files import open_regular
from partialfc.runtime.agreement import digest, version_of

_MAY_DIFFER = ("data.workers",)
_PROTOCOL = "protocol.json"
_SAMPLES_READ = 256  # of a data set, evenly spread
_PIECE = 1 << 24  # bytes


def config_facts(config: Config, force: bool) -> dict[str, str]:
    """Return the config by key. Of a path only its presence counts: nodes may keep the same files in other places."""
    facts = {key: value for key, value in _leaves(config.model_dump(), "") if key not in _MAY_DIFFER}
    facts["--force"] = str(force).lower()
    if config.engine.deepspeed_config is not None:
        facts["the content of engine.deepspeed_config"] = _file_digest(config.engine.deepspeed_config)
    if config.engine.name == "deepspeed":
        facts["deepspeed"] = version_of("deepspeed")
    return facts


def data_facts(key: str, dataset: TarDataset) -> dict[str, str]:
    """Return digests of a data set: its index, class table and protocol, all keys and labels, and the bytes of some
    samples, of a small set all.

    Args:
        key: of the config, which names the data set.
    """
    some = np.unique(np.linspace(0, dataset.num_samples - 1, _SAMPLES_READ).astype(np.int64))
    return {
        f"{key}: index.json": digest([json.dumps(dataset.index, sort_keys=True).encode()]),
        f"{key}: {CLASSES}": _file_digest(dataset.class_table),
        **{f"{key}: {name}": _file_digest(dataset.folder / name) for name in (_PROTOCOL, PAIRS)},
        f"{key}: keys and labels": dataset.content,
        f"{key}: images": digest(dataset.read(index) for index in some.tolist() if index >= 0),
    }


def backbone_facts(backbone: nn.Module, name: str) -> dict[str, str]:
    """Return digests of a backbone: its tensors, and the code of its modules and their factory.

    The code may be of another package; what it imports is not covered.

    Args:
        name: ``model.name``.
    """
    tensors = {key: (list(value.shape), str(value.dtype)) for key, value in backbone.state_dict().items()}
    trained = [key for key, parameter in backbone.named_parameters() if parameter.requires_grad]
    factory = sys.modules.get(name.partition(":")[0])
    sources = {_source(part) for part in (factory, *map(type, backbone.modules())) if part}
    return {
        "the tensors of the backbone": digest([json.dumps([tensors, trained]).encode()]),
        "the code of the backbone": digest(sorted(source for source in sources if source)),
    }


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Path) for item in value):
        yield key, f"{len(value)} path{'s' if len(value) != 1 else ''}"
    else:
        yield key, "a path" if isinstance(value, Path) else json.dumps(value, ensure_ascii=False, default=str)


def _file_digest(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return digest(iter(lambda: file.read(_PIECE), b""))
    except OSError:
        return "no such file"


def _source(part: Any) -> bytes | None:
    """Return the source file of a module or a class; None of torch's own, and of what has none."""
    if isinstance(part, type) and part.__module__.startswith("torch."):
        return None
    try:
        file = inspect.getsourcefile(part)
        return Path(file).read_bytes() if file else None
    except (TypeError, OSError):  # made in an interactive session, or removed since
        return None
