"""Weights from files, which are not trusted."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError, DataError


def load_backbone(module: nn.Module, path: Path) -> None:
    """Load a backbone's weights from a file: a state dict, an InsightFace checkpoint, or safetensors.

    Raises:
        ConfigError: names or shapes differ from the backbone's.
        DataError: the file cannot be read, or holds NaN.
    """
    content = read_weights(path, "state_dict_backbone", "state_dict")
    found = {plain_name(name): value for name, value in content.items() if isinstance(value, Tensor)}
    expected = module.state_dict()
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        problems = [f"lacks {missing[0]}{_more(missing)}"] if missing else []
        if unexpected:
            problems.append(f"holds {unexpected[0]}{_more(unexpected)}, which this backbone does not have")
        raise ConfigError(f"{path} does not fit model.name: it {', and '.join(problems)}")
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise ConfigError(
                f"{path}: {name} is {list(value.shape)}, and {list(expected[name].shape)} in this backbone; check "
                "model.embedding_dim, data.channels and data.image_size"
            )
        check_finite(f"{path}: {name}", value)
    module.load_state_dict(found, strict=False)


def read_weights(path: Path, *keys: str) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values, without executing anything in the file.

    Args:
        keys: keys under which the dictionary may be nested, outermost first.

    Raises:
        DataError: the file cannot be read, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format from before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused, since it holds more than tensors and plain values: {error}") from error
    except Exception as error:  # damaged bytes raise any kind of error
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(content, Tensor):
        return {"weight": content}
    for key in keys:
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{path}: expected a dictionary of tensors by name, got {type(content).__name__}")
    return content


def plain_name(name: str) -> str:
    """Return a tensor's name without the prefixes of wrappers."""
    for wrapper in ("module.", "_orig_mod."):
        name = name.removeprefix(wrapper)
    return name


def check_finite(what: str, value: Tensor) -> None:
    """Raise a DataError if ``value`` holds NaN or Inf."""
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise DataError(f"{what} holds NaN or Inf")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
