"""The head and the life of its process group, which belongs to torch.distributed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.harness import running

#: The loop of docs/use-the-head-in-your-trainer.md, with everything a variable of the module.
SCRIPT = """
import gc, sys, weakref
import torch
import torch.distributed as dist
from partialfc import CenterLoss, PartialFC, RowSGD, losses

dist.init_process_group("gloo")
backbone = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 6))
own = dist.new_group([0, 1]) if "own" in sys.argv else None
head = PartialFC(20, 6, losses.ArcFace(scale=16.0), sample_rate=0.5, center_loss=CenterLoss(), process_group=own)
group = weakref.ref(dist.group.WORLD if own is None else own)
del own
optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
head_optimizer = RowSGD(head.parameters(), lr=0.1)
for _ in range(3):
    out = head(backbone(torch.randn(4, 8)), torch.randint(0, 20, (4,)))
    out.loss.backward()
    for opt in (optimizer, head_optimizer):
        opt.step()
        opt.zero_grad()
out = head(torch.randn(4, 6), torch.randint(0, 20, (4,)))  # a graph that has not been freed
if "bare" not in sys.argv:
    del backbone  # DDP, too, keeps the group
    gc.collect()
dist.destroy_process_group()
"""

AFTERWARDS = """
assert group() is None, gc.get_referrers(group())
head.state_dict()
for use in (lambda: head(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)), lambda: head.rows(torch.tensor([1])),
            lambda: head.grad_norm()):
    try:
        use()
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
"""


@pytest.mark.parametrize("words", [(), ("own",)], ids=["the default group", "a group of its own"])
def test_a_head_does_not_keep_its_group_alive(words: tuple[str, ...]) -> None:
    done = running.finish([sys.executable, "-c", SCRIPT + AFTERWARDS, *words], ranks=2)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6, "three uses on two ranks"
    for line in lines:
        assert line.startswith("ConfigError: rank "), line
        assert "has been destroyed" in line


@pytest.mark.slow
def test_a_script_whose_variable_is_the_head_ends_well(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for _ in range(20):
        done = running.finish([sys.executable, str(script), "bare"], ranks=2, cold=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
