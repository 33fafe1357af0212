"""What has changed in the config of a run that is to be continued, and whether it may."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from partialfc.models import BY_NAME

ChangeSeverity = Literal["harmless", "needs --force", "impossible"]

# The longest prefix decides. Harmless: no number of the run depends on it but where it looks and how much it takes.
_SEVERITY: dict[str, ChangeSeverity] = {
    "": "needs --force",
    "run": "harmless",
    "run.seed": "needs --force",
    "data.workers": "harmless",
    "data.train": "harmless",  # a data set may move; its digest is compared
    "data.channels": "impossible",
    "data.image_size": "needs --force",
    "model": "impossible",
    "model.options": "needs --force",  # where one changes a shape, the checkpoint does not load
    "model.activation_checkpointing": "harmless",
    "model.channels_last": "harmless",
    "model.pretrained": "harmless",  # what a run begins with
    # A checkpoint is the same whoever wrote it. engine.precision is not here: it changes what is computed.
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


@dataclass(frozen=True)
class Change:
    """One key of the config that differs."""

    key: str
    before: Any
    now: Any
    verdict: ChangeSeverity

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} before, {self.now!r} now ({self.verdict})"


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The keys whose values differ between two resolved configs."""
    old, new = _flat(before), _flat(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changes = [Change(key, old.get(key), new.get(key), _verdict(key)) for key in keys]
    changes = [replace(change, verdict="impossible") if _has_no_centers(change) else change for change in changes]
    return [replace(change, verdict="harmless") if _is_another_name(change) else change for change in changes]


def _has_no_centers(change: Change) -> bool:
    """Whether it is a center loss that is new, or gone: there are no centers to go on with, or nowhere to put them."""
    return change.key.startswith("head.center_loss.") and None in (change.before, change.now)


def _is_another_name(change: Change) -> bool:
    """Whether it is but another name of the same backbone: r50 and iresnet50."""
    names = (change.before, change.now)
    return change.key == "model.name" and len({id(BY_NAME.get(name, name)) for name in names}) == 1


def _verdict(key: str) -> ChangeSeverity:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in _SEVERITY:
            return _SEVERITY[prefix]
    return _SEVERITY[""]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
