"""A backbone from its name: one of ours, ``my.module:factory``, or ``timm:NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from partialfc.errors import ConfigError
from partialfc.models.by_name import BY_NAME
from partialfc.models.external import build_by_path, build_timm, check_output
from partialfc.options import like_default, unknown_name

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
    """The module that turns images [B, channels, image_size, image_size] into embeddings [B, embedding_dim].

    Raises:
        ConfigError: there is no such backbone, it does not take these options or sizes, or it gives anything else.
        MissingDependency: timm is needed and not installed.
    """
    options = dict(options or {})
    check(name, options, activation_checkpointing)
    sizes = {"embedding_dim": embedding_dim, "channels": channels, "image_size": image_size}
    if is_foreign(name):
        where, _, what = name.partition(":")
        foreign = build_timm if where == "timm" else build_by_path
        module = foreign(what if where == "timm" else name, sizes, options, activation_checkpointing)
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
    """Find mistakes without building anything, and without importing other people's code.

    Raises:
        ConfigError: there is no such backbone, or one of ours does not take these options.
    """
    for option in options or {}:
        if option in _RESERVED:
            raise ConfigError(f"model.options.{option}: set {_RESERVED[option]} instead")
    if is_foreign(name):
        path, _, attribute = name.partition(":")
        dotted = [*path.split("."), *attribute.split(".")]
        if not attribute or (path != "timm" and not all(part.isidentifier() for part in dotted)):
            raise ConfigError(f"model.name: expected my.module:factory or timm:NAME, got {name!r}")
        return
    if name not in BY_NAME:
        raise ConfigError(f"model.name: {unknown_name(name, BY_NAME)}; your own are written my.module:factory")
    accepted = _parameters(BY_NAME[name])
    if activation_checkpointing and "activation_checkpointing" not in accepted:
        able = [other for other in BY_NAME if "activation_checkpointing" in _parameters(BY_NAME[other])]
        raise ConfigError(f"model.activation_checkpointing: {name} cannot do it; {', '.join(able)} can")
    _converted(BY_NAME[name], options or {})


def require_trust(name: str, trusted: str | None, where: str) -> None:
    """A checkpoint may come from anywhere, and must not choose what code runs.

    Raises:
        ConfigError: ``name``, which stands in the checkpoint ``where``, is not one of ours, and the user has not
            repeated it as ``trusted``.
    """
    if is_foreign(name) and trusted != name:
        raise ConfigError(
            f"{where} is of model.name={name}, code that is not of this package; if it may run, pass --model {name}"
        )


def is_foreign(name: str) -> bool:
    """Whether building a backbone of this name runs code that is not of this package."""
    return ":" in name


def _converted(factory: Callable[..., nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the types that one of our backbones takes."""
    accepted = {name: value for name, value in _parameters(factory).items() if name not in _RESERVED}
    for option in options:
        if option not in accepted:
            known = f": {unknown_name(option, accepted)}" if accepted else ": this backbone has no options"
            raise ConfigError(f"model.options.{option}{known}")
    return {
        option: like_default(f"model.options.{option}", value, accepted[option].default)
        for option, value in options.items()
    }


def _parameters(factory: Callable[..., nn.Module]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters
