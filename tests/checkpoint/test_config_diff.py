"""Changes between a checkpoint's config and the resuming run's, and keys that one of them lacks."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from partialfc.checkpoint.config_diff import BEFORE_KEY, as_begun, config_changes
from partialfc.config import parse_config

VERSIONS = sorted((Path(__file__).parents[1] / "fixtures" / "checkpoints").glob("*/*/checkpoints/*/manifest.json"))


def resolved(**sections: Any) -> dict[str, Any]:
    return parse_config({"data": {"train": "x"}, **sections}).model_dump(mode="json")


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of ``tree`` as written by a version without ``key``."""
    copy = deepcopy(tree)
    *sections, name = key.split(".")
    inner = copy
    for section in sections:
        inner = inner[section]
    del inner[name]
    return copy


@pytest.mark.parametrize(
    "key",
    ["optim.spike", "head.filter_threshold", "checkpoint.grow", "tracking.wandb.tags", "tracking.wandb", "engine"],
)
def test_a_key_or_section_that_the_checkpoint_lacks_is_no_change(key: str) -> None:
    now = resolved()
    assert config_changes(without(now, key), now) == []


def test_a_lacking_key_counts_as_what_its_version_did() -> None:
    vit = {"name": "vit_t", "embedding_dim": 64}
    now = resolved(
        engine={"precision": "bf16"}, optim={"spike": {"factor": 2.0}}, model=vit | {"options": {"depth": 3}}
    )
    before = now
    for key in BEFORE_KEY:
        before = without(before, key)
    severities = {change.key: (change.before, change.severity) for change in config_changes(before, now)}
    assert severities == {
        "data.last_batch": ("keep", "needs --force"),
        "engine.precision": ("fp32", "needs --force"),
        "model.options.depth": (12, "needs --force"),
        "optim.spike.factor": (None, "needs --force"),
        "optim.spike.window": (None, "needs --force"),
    }
    assert config_changes(before, kept(before, model=vit)) == []


