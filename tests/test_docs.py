"""What the documentation shows, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ranks

ROOT = Path(__file__).parent.parent


def _example() -> str:
    text = (ROOT / "docs" / "use-the-head-in-your-trainer.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


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


def test_the_example_is_ten_lines_and_the_readme_shows_the_same_calls() -> None:
    lines = [line for line in _example().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
