"""Backbones from outside this package: any importable callable, and timm's models."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError, MissingDependency
from partialfc.models.eval_mode import eval_mode
from partialfc.options import describe_unknown


def build_by_path(
    path: str, sizes: dict[str, int], options: dict[str, Any], activation_checkpointing: bool
) -> nn.Module:
    """Call ``my.module:factory`` with all ``options``, and with those ``sizes`` that it takes.

    ``activation_checkpointing`` is passed as a keyword if it is a parameter, else by calling the module's
    ``set_grad_checkpointing(True)``.

    Raises:
        ConfigError: there is no such factory, it does not take an option, or it returns no module.
    """
    factory = _find(path)
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except ValueError:  # callables written in C have no signature
        parameters = {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in (*sizes, *options)}
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    by_keyword = {
        name
        for name, parameter in parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    for option in options:
        if not takes_all and option not in by_keyword:
            known = sorted(by_keyword - set(sizes))
            problem = describe_unknown(option, known) if known else "it takes no options"
            raise ConfigError(f"model.options.{option}: {problem} (of {path})")
    arguments = {**{name: size for name, size in sizes.items() if takes_all or name in by_keyword}, **options}
    by_argument = activation_checkpointing and "activation_checkpointing" in by_keyword
    if by_argument:
        arguments["activation_checkpointing"] = True
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name in by_keyword and name not in arguments
    ]
    if missing:
        raise ConfigError(f"model.options: {path} needs {', '.join(missing)} too")
    module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.name: expected {path} to return a torch.nn.Module, got {type(module).__name__}")
    if activation_checkpointing and not by_argument:
        _checkpoint_activations(module, path)
    return module


def build_timm(name: str, sizes: dict[str, int], options: dict[str, Any], activation_checkpointing: bool) -> nn.Module:
    """Build a timm model with ``num_classes=embedding_dim``, and with ``img_size`` if its architecture takes one.

    Raises:
        ConfigError: timm has no such model, or it does not take an option.
        MissingDependency: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependency(f"model.name=timm:{name} needs timm: pip install 'partialfc[timm]'") from error
    if ":" not in name and not timm.is_model(name):  # a name with a colon refers to a hub
        raise ConfigError(f"model.name: timm: {_nearest(name, timm.list_models())}")
    arguments = {"num_classes": sizes["embedding_dim"], "in_chans": sizes["channels"], **options}
    try:
        try:
            module = timm.create_model(name, **{"img_size": sizes["image_size"], **arguments})
        except TypeError as error:  # convolutional networks have no parameter img_size
            if "img_size" not in str(error) or "img_size" in options:
                raise
            module = timm.create_model(name, **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"model.options: timm:{name}: {error}") from error
    if activation_checkpointing:
        _checkpoint_activations(module, f"timm:{name}")
    return module


@torch.no_grad()
def check_output(module: nn.Module, what: str, embedding_dim: int, channels: int, image_size: int) -> None:
    """Pass two black images through ``module``, in evaluation mode.

    Raises:
        ConfigError: it does not take them, or its output is not [2, embedding_dim] floating-point numbers.
    """
    shape = (2, channels, image_size, image_size)
    parameter = next(module.parameters(), torch.empty(0))
    try:
        with eval_mode(module):
            output = module(torch.zeros(shape, device=parameter.device))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{what} does not take images {list(shape)}: {type(error).__name__}: {error}") from error
    got = f"{list(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.shape != (2, embedding_dim) or not output.is_floating_point():
        raise ConfigError(
            f"{what}: expected embeddings [2, {embedding_dim}] (model.embedding_dim) of images {list(shape)}, got {got}"
        )


def _find(path: str) -> Callable[..., Any]:
    """Import ``my.module:factory``; the current directory comes first, as with ``python -m``."""
    module_name, _, attribute = path.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"model.name: {module_name} cannot be imported from {here}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"model.name: in {module_name}: {_nearest(name, dir(found))}")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"model.name: {path} is a {type(found).__name__}; expected something to call")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the message of :func:`describe_unknown` without its list of all names, here hundreds."""
    return describe_unknown(name, known).partition("; known are ")[0]


def _checkpoint_activations(module: nn.Module, what: str) -> None:
    set_checkpointing = getattr(module, "set_grad_checkpointing", None)
    if set_checkpointing is None:
        raise ConfigError(
            f"model.activation_checkpointing: {what} has neither a parameter activation_checkpointing nor "
            "set_grad_checkpointing() on its module"
        )
    try:
        set_checkpointing(True)
    except (AssertionError, NotImplementedError) as error:  # raised by timm's models that cannot
        raise ConfigError(f"model.activation_checkpointing: {what} does not support it: {error}") from error