def kept(before: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """The resolved config of a run that was begun with ``before``."""
    return as_begun(parse_config({"data": {"train": "x"}, **sections}), before).model_dump(mode="json")


@pytest.mark.parametrize("rule", ["drop", "keep", "wrap"])
def test_a_run_keeps_what_its_version_did_unless_the_key_is_set(rule: str) -> None:
    old, new = without(resolved(), "data.last_batch"), resolved(data={"train": "x", "last_batch": rule})
    assert kept(old)["data"] == resolved()["data"] | {"last_batch": "keep"}
    assert kept(old, data={"train": "x", "last_batch": rule})["data"]["last_batch"] == rule
    assert kept(new)["data"]["last_batch"] == "drop", "a key that the run was begun with"
    assert kept({})["data"]["last_batch"] == "keep"


def test_a_run_keeps_a_default_that_has_changed_since() -> None:
    old = resolved(engine={"sync_batchnorm": "auto"})
    assert resolved()["engine"]["sync_batchnorm"] is False
    assert kept(old)["engine"]["sync_batchnorm"] == "auto"
    assert kept(old, engine={"sync_batchnorm": False})["engine"]["sync_batchnorm"] is False
    assert kept({})["engine"]["sync_batchnorm"] is False


def test_a_key_of_an_optional_section_may_be_lacking() -> None:
    now = resolved(head={"center_loss": {"weight": 0.1}})
    assert config_changes(without(now, "head.center_loss.alpha"), now) == []
    (change, other) = config_changes(resolved(), now)
    assert {change.severity, other.severity} == {"impossible"}, "no centers: a section that is off is not a lacking key"


def test_a_key_that_this_version_does_not_know_is_judged_by_its_section() -> None:
    now, before = resolved(), resolved()
    before["head"]["temperature"] = 0.5
    before["tracking"]["elsewhere"] = True
    severities = {change.key: change.severity for change in config_changes(before, now)}
    assert severities == {"head.temperature": "needs --force", "tracking.elsewhere": "harmless"}


def test_parameters_of_a_loss_are_not_keys_of_a_version() -> None:
    before, now = (resolved(head={"loss": {"name": "arcface"} | more}) for more in ({}, {"margin": 0.3}))
    assert [str(change) for change in config_changes(before, now)] == [
        "head.loss.margin: 0.5 before, 0.3 now (needs --force)"
    ]


def _lacking(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys of ``now`` that ``before`` lacks, within sections that it has."""
    found = []
    for name, value in now.items():
        if name not in before:
            found.append(f"{prefix}{name}")
        elif isinstance(value, dict) and isinstance(before[name], dict):
            found += _lacking(before[name], value, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("manifest", VERSIONS, ids=lambda path: "-".join(path.parts[-5:-3]))
def test_each_key_newer_than_a_released_version_says_what_that_version_did(manifest: Path) -> None:
    before = json.loads(manifest.read_text())["config"]
    parsed = as_begun(parse_config(before), before).model_dump(mode="json")
    assert [key for key in _lacking(before, parsed) if key not in BEFORE_KEY] == []
    assert config_changes(before, parsed) == []


def test_another_engine_is_harmless_and_another_precision_is_not() -> None:
    before = {"engine": {"name": "ddp", "zero_stage": 1, "offload": "none", "precision": "fp32"}}
    now = {"engine": {"name": "deepspeed", "zero_stage": 3, "offload": "cpu", "precision": "bf16"}}
    severities = {change.key: change.severity for change in config_changes(before, now)}
    assert severities.pop("engine.precision") == "needs --force"
    assert set(severities.values()) == {"harmless"}


def test_changes_are_judged_by_the_longest_prefix() -> None:
    before = {"run": {"dir": "a", "seed": 1}, "head": {"loss": {"name": "arcface", "margin": 0.4}}, "optim": {"lr": 1}}
    now = {"run": {"dir": "b", "seed": 2}, "head": {"loss": {"name": "arcface"}}, "optim": {"lr": 1}}
    severities = {change.key: change.severity for change in config_changes(before, now)}
    assert severities == {"run.dir": "harmless", "run.seed": "needs --force", "head.loss.margin": "needs --force"}
    centers = {"head": {"center_loss": {"weight": 0.1}}}
    for before, now, severity in (
        (centers, {"head": {"center_loss": None}}, "impossible"),
        ({"head": {"center_loss": None}}, centers, "impossible"),
        (centers, {"head": {"center_loss": {"weight": 0.2}}}, "needs --force"),
    ):
        assert [change.severity for change in config_changes(before, now)] == [severity]


def test_a_precision_as_exact_is_harmless_and_fast_is_not() -> None:
    for before, now, verdict in (
        (None, "exact", "harmless"),
        ("exact", "highest", "harmless"),
        ("exact", "fast", "needs --force"),
        ("fast", None, "needs --force"),
    ):
        old, new = ({"head": {"matmul_precision": precision}} for precision in (before, now))
        assert [change.severity for change in config_changes(old, new)] == [verdict]
    assert not config_changes({"head": {}}, {"head": {"matmul_precision": None}}), "0.1 did not have the key"


def test_changes_allowed_in_a_resumed_run() -> None:
    before = resolved(model={"name": "vit_t", "options": {"drop_path": 0.1}})
    changed = {
        "name": "vit_s",
        "options": {"drop_path": 0.2},
        "pretrained": "w.pth",
        "activation_checkpointing": True,
        "channels_last": True,
    }
    now = resolved(model=changed, engine={"compile": True, "sync_batchnorm": "auto"})
    assert {change.key: change.severity for change in config_changes(before, now)} == {
        "model.name": "impossible",
        "model.options.drop_path": "needs --force",
        "model.pretrained": "harmless",
        "model.activation_checkpointing": "harmless",
        "model.channels_last": "harmless",
        "engine.compile": "harmless",
        "engine.sync_batchnorm": "needs --force",
    }
    names = {name: resolved(model={"name": name}) for name in ("r50", "iresnet50", "r100", "x.y:net")}
    for before_name, now_name, severity in (
        ("r50", "iresnet50", "harmless"),
        ("r50", "r100", "impossible"),
        ("r50", "x.y:net", "impossible"),
    ):
        (change,) = config_changes(names[before_name], names[now_name])
        assert change.severity == severity


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"head": {"loss": {"name": "arcface"}}}, {"head": {"loss": {"name": "arcface", "margin": 0.5, "scale": 64}}}),
        ({"head": {"loss": {"name": "arcface", "margin": "2e-1"}}}, {"head": {"loss": {"margin": 0.2}}}),
        (
            {"head": {"loss": {"name": "focal", "loss": {"name": "cosface"}}}},
            {"head": {"loss": {"name": "focal", "gamma": 2.0, "loss": {"name": "cosface", "margin": "4e-1"}}}},
        ),
        ({"model": {"name": "vit_t"}}, {"model": {"name": "vit_t", "options": {"depth": 12, "mlp_ratio": "4"}}}),
        ({"optim": {"lr": "2e-1"}}, {"optim": {"lr": 0.2}}),
        ({"optim": {"name": "adamw"}}, {"optim": {"name": "adamw", "head": "adamw"}}),
    ],
)
def test_another_notation_and_a_default_spelled_out_are_no_change(before: Any, now: Any) -> None:
    assert config_changes(resolved(**before), resolved(**now)) == []
    assert config_changes(resolved(**now), resolved(**before)) == []


def test_a_number_of_classes_that_is_only_said_needs_no_force() -> None:
    (change,) = config_changes(resolved(), resolved(data={"train": "x", "num_classes": 37}))
    assert change.severity == "harmless"
