"""Changes of the config between the run that wrote a checkpoint and the run that resumes from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from partialfc import config as configs
from partialfc import models
from partialfc.config import Config

SectionT = TypeVar("SectionT", bound=BaseModel)

ChangeSeverity = Literal["harmless", "needs --force", "impossible"]

# The longest matching prefix decides. A harmless key changes no trained number.
_SEVERITY: dict[str, ChangeSeverity] = {
    "": "needs --force",
    "run": "harmless",  # with run.deterministic the last bits may differ, as between machines
    "run.seed": "needs --force",
    "data.workers": "harmless",
    "data.max_pixels": "harmless",  # an image is decoded as ever, or not at all
    "data.train": "harmless",  # a data set may move; its digest is compared
    "data.num_classes": "harmless",  # compared with the data set, whose class table is compared
    "data.channels": "impossible",
    "data.image_size": "needs --force",
    "model": "impossible",
    "model.options": "needs --force",  # one that changes a shape makes loading fail
    "model.activation_checkpointing": "harmless",
    "model.channels_last": "harmless",
    "model.pretrained": "harmless",  # read at step 0 only
    # Checkpoints do not depend on the engine. engine.precision is absent: it changes results.
    "engine.name": "harmless",
    "engine.zero_stage": "harmless",
    "engine.offload": "harmless",
    "engine.deepspeed_config": "harmless",
    "engine.compile": "harmless",
    "head.memory_budget_mb": "harmless",
    "head.weight_dtype": "impossible",
    "head.loss.sub_centers": "impossible",
    "optim.name": "impossible",
    "optim.head": "impossible",
    "optim.head_state_dtype": "impossible",
    "optim.head_lr_factor": "needs --force",
    "optim.accumulation": "harmless",
    "evaluation": "harmless",
    "tracking": "harmless",
    "checkpoint": "harmless",
}

# The behaviour of versions that lack a key. Every key added since 0.1 has a line here, whatever its default today; a
# key absent from both the checkpoint and this table counts as unchanged.
BEFORE_KEY: dict[str, Any] = {
    "data.max_pixels": 40_000_000,  # without a limit of their own; no number of a smaller image depends on it
    "data.last_batch": "keep",
    "model.options": {},
    "optim.spike": None,
    "run.deterministic": False,
    "engine.precision": "fp32",
    "head.matmul_precision": None,  # float32 products; null chooses products as exact
}

# Keys whose default has changed: a run that was begun with another one keeps it.
_CHANGED_DEFAULTS = ("engine.sync_batchnorm",)

_OPEN_SECTIONS = ("head.loss", "model.options")  # their keys belong to a loss or a backbone, not to the schema


@dataclass(frozen=True)
class Change:
    """One key of the config that differs."""

    key: str
    before: Any
    now: Any
    severity: ChangeSeverity

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} before, {self.now!r} now ({self.severity})"


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Return the keys whose values differ between two resolved configs, by name.

    A key unknown to the version that wrote ``before`` counts as that version's behaviour, and a parameter that is not
    given to a loss or a backbone as its default.
    """
    before = _with_lacking_keys(before, now)
    old, new = _flatten(_spelled_out(before)), _flatten(_spelled_out(now))
    given = _flatten(before).keys() | _flatten(now).keys()
    keys = sorted(key for key in given if old.get(key) != new.get(key))
    changes = [Change(key, old.get(key), new.get(key), _severity(key)) for key in keys]
    changes = [replace(change, severity="impossible") if _has_no_centers(change) else change for change in changes]
    harmless = [_is_alias(change) or _is_as_precise(change) for change in changes]
    return [
        replace(change, severity="harmless") if so else change for change, so in zip(changes, harmless, strict=True)
    ]


def as_begun(config: Config, before: dict[str, Any]) -> Config:
    """Return the config of a run that was begun with the resolved config ``before``: what its version did where it had
    no key, or another default, is kept, unless the key is set now.
    """
    flat = _flatten(before)
    kept = {key: value for key, value in BEFORE_KEY.items() if _lacks(before, key.split("."))}
    kept |= {key: flat[key] for key in _CHANGED_DEFAULTS if key in flat}
    for key, value in kept.items():
        *sections, name = key.split(".")
        config = _with_unless_set(config, sections, name, value)
    return config


def _lacks(tree: Any, path: list[str]) -> bool:
    """Return True if a config has no key at ``path``; a section that is off has all of its keys."""
    for name in path:
        if not isinstance(tree, dict):
            return False
        if name not in tree:
            return True
        tree = tree[name]
    return False


def _with_unless_set(section: SectionT, path: list[str], name: str, value: Any) -> SectionT:
    """Return ``section`` with ``value`` at ``path`` and ``name``, unless that is set."""
    if path:
        inner, *rest = path
        changed = _with_unless_set(getattr(section, inner), rest, name, value)
        return section if changed is getattr(section, inner) else section.model_copy(update={inner: changed})
    return section if name in section.model_fields_set else section.model_copy(update={name: value})


def _with_lacking_keys(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    complete = dict(before)
    for name, value in now.items():
        key = f"{prefix}{name}"
        if name not in before and key in BEFORE_KEY:
            complete[name] = BEFORE_KEY[key]
        elif isinstance(value, dict) and key not in _OPEN_SECTIONS and isinstance(before.get(name, {}), dict):
            complete[name] = _with_lacking_keys(before.get(name, {}), value, f"{key}.")
        elif name not in before:
            complete[name] = value
    return complete


def _spelled_out(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which equal runs are equal: parameters have their types, and no default is left out."""
    head, model, optim = ({**config.get(section, {})} for section in ("head", "model", "optim"))
    if isinstance(head.get("loss"), dict):
        head["loss"] = configs.spelled_out(head["loss"])
    if isinstance(model.get("options"), dict):
        model["options"] = models.spelled_out(str(model.get("name")), model["options"])
    if optim.get("head") == "same":
        optim["head"] = optim.get("name")
    return config | {"head": head, "model": model, "optim": optim}


def _has_no_centers(change: Change) -> bool:
    """Return True for a center loss added or removed: its centers cannot be loaded, or would be lost."""
    return change.key.startswith("head.center_loss.") and None in (change.before, change.now)


def _is_alias(change: Change) -> bool:
    """Return True for another name of the same backbone: r50 and iresnet50."""
    names = (change.before, change.now)
    return change.key == "model.name" and len({id(models.BY_NAME.get(name, name)) for name in names}) == 1


def _is_as_precise(change: Change) -> bool:
    """Return True for a change between equally exact precisions: all but ``fast``."""
    return change.key == "head.matmul_precision" and "fast" not in (change.before, change.now)


def _severity(key: str) -> ChangeSeverity:
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((_SEVERITY[prefix] for prefix in prefixes if prefix in _SEVERITY), _SEVERITY[""])


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
