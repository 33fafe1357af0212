"""Config loading: YAML, then overrides from the command line, then validation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from partialfc import models
from partialfc.config.objects import build_loss, build_sample_rate
from partialfc.config.schema import Config, EngineConfig
from partialfc.errors import ConfigError
from partialfc.options import describe_unknown


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ``optim.lr=0.2``.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, of the wrong type or out of range.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `data:`, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values.

    Raises:
        ConfigError: a key is unknown, of the wrong type or out of range, or two are incompatible.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None
    models.check(config.model.name, config.model.options, config.model.activation_checkpointing)
    build_loss(config.head.loss)
    build_sample_rate(config.head, steps_per_epoch=1000)
    if config.optim.unsampled_rows == "decayed" and config.optim.head_optimizer != "sgd":
        raise ConfigError("optim.unsampled_rows: decayed needs the head's optimizer to be sgd (optim.head)")
    _check_engine(config.engine)
    return config


def require_num_classes(config: Config, found: int) -> None:
    """Compare the data set's number of classes with ``data.num_classes``, if that is set.

    Raises:
        ConfigError: they differ.
    """
    expected = config.data.num_classes
    if expected not in (None, found):
        raise ConfigError(f"data.num_classes: {expected:,} expected, and {config.data.train} has {found:,}")


def _check_engine(engine: EngineConfig) -> None:
    on_deepspeed = engine.name == "deepspeed"
    if engine.deepspeed_config is not None and not on_deepspeed:
        raise ConfigError("engine.deepspeed_config needs engine.name=deepspeed")
    if engine.offload == "cpu" and not (on_deepspeed and engine.zero_stage):
        raise ConfigError("engine.offload: cpu needs engine.name=deepspeed and engine.zero_stage of 1 to 3")
    if engine.compile and on_deepspeed and engine.zero_stage == 3:
        raise ConfigError(
            "engine.compile is incompatible with engine.zero_stage=3, which gathers weights layer by layer in Python "
            "hooks; choose a lower stage, or engine.compile=false"
        )


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, with every key; :func:`load_config` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def value_of(config: Config, key: str) -> Any:
    """Return the value at a dotted key, as plain YAML types.

    Raises:
        ConfigError: the key is unknown.
    """
    value: Any = config.model_dump(mode="json")
    for depth, name in enumerate(key.split(".")):
        if not isinstance(value, dict) or name not in value:
            known = value if isinstance(value, dict) else []
            raise ConfigError(f"{'.'.join(key.split('.')[: depth + 1])}: {describe_unknown(name, known)}")
        value = value[name]
    return value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"expected section.key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[key] = value


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{where}: {describe_unknown(str(problem['loc'][-1]), _keys_at(problem['loc'][:-1]))}"
    given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for name in location:
        field = section.model_fields[name]
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(section.model_fields)
