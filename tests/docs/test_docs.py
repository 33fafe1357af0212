"""Run the examples of the documentation."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.utils.flop_counter import FlopCounterMode

from partialfc import PartialFC, losses, models
from partialfc.config import WandbConfig, parse_config
from partialfc.data.dataset import TarDataset
from tests.harness.ranks import Ranks

ROOT = Path(__file__).parents[2]


def _python(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _examples(page: str) -> list[str]:
    return _python((ROOT / "docs" / page).read_text(encoding="utf-8"))


def _example() -> str:
    return _examples("use-the-head-in-your-trainer.md")[0]


def _run_example(group: dist.ProcessGroup) -> list[float]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    pictures = torch.randn(32, 12)

    def make_backbone() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))

    def batches() -> Any:
        for step in range(40):
            generator = torch.Generator().manual_seed(step)
            labels = torch.randint(0, 32, (16,), generator=generator)
            mine = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
            yield pictures[labels][mine], labels[mine]

    seen: list[float] = []

    class Recorded(list):
        def __iter__(self) -> Any:
            for batch in batches():
                yield batch
                seen.append(float(names["out"].loss))

    names: dict[str, Any] = {
        "make_backbone": make_backbone,
        "num_classes": 32,
        "embedding_dim": 16,
        "batches": Recorded(),
    }
    exec(_example(), names)
    return seen


def test_the_example_trains_in_a_foreign_loop(ranks: Ranks) -> None:
    results = ranks.run(4, _run_example)
    assert len(results[0]) == 40
    assert results[0] == results[3], "the loss is equal on all ranks"
    assert sum(results[0][-5:]) < 0.7 * sum(results[0][:5])


def _calls(code: str) -> set[str]:
    """Return the calls of an example, arguments included, whatever it calls its optimizers."""
    calls = {ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    return {re.sub(r"^opt(imizer)?\.", "optimizer.", call) for call in calls}


def test_the_example_is_ten_lines_and_the_readme_shows_the_same_calls() -> None:
    lines = [line for line in _example().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    (shown,) = [code for code in _python((ROOT / "README.md").read_text(encoding="utf-8")) if "PartialFC(" in code]
    assert "optimizer.step()" in _calls(shown)
    assert _calls(shown) <= _calls(_example())


def _own_loss(group: dist.ProcessGroup) -> tuple[float, torch.Tensor, torch.Tensor]:
    names: dict[str, Any] = {"num_classes": 50, "embedding_dim": 8}
    for example in _examples("write-your-own-loss.md"):
        exec(example, names)
    head = PartialFC(50, 8, names["LiArcFace"](scale=20.0), weight_dtype=torch.float64, process_group=group)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    x, y = _own_batch()
    mine = x.tensor_split(world_size)[rank].clone().requires_grad_()
    out = head(mine, y.tensor_split(world_size)[rank])
    out.loss.backward()
    return float(out.loss), mine.grad / world_size, head.weight.grad.to_dense()


def _own_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(12, 8, generator=generator, dtype=torch.float64), torch.randint(
        0, 50, (12,), generator=generator
    )


def test_a_loss_written_as_the_page_says_is_exact_on_any_number_of_ranks(ranks: Ranks) -> None:
    x, y = _own_batch()
    x.requires_grad_()
    weight = PartialFC(50, 8, losses.NormFace(), weight_dtype=torch.float64).weight.detach().clone().requires_grad_()
    theta = torch.acos(torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T)
    own = torch.nn.functional.one_hot(y, 50).double()
    expected = torch.nn.functional.cross_entropy(20 * (math.pi - 2 * (theta + 0.45 * own)) / math.pi, y)
    expected.backward()
    for world_size in (1, 3):
        results = ranks.run(world_size, _own_loss)
        assert all(loss == pytest.approx(float(expected), rel=1e-10) for loss, _, _ in results)
        torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]), x.grad)
        torch.testing.assert_close(torch.cat([grad for _, _, grad in results]), weight.grad)


def test_the_loss_of_the_page_takes_twenty_lines() -> None:
    code = _examples("write-your-own-loss.md")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_every_loss_is_on_the_page_that_says_which_one_when() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    for name, kind in losses.BY_NAME.items():
        assert f"`{name}`" in page, name
        assert f"`{kind.__name__}`" in page, kind
    for example in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        parse_config({"data": {"train": "x"}, **yaml.safe_load(example)})
    for example in _examples("losses.md"):
        exec(example, {"num_classes": 10, "embedding_dim": 4})


def test_the_pages_on_checkpoints_and_exchange_show_configs_that_are_valid() -> None:
    text = (ROOT / "docs" / "export-and-import.md").read_text(encoding="utf-8")
    for example in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        parse_config(yaml.safe_load(example))
    command = re.search(r"partialfc train CONFIG.yaml (.*) --force", (ROOT / "docs" / "checkpoints.md").read_text())
    assert command is not None
    tree: dict[str, Any] = {}
    for override in command[1].split():
        key, value = override.split("=")
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    assert parse_config(tree).checkpoint.grow


def test_the_examples_of_the_row_optimizers_page_run() -> None:
    for example in _examples("row-optimizers.md"):
        exec(example, {"num_classes": 10, "embedding_dim": 4})


def test_the_page_on_backbones_lists_all_of_them_with_the_right_numbers() -> None:
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    measured = (ROOT / "docs" / "benchmarks" / "backbone_memory-cpu.txt").read_text(encoding="utf-8")
    for name in models.BY_NAME:
        assert f"`{name}`" in page, name
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == {
        name for name in models.BY_NAME if name.startswith(("ir", "mob", "vit_"))
    } - {name for name in models.BY_NAME if "dp005" in name}
    for name, parameters, operations in rows:
        with torch.device("meta"):
            backbone = models.build(name, 512, 3, 112).eval()
            images = torch.zeros(1, 3, 112, 112)
        assert f"{sum(value.numel() for value in backbone.parameters()) / 1e6:.1f}" == parameters
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(images)
        assert f"{counter.get_total_flops() / 1e9:.2f}" == operations
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (\d+%) \|$", page, re.MULTILINE)
    assert len(rows) >= 3
    for name, plain, again, share in rows:
        assert re.search(rf"^{name} .* {plain} +{again} +{share}$", measured, re.MULTILINE), name


def test_the_examples_of_the_backbones_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    (tmp_path / "my_nets.py").write_text(_examples("backbones.md")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for example in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        config = parse_config({"data": {"train": "x"}, **yaml.safe_load(example)})
        model, data = config.model, config.data
        if model.name == "my_nets:net":
            models.build(model.name, model.embedding_dim, data.channels, data.image_size, model.options)


def test_the_examples_of_the_tracking_page_work(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert parse_config(yaml.safe_load(example)).tracking.wandb.mode == "auto"
    names = {"run": tmp_path}
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 0.5}\n{"kind": "event"}\n')
    exec(_examples("tracking.md")[0], names)
    assert names["losses"] == {5: 0.5}
    for key in WandbConfig.model_fields:
        assert f"`{key}`" in text, key


def test_the_example_of_a_writer_makes_a_complete_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = _examples("data.md")
    exec(example, {"images": [("a/0001", b"first", 0), ("a/0002", b"second", 1)], "names": ["ada", "ben"]})
    data = TarDataset("faces")
    assert [(data.key(i), data.read(i), int(data.labels[i])) for i in range(2)] == [
        ("a/0001", b"first", 0),
        ("a/0002", b"second", 1),
    ]
    assert [entry["name"] for entry in data.classes] == ["ada", "ben"]
    assert data.index["source"] == "our scanners"
