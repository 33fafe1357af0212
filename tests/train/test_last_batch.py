"""The end of an epoch that fills no batch, and batches that ranks and micro-batches do not share evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from partialfc.config import build_sample_rate, load_config, parse_config
from partialfc.data.loader import LoaderSettings, StepDataset
from partialfc.data.order import BatchOrder
from partialfc.runtime.process import ProcessContext
from partialfc.runtime.stopping import StopRequest
from partialfc.train.schedule import Schedule
from partialfc.train.trainer import Trainer
from tests.harness.ranks import MOST_RANKS, Ranks
from tests.harness.running import lines, partialfc, run, state

SAMPLES, SCALE = 222, 8.0  # of the task; of the loss


def settings_of(batch: int, parts: int) -> list[str]:
    """A run of one short epoch whose gradient a line of torch computes."""
    return [
        f"data.global_batch_size={batch}",
        f"optim.accumulation={parts}",
        "optim.clip=null",
        f"head.loss={{name: normface, scale: {SCALE}}}",
        "head.center_loss=null",
        "head.sample_rate=1",
        "model.name=tests.harness.backbones:linear",
        "evaluation.sets=[]",
        "evaluation.every=0",
    ]


def _gradients(group: Any, config_file: Path, folder: Path, batch: int, parts: int, step: int) -> dict[str, Any]:
    """One training step of a rank: the gradients of backbone and shard, the loss, and the images that it saw."""
    process = ProcessContext(group.rank(), MOST_RANKS, torch.device("cpu"), StopRequest(None))
    config = load_config(config_file, [f"run.dir={folder}", *settings_of(batch, parts)])
    trainer = Trainer(config, process)
    found: dict[str, Any] = {"rows": []}
    trainer.backbone.register_forward_pre_hook(lambda _, inputs: found["rows"].append(len(inputs[0])))
    update = trainer.engine.step

    def look() -> bool:
        found["backbone"] = [parameter.grad.clone() for parameter in trainer.backbone.parameters()]
        found["head"] = trainer.head.weight.grad.to_dense()
        return update()

    found["weights"] = [parameter.detach().clone() for parameter in trainer.backbone.parameters()]
    found["rows of the head"] = trainer.head.weight.detach().clone()
    trainer.engine.step = look  # type: ignore[method-assign]
    settings = LoaderSettings.from_config(config, process.rank, process.world_size)
    result = trainer.train_step(StepDataset(trainer.dataset, settings, trainer.schedule.order, step, step + 1)[0])
    return found | {"loss": result.out.loss.item(), "samples": int(result.out.num_samples)}


# Batches and micro-batches; the step; the images of each micro-batch on each of four ranks.
UNEVEN = [
    (10, 1, 0, [[3], [3], [3], [1]]),
    (5, 1, 0, [[2], [2], [1], [0]]),
    (10, 1, 22, [[2], [0], [0], [0]]),
    (73, 4, 0, [[5, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 5], [4, 4, 4, 1]]),
    (73, 4, 3, [[3], [0], [0], [0]]),
]


@pytest.mark.parametrize(("batch", "parts", "step", "rows"), UNEVEN)
def test_uneven_parts_make_the_gradient_of_the_whole_batch(
    ranks: Ranks, task: Path, tmp_path: Path, batch: int, parts: int, step: int, rows: list[list[int]]
) -> None:
    found = ranks.run(MOST_RANKS, _gradients, task, tmp_path, batch, parts, step)
    assert [rank["rows"] for rank in found] == rows, "images of the data set, and no others"
    config = load_config(task, [f"run.dir={tmp_path}", *settings_of(batch, parts)])
    trainer = Trainer(config, ProcessContext(0, 1, torch.device("cpu"), StopRequest(None)))
    settings = LoaderSettings.from_config(config, 0, 1)
    whole = StepDataset(trainer.dataset, settings, trainer.schedule.order, step, step + 1)[0]
    backbone = trainer.backbone.double()
    for parameter, value in zip(backbone.parameters(), found[0]["weights"], strict=True):
        parameter.data = value.double()
    weight = torch.cat([rank["rows of the head"] for rank in found]).double().requires_grad_()
    cosine = F.normalize(backbone(whole.images.double())) @ F.normalize(weight).T
    loss = F.cross_entropy(SCALE * cosine, whole.labels)
    loss.backward()
    for rank in found:
        assert rank["samples"] == len(whole.labels)
        assert rank["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for gradient, parameter in zip(rank["backbone"], backbone.parameters(), strict=True):
            assert parameter.grad is not None
            assert (gradient - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max()
    gradient = torch.cat([rank["head"] for rank in found])
    assert weight.grad is not None
    assert (gradient - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max()


# --- the rules --------------------------------------------------------------------------------------------------------

QUICK = ["evaluation.every=0", "optim.epochs=2", "model.name=tests.harness.backbones:linear"]


@pytest.mark.parametrize(("rule", "steps", "samples"), [("drop", 11, 220), ("keep", 12, 222), ("wrap", 12, 240)])
def test_all_that_counts_follows_the_rule(task: Path, rule: str, steps: int, samples: int) -> None:
    folder = task.parent / rule
    done = run(task, 0, f"run.dir={folder}", *QUICK, f"data.last_batch={rule}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(folder, "train")
    assert f"{2 * steps} steps of 20 images" in done.stdout
    assert f"training  {2 * steps}/{2 * steps} (100%)" in done.stdout
    assert (state(folder)["step"], state(folder)["total_steps"]) == (2 * steps, 2 * steps)
    assert [line["samples"] for line in found][steps - 1 :: steps] == [samples, 2 * samples]
    assert [line["epoch"] for line in found][steps - 1 :: steps] == [1, 2]


BATCH_OF_ONE = ["model.name=tests.harness.backbones:normalized", "data.global_batch_size=2"]
VIEWING = ["model.name=tests.harness.backbones:viewing", "data.last_batch=keep"]


@pytest.mark.parametrize(
    ("ranks", "settings", "words"),
    [
        (0, ["data.global_batch_size=223", "data.last_batch=drop"], "223 samples, and the data set has 222"),
        (2, BATCH_OF_ONE, "batch normalisation needs at least 2 images, but a rank has 1 at a time"),
        (2, VIEWING, "fails for a batch without images (cannot reshape tensor of 0 elements"),
    ],
)
def test_what_no_batch_can_train_is_refused_at_the_start(
    task: Path, tmp_path: Path, ranks: int, settings: list[str], words: str
) -> None:
    done = run(task, ranks, f"run.dir={tmp_path}/run", "evaluation.every=0", *settings)
    assert done.returncode == (1 if ranks else 2), "ranks end with 1 under a launcher"
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_that_no_batch_is_full(task: Path) -> None:
    done = partialfc("train", task, "--dry-run", "data.global_batch_size=223", "data.last_batch=drop")
    assert done.returncode == 2
    assert "223 samples, and the data set has 222" in done.stderr
    assert partialfc("train", task, "--dry-run", "data.global_batch_size=222").returncode == 0


# --- other batches in mid-run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "steps_per_epoch", "done_batches"), [(10, 22, 26), (40, 5, 6), (30, 7, 8)])
def test_a_run_goes_on_with_other_batches_where_it_stands(
    task: Path, batch: int, steps_per_epoch: int, done_batches: int
) -> None:
    folder = task.parent / f"goes-on-{batch}"
    words = [f"run.dir={folder}", *QUICK, "data.last_batch=drop", "optim.warmup=0.5"]
    assert run(task, 0, *words, "optim.epochs=1.2").returncode == 0, "13 steps of 20: an epoch of 11, and 40 samples"
    words += [f"data.global_batch_size={batch}", "checkpoint.every=2"]
    refused = run(task, 0, *words)
    assert refused.returncode == 2
    done = run(task, 0, *words, "--force", "optim.epochs=1.8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(task, 0, *words, "--force").returncode == 0, "once more, with these batches: an order like any other"
    found = lines(folder, "train")
    last = 13 + 2 * steps_per_epoch - done_batches
    assert [line["step"] for line in found] == list(range(1, last + 1)), "updates, counted on"
    assert [line["samples"] for line in found[12:]] == [260 + batch * i for i in range(last - 12)]
    epochs = [(done_batches + i + 1) / steps_per_epoch for i in range(last - 13)]
    assert [line["epoch"] for line in found[13:]] == pytest.approx(epochs, abs=1e-4)
    assert (found[-1]["epoch"], state(folder)["state"], state(folder)["total_steps"]) == (2, "finished", last)
    # The learning rate of the place in the data: that of a run that has had these batches from the beginning.
    longer = {"epochs": 2, "lr": 0.05, "warmup": 0.5}
    schedule = Schedule(
        parse_config({"data": {"train": "x"}, "optim": longer}), BatchOrder(num_samples=SAMPLES, batch_size=batch)
    )
    assert found[-1]["lr"] == pytest.approx(schedule.lr(2 * steps_per_epoch - 1))


def test_what_follows_the_epoch_follows_it_with_other_batches_too() -> None:
    config = parse_config(
        {
            "data": {"train": "x"},
            "head": {"sample_rate_schedule": {"schedule": "steps", "rates": [0.1, 1.0], "epochs": [0, 2]}},
            "optim": {"epochs": 4, "warmup": 1},
        }
    )
    before = BatchOrder(num_samples=100, batch_size=10)
    for size in (5, 20):
        after = BatchOrder(num_samples=100, batch_size=size).continued(12, 1, 20)
        assert after.place(12) == (1, 20 // size)
        now, then = Schedule(config, after), Schedule(config, before)
        assert now.epoch(12) == then.epoch(12) == 1.2
        assert now.total_steps - 12 == 280 // size
        rates = [build_sample_rate(config.head, order.steps_per_epoch, order.first_step) for order in (before, after)]
        for epoch in (1.4, 1.8, 2.0, 3.6):
            steps = [round(order.first_step + epoch * order.steps_per_epoch) for order in (before, after)]
            assert now.lr(steps[1]) == pytest.approx(then.lr(steps[0]))
            assert [rate(step) for rate, step in zip(rates, steps, strict=True)] == [0.1 if epoch < 2 else 1.0] * 2  # type: ignore[operator]
