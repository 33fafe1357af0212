"""Backbones by name: one of this package, ``my.module:factory``, or ``timm:NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from partialfc.errors import ConfigError
from partialfc.models.by_name import BY_NAME
from partialfc.models.external import build_by_path, build_timm, check_output
from partialfc.options import convert_like, describe_unknown, with_defaults

_RESERVED = {
    "embedding_dim": "model.embedding_dim",
    "channels": "data.channels",
    "image_size": "data.image_size",
    "activation_checkpointing": "model.activation_checkpointing",
}


def build(
    name: str,
    embedding_dim: int,
    channels: int,
    image_size: int,
    options: Mapping[str, Any] | None = None,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Build a module that turns images [B, channels, image_size, image_size] into embeddings [B, embedding_dim].

    Args:
        name: one of :data:`BY_NAME`, ``my.module:factory`` or ``timm:NAME``.
        options: further parameters of the backbone, by keyword.

    Raises:
        ConfigError: the name is unknown, or the backbone does not take these options or sizes.
        MissingDependency: timm is needed and not installed.
    """
    options = dict(options or {})
    check(name, options, activation_checkpointing)
    sizes = {"embedding_dim": embedding_dim, "channels": channels, "image_size": image_size}
    if is_external(name):
        if name.startswith("timm:"):
            module = build_timm(name.removeprefix("timm:"), sizes, options, activation_checkpointing)
        else:
            module = build_by_path(name, sizes, options, activation_checkpointing)
        check_output(module, f"model.name={name}", **sizes)
        return module
    factory = BY_NAME[name]
    if activation_checkpointing:
        sizes["activation_checkpointing"] = True
    try:
        return factory(**sizes, **_converted(factory, options))
    except ConfigError as error:
        raise ConfigError(f"model ({name}): {error}") from error


def check(name: str, options: Mapping[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
    """Check name and options of a backbone, without building it and without importing external code.

    Raises:
        ConfigError: the name is unknown, or a backbone of this package does not take these options.
    """
    for option in options or {}:
        if option in _RESERVED:
            raise ConfigError(f"model.options.{option}: set {_RESERVED[option]} instead")
    if is_external(name):
        path, _, attribute = name.partition(":")
        dotted = [*path.split("."), *attribute.split(".")]
        if not attribute or (path != "timm" and not all(part.isidentifier() for part in dotted)):
            raise ConfigError(f"model.name: expected my.module:factory or timm:NAME, got {name!r}")
        return
    if name not in BY_NAME:
        raise ConfigError(f"model.name: {describe_unknown(name, BY_NAME)}; your own are written my.module:factory")
    accepted = _parameters(BY_NAME[name])
    if activation_checkpointing and "activation_checkpointing" not in accepted:
        able = [other for other in BY_NAME if "activation_checkpointing" in _parameters(BY_NAME[other])]
        raise ConfigError(f"model.activation_checkpointing: {name} does not support it; {', '.join(able)} do")
    _converted(BY_NAME[name], options or {})


def spelled_out(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a backbone with its defaults; of one that is not of this package as they are."""
    if name not in BY_NAME:
        return dict(options)
    return {option: value for option, value in with_defaults(BY_NAME[name], options).items() if option not in _RESERVED}


def require_trust(name: str, trusted: str | None, where: str) -> None:
    """Require consent to run external code that a checkpoint names: it may come from anywhere.

    Args:
        name: ``model.name`` in the checkpoint.
        trusted: the name that the user has passed.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: ``name`` is external, and ``trusted`` is another name or None.
    """
    if is_external(name) and trusted != name:
        raise ConfigError(
            f"{where} names model.name={name}, code from outside this package; to let it run, pass --model {name}"
        )


def is_external(name: str) -> bool:
    """Return True if building a backbone of this name runs code from outside this package."""
    return ":" in name


def _converted(factory: Callable[..., nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in the types that a backbone of this package takes."""
    accepted = {name: value for name, value in _parameters(factory).items() if name not in _RESERVED}
    for option in options:
        if option not in accepted:
            known = f": {describe_unknown(option, accepted)}" if accepted else ": this backbone has no options"
            raise ConfigError(f"model.options.{option}{known}")
    return {
        option: convert_like(f"model.options.{option}", value, accepted[option].default)
        for option, value in options.items()
    }


def _parameters(factory: Callable[..., nn.Module]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters
