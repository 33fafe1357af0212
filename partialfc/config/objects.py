"""Objects that a config names; building them checks their parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from partialfc import losses
from partialfc.config.keys import KeyRow, written
from partialfc.config.schema import HeadConfig, LossConfig, SampleRateConfig
from partialfc.errors import ConfigError
from partialfc.head import LinearRate, StepRate
from partialfc.head.sample_rate import DelayedRate, SampleRate
from partialfc.options import convert_like, describe_unknown, with_defaults


def build_loss(config: LossConfig) -> losses.Loss:
    """Build the loss that a config names. A wrapping loss takes the other as ``loss``, with a name and parameters.

    Raises:
        ConfigError: the loss or a parameter is unknown, or a value is out of range.
    """
    return _build_loss("head.loss", {"name": config.name, **(config.model_extra or {})})


def _build_loss(where: str, tree: Any) -> losses.Loss:
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise ConfigError(f"{where}: expected a loss such as {{name: arcface, margin: 0.5}}, got {tree!r}")
    options = dict(tree)
    name = options.pop("name")
    if name not in losses.BY_NAME:
        raise ConfigError(f"{where}.name: {describe_unknown(name, losses.BY_NAME)}")
    kind = losses.BY_NAME[name]
    accepted = {name: parameter for name, parameter in inspect.signature(kind).parameters.items() if name != "self"}
    for option, value in options.items():
        if option not in accepted:
            raise ConfigError(f"{where}.{option}: {describe_unknown(option, accepted)}")
        if option == "loss":
            options[option] = _build_loss(f"{where}.loss", value)
        else:
            options[option] = convert_like(f"{where}.{option}", value, accepted[option].default)
    if "loss" in accepted and "loss" not in options:
        raise ConfigError(f"{where}.loss: {name} wraps another loss: give one, such as {{name: arcface}}")
    try:
        return kind(**options)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where} ({name}): {error}") from error


def spelled_out(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a loss of a config with all its parameters, defaults included; one that is unknown as it is."""
    kind = losses.BY_NAME.get(str(tree.get("name")))
    if kind is None:
        return tree
    given = {option: value for option, value in tree.items() if option != "name"}
    if isinstance(given.get("loss"), dict):
        given["loss"] = spelled_out(given["loss"])
    return {"name": tree["name"]} | with_defaults(kind, given)


def loss_keys() -> Iterator[KeyRow]:
    """Yield a row for each parameter of each loss, documented by the ``Args`` of its class or of a base."""
    for name, kind in losses.BY_NAME.items():
        about = {option: text for base in reversed(kind.__mro__) for option, text in _documented_args(base)}
        for option, parameter in inspect.signature(kind).parameters.items():
            default = "" if parameter.default is parameter.empty else written(parameter.default)
            yield f"head.loss.{option}", default, f"{name}: {about[option]}"


def _documented_args(kind: type) -> Iterator[tuple[str, str]]:
    _, _, args = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")
    for options, text in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", args, re.MULTILINE):
        if not text.startswith("see "):  # documented by a base
            line = " ".join(text.replace("``", "").split()).rstrip(".")
            yield from ((option, line) for option in options.split(", "))


def build_sample_rate(head: HeadConfig, steps_per_epoch: int, first_step: int = 0) -> SampleRate:
    """Build the sample rate that a config describes.

    Args:
        first_step: the step that begins its first epoch; may be negative.

    Raises:
        ConfigError: rates or epochs are out of range, or do not match each other.
    """
    rate = head.sample_rate_schedule
    if rate is None:
        return head.sample_rate
    try:
        schedule = _rate_schedule(rate, steps_per_epoch)
    except ConfigError as error:
        raise ConfigError(f"head.sample_rate_schedule: {error}") from error
    return DelayedRate(schedule, first_step) if first_step else schedule


def _rate_schedule(rate: SampleRateConfig, steps_per_epoch: int) -> StepRate | LinearRate:
    starts = [round(epoch * steps_per_epoch) for epoch in rate.epochs]
    if rate.schedule == "steps":
        return StepRate(rate.rates, starts)
    if len(rate.rates) != 2 or len(starts) != 2 or starts[0] != 0:
        raise ConfigError(f"linear takes two rates and two epochs, the first 0, got {rate.rates} and {rate.epochs}")
    return LinearRate(rate.rates[0], rate.rates[1], starts[1])
