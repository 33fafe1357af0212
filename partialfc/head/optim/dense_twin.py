"""State of torch's own optimizers, taken over by the row optimizers that take the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partialfc.errors import ConfigError

_OF_OTHERS = frozenset({"maximize", "betas", "momentum"})  # every other optimizer has one of these settings
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})  # how torch computes, not what


@dataclass(frozen=True)
class DenseTwin:
    """The optimizer of torch that takes the same steps where every row has a gradient."""

    name: str
    settings: frozenset[str]  # of its parameter groups, by which they are known
    neutral: dict[str, Any]  # settings that have no equal on rows, and the values at which they do nothing


def own_group(
    optimizer: str, twin: DenseTwin | None, saved: dict[str, Any], current: dict[str, Any], defaults: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return the ``saved`` parameter group as one of ``optimizer``, and true if it was its twin's.

    Args:
        optimizer: the name of the row optimizer.
        twin: its twin, if it has one.
        current: its group in the place of the saved one, which has the settings that the twin lacks.
        defaults: its settings.

    Raises:
        ConfigError: the group is of another optimizer, or has settings without an equal.
    """
    if defaults.keys() <= saved.keys() and not _OF_OTHERS & (saved.keys() - defaults.keys()):
        return saved, False
    if twin is None or not twin.settings <= saved.keys():
        kinds = f"its own state and that of {twin.name}" if twin else "its own state"
        found = ", ".join(sorted(saved.keys() - {"params"}))
        raise ConfigError(f"{optimizer} loads {kinds}; this one is of an optimizer with the settings {found}")
    for name, neutral in twin.neutral.items():
        if saved.get(name, neutral) != neutral:
            raise ConfigError(
                f"{optimizer} cannot load {twin.name} with {name}={saved[name]}: it has {name}={neutral} only"
            )
    kept = {name: saved[name] for name in saved.keys() - twin.neutral.keys() - _IMPLEMENTATION}
    return kept | {name: current[name] for name in defaults.keys() - saved.keys()}, True


def check_state(optimizer: str, saved: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Raise ConfigError if a tensor of a parameter's ``saved`` state differs in shape from the ``expected`` one."""
    for name, like in expected.items():
        shape = list(saved[name].shape) if name in saved else None
        if shape is not None and shape != list(like.shape):
            raise ConfigError(
                f"this state of {optimizer} is of other parameters: {name} has shape {shape}, "
                f"expected {list(like.shape)}"
            )
