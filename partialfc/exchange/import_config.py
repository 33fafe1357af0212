"""Import of arcface_torch's config files as configs of this package."""

from __future__ import annotations

import re
from pathlib import Path
from reprlib import repr as shortened
from shlex import quote
from typing import Any

from partialfc import models
from partialfc.config import parse_config
from partialfc.config.reading import dump_yaml
from partialfc.errors import ConfigError
from partialfc.exchange.insightface_config import read_insightface_config

_SCALE = 64  # in arcface_torch's code, not in its configs

# What base.py of arcface_torch sets, as far as it matters here; a file beside the config replaces it.
_BASE: dict[str, Any] = {
    "margin_list": [1.0, 0.5, 0.0],
    "network": "r50",
    "output": None,
    "embedding_size": 512,
    "sample_rate": 1.0,
    "interclass_filtering_threshold": 0,
    "fp16": False,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "verbose": 2000,
    "frequent": 10,
    "gradient_acc": 1,
    "seed": 2048,
    "num_workers": 2,
    "warmup_epoch": 0,
    "val_targets": [],
}

# Keys without a counterpart, and what stands for them; the others are read below.
_WITHOUT: dict[str, str] = {
    "resume": "a run resumes from its folder's newest checkpoint by itself",
    "save_all_states": "every checkpoint holds all states; checkpoint.every sets how often",
    "dali": "images are decoded by data.workers processes",
    "dali_aug": "data.augment offers flip and light",
    "num_image": "an epoch has the images that there are; `data convert` prints how many it found",
    "lr_func": "learning rates fall by optim.schedule, not by a function",
    "decay_epoch": "learning rates fall by optim.schedule, not in steps",
    "step": "learning rates fall by optim.schedule, not in steps",
    "max_warmup_step": "optim.warmup counts epochs",
    "wandb_key": "keys do not belong into configs: `wandb login`, or WANDB_API_KEY",
    "wandb_log_all": "rank 0 logs",
    "wandb_resume": "a run folder is one run of W&B, resumed by itself",
    "save_artifacts": "checkpoints are logged as references",
    "suffix_run_name": "give tracking.wandb.name",
    "notes": "give tracking.wandb.tags",
}


def import_config(path: Path, gpus: int = 8) -> tuple[str, list[str]]:
    """Return a config of arcface_torch as YAML of this package, and what to know about it, a sentence each.

    The file is read without executing it, and so is ``base.py`` beside it, whose keys it replaces.

    Args:
        gpus: number of GPUs of that run: its batch size is one GPU's.

    Raises:
        ConfigError: a file cannot be read, or a key has a value that makes no config.
    """
    base = path.with_name("base.py")
    below, unread = read_insightface_config(base) if base.is_file() and base.name != path.name else ({}, [])
    own, more = read_insightface_config(path)
    importer = _Importer(_BASE | below | own, path, gpus)
    tree = importer.tree(old="loss" in own and "margin_list" not in own)
    importer.say(*(f"not read: {each}" for each in [*(f"base.py, {line}" for line in unread), *more]))
    known = tree
    if tree["model"]["name"] not in models.BY_NAME:  # the rest is checked all the same
        known = {**tree, "model": {**tree["model"], "name": "iresnet50"}}
    try:
        parse_config(known)
    except ConfigError as error:
        raise ConfigError(f"{path} makes no valid config: {error}") from error
    head = [f"Imported from arcface_torch's {path.name}.", *importer.notes]
    return "".join(f"# {line}\n" for line in head) + dump_yaml(tree), importer.notes


