"""Weights from files, which are not trusted."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError, DataError
from partialfc.files import open_regular

_WRAPPERS = ("module.", "_orig_mod.")  # DDP and DataParallel; torch.compile
_CLASSIFIER = re.compile(r"(fc|classifier(\.\d+)?|heads?(\.(fc|head))?|head_dist|last_linear)\.(weight|bias)")
_GLOBAL = re.compile(r"GLOBAL (\S+)")  # in the messages of torch's unpickler
_MAX_HEADER = 100_000_000  # bytes of a safetensors file's header, as its library limits them


def load_backbone(module: nn.Module, path: Path) -> list[str]:
    """Load a backbone's weights from a file: a state dict, an InsightFace checkpoint, or safetensors.

    Returns:
        The names of tensors that were left out: those of a classifier, where the backbone has none.

    Raises:
        ConfigError: names, shapes or types differ from the backbone's.
        DataError: the file cannot be read, or holds NaN.
    """
    content = read_weights(path, "state_dict_backbone", "state_dict")
    expected = module.state_dict()
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            plain = name if name in expected else plain_name(name)
            if plain in found:
                raise DataError(f"{path} holds {plain} twice, with and without the prefix of a wrapper")
            found[plain] = value
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    left_out = unexpected if not missing and _are_of_a_classifier(unexpected, found, expected) else []
    unexpected = [name for name in unexpected if name not in left_out]
    if missing or unexpected:
        problems = [f"lacks {missing[0]}{_more(missing)}"] if missing else []
        if unexpected:
            problems.append(f"holds {unexpected[0]}{_more(unexpected)}, which this backbone does not have")
        raise ConfigError(f"{path} does not fit model.name: it {', and '.join(problems)}")
    found = {name: value for name, value in found.items() if name in expected}
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise ConfigError(
                f"{path}: {name} is {list(value.shape)}, and {list(expected[name].shape)} in this backbone; check "
                "model.embedding_dim, data.channels and data.image_size"
            )
        if value.is_floating_point() != expected[name].is_floating_point():
            raise ConfigError(f"{path}: {name} is {value.dtype}, and {expected[name].dtype} in this backbone")
        check_finite(f"{path}: {name}", value)
    module.load_state_dict(found, strict=False)
    return left_out


def _are_of_a_classifier(names: list[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Return True if ``names`` are weight [classes, features] and bias [classes] of modules that the backbone lacks."""
    modules = {name.rpartition(".")[0] for name in names}
    return (
        all(_CLASSIFIER.fullmatch(name) and found[name].dim() == 1 + name.endswith("weight") for name in names)
        and all(f"{module}.weight" in names for module in modules)
        and not any(name.startswith(tuple(f"{module}." for module in modules)) for name in expected)
    )


def read_weights(path: Path, *keys: str) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values, without executing anything in the file.

    Args:
        keys: keys under which the dictionary may be nested, outermost first.

    Raises:
        DataError: the file cannot be read, or holds anything else.
    """
    content = _read(path)
    if isinstance(content, Tensor):
        content = {"weight": content}
    for key in keys:
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{path}: expected a dictionary of tensors by name, got {type(content).__name__}")
    for name, value in content.items():
        if isinstance(value, Tensor) and (kind := _unusual_kind(value)):
            raise DataError(f"{path}: {name} is a {kind} tensor; expected a dense one of real numbers, with its values")
    return content


def _read(path: Path) -> Any:
    """Return the content of a file of torch's or of safetensors, told by its first bytes and not by its name."""
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not start.startswith((b"PK", b"\x80")):  # a zip archive or a pickle
        _refuse_other_kinds(path, start)
    try:
        if _is_safetensors(start):
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings(), open_regular(path) as file:
            warnings.simplefilter("ignore", UserWarning)  # what cannot be read is refused below
            if path.suffix != ".safetensors":  # by which torch would choose the format
                with suppress(RuntimeError):  # torch's format from before 1.6 cannot be mapped
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        if named is None:
            raise DataError(f"{path} cannot be read: it is damaged, or was not written by torch.save") from error
        raise DataError(
            f"{path} is refused, since it holds more than tensors and plain values ({named[1]}); save the weights "
            "alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # damaged bytes raise any kind of error
        if "TorchScript" in str(error):
            advice = "save its weights: torch.save(torch.jit.load(…).state_dict(), FILE)"
            raise DataError(f"{path} cannot be read: it is a TorchScript archive; {advice}") from error
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """Raise DataError for a file that begins neither as one of torch's nor of safetensors."""
    if _is_safetensors(start):
        return
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        problem = "it is empty; copy or download it again"
    elif start.startswith(b"version https://git-lfs"):
        problem = "it is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`"
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        problem = "it is a web page, not the weights; download the file that the page links to"
    else:
        problem = f"it begins with {start[:8]!r}, unlike a file of torch.save or safetensors"
    raise DataError(f"{path} cannot be read: {problem}")


def _unusual_kind(value: Tensor) -> str:
    """Return the kind of a tensor that cannot be copied as it is; ``""`` for a dense one of real numbers."""
    if value.layout != torch.strided:
        return "sparse"
    if value.device.type != "cpu":
        return value.device.type
    return "quantized" if value.is_quantized else "complex" if value.is_complex() else ""


def plain_name(name: str) -> str:
    """Return a tensor's name without the prefixes of wrappers, in whatever order they were put around it."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def check_finite(what: str, value: Tensor) -> None:
    """Raise a DataError if ``value`` holds NaN or Inf."""
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise DataError(f"{what} holds NaN or Inf")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