class _Importer:
    """The conversion of one config.

    Attributes:
        notes: what has no counterpart, differs, or is left to do.
    """

    def __init__(self, values: dict[str, Any], path: Path, gpus: int) -> None:
        self.notes: list[str] = []
        self._values, self._path, self._gpus = values, path, gpus
        self._used: set[str] = set()

    def say(self, *notes: str) -> None:
        """Add notes, each on one line."""
        self.notes += [" ".join(note.split()) for note in notes]

    def tree(self, old: bool) -> dict[str, Any]:
        """Return the sections of the config.

        Args:
            old: it is of the time when a config named a loss instead of margins.
        """
        name = self._path.stem
        accumulation = int(self._number("gradient_acc", least=1))
        batch = int(self._number("batch_size", least=1)) * self._gpus * accumulation
        self.say(f"batch_size is one GPU's: global_batch_size is that of {self._gpus} GPUs (--gpus)")
        rec = self._text("rec") or "train"
        data = f"data/{Path(rec).name or 'train'}"
        if rec == "synthetic":
            self.say("rec='synthetic' has no counterpart: `partialfc data glyphs` draws a data set to try things with")
        else:
            self.say(f"the data is converted once: partialfc data convert {quote(rec)} --out {quote(data)}")
        tree: dict[str, Any] = {
            "run": {"dir": self._text("output") or f"runs/{name}", "seed": int(self._number("seed"))},
            "data": {"train": data, "num_classes": int(self._number("num_classes")), "global_batch_size": batch}
            | {"image_size": 112, "channels": 3, "augment": "flip", "workers": int(self._number("num_workers"))},
            "model": self._model(),
            "head": self._head(old),
            "optim": self._optim(old) | {"accumulation": accumulation},
            "engine": self._engine(),
            # Every micro-batch is a step of arcface_torch's.
            "evaluation": {"sets": self._sets(rec), "every": round(self._number("verbose") / accumulation)},
            "tracking": {"log_every": max(1, round(self._number("frequent") / accumulation))} | self._wandb(),
        }
        for key in self._values:
            if key in self._used:
                continue
            reason = _WITHOUT.get(key)
            if reason is None or self._values[key] not in (False, None):
                self.say(
                    f"{key} has no counterpart" + (f": {reason}" if reason else f" ({shortened(self._values[key])})")
                )
        self.notes.sort(key=lambda note: "no counterpart" in note)
        return tree

    def _get(self, key: str) -> Any:
        self._used.add(key)
        return self._values.get(key)

    def _text(self, key: str) -> str:
        """Return a text, ``""`` for None."""
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self._path}: config.{key} must be a text, got {shortened(value)}")
        return value or ""

    def _number(self, key: str, least: float = 0) -> float:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1e12:
            raise ConfigError(
                f"{self._path}: config.{key} must be a number of at least {least:g}, got {shortened(value)}"
            )
        return value

    def _model(self) -> dict[str, Any]:
        network = self._text("network")
        if depth := re.fullmatch(r"r(\d+)", network):
            name = f"iresnet{depth[1]}"
        else:
            name = {"mbf": "mobilefacenet", "mbf_large": "mobilefacenet_large"}.get(network, network)
        if name not in models.BY_NAME:
            self.say(f"network {network!r} is not built in: set model.name to my.module:factory or timm:NAME")
        return {"name": name, "embedding_dim": int(self._number("embedding_size", least=2))}

    def _head(self, old: bool) -> dict[str, Any]:
        head: dict[str, Any] = {"loss": self._old_loss() if old else self._loss()}
        self._used |= {"loss", "margin_list"}
        head["sample_rate"] = self._number("sample_rate")
        threshold = self._number("interclass_filtering_threshold", least=-1)
        if threshold > 0:
            head["filter_threshold"] = threshold
            self.say("filtered negatives are left out of the sum; arcface_torch keeps them, with a logit of 0")
        return head

    def _loss(self) -> dict[str, Any]:
        margins = self._get("margin_list")
        if not isinstance(margins, list) or len(margins) != 3 or not all(isinstance(m, int | float) for m in margins):
            raise ConfigError(f"{self._path}: config.margin_list must be three numbers, got {shortened(margins)}")
        m1, m2, m3 = margins
        if m3 > 0:
            if (m1, m2) != (1, 0):
                self.say(f"of margin_list, arcface_torch uses the last only if it is above 0: it is CosFace {m3:g}")
            return {"name": "cosface", "scale": _SCALE, "margin": m3}
        if m1 == 1 and m3 == 0:
            self.say("margin_gradient=straight_through is arcface_torch's derivative; exact, the default, is ArcFace's")
            return {"name": "arcface", "scale": _SCALE, "margin": m2, "margin_gradient": "straight_through"}
        self.say("arcface_torch refuses this margin_list; it is taken for the combined margin of ArcFace's paper")
        return {"name": "combined", "scale": _SCALE, "m1": m1, "m2": m2, "m3": m3}

    def _old_loss(self) -> dict[str, Any]:
        name, margins = self._text("loss"), {"arcface": 0.5, "cosface": 0.4}
        if name not in margins:
            raise ConfigError(f"{self._path}: config.loss must be arcface or cosface, got {shortened(name)}")
        self.say(
            f"loss {name!r} is taken with the scale {_SCALE} and margin {margins[name]} of arcface_torch's losses.py"
        )
        return {"name": name, "scale": _SCALE, "margin": margins[name]}

    def _optim(self, old: bool) -> dict[str, Any]:
        name = self._text("optimizer").lower()
        optim: dict[str, Any] = {"name": name, "lr": self._number("lr")}
        momentum = self._number("momentum")
        if name == "sgd":
            optim["momentum"] = momentum
            if momentum != 0.9:
                self.say(f"momentum {momentum:g} is kept; train_v2.py of arcface_torch always takes 0.9")
        optim |= {"weight_decay": self._number("weight_decay"), "epochs": self._number("num_epoch", least=1e-9)}
        optim |= {
            "warmup": max(0, self._number("warmup_epoch", least=-1)),
            "schedule": "polynomial",
            "power": 1,
            "clip": 5,
        }
        self.say("the learning rate falls linearly, as in train_v2.py since 2023; optim.power=2 is the earlier decay")
        if old:
            self.say("older versions of arcface_torch multiply lr by global_batch_size / 512: then set optim.lr")
        if self._number("sample_rate") < 1 and not old:
            if name == "sgd":
                optim["unsampled_rows"] = "decayed"
            else:
                self.say("classes that are not sampled stay as they are; arcface_torch decays them, and their moments")
        return optim

    def _engine(self) -> dict[str, Any]:
        half = bool(self._get("fp16"))
        if half:
            self.say("engine.precision=bf16 needs no loss scale, on GPUs that have it")
        return {"precision": "fp16" if half else "fp32", "sync_batchnorm": False}

    def _sets(self, rec: str) -> list[str]:
        names = self._get("val_targets") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{self._path}: config.val_targets must be a list of names, got {shortened(names)}")
        for name in names:
            command = f"partialfc data convert {quote(f'{rec}/{name}.bin')} --out {quote(f'data/{name}')}"
            self.say(f"the verification set is converted once: {command}")
        return [f"data/{name}" for name in names]

    def _wandb(self) -> dict[str, Any]:
        given = {key: self._text(f"wandb_{key}") for key in ("project", "entity")}
        if not self._get("using_wandb"):
            return {}
        return {"wandb": {"mode": "auto"} | {key: value for key, value in given.items() if value}}
