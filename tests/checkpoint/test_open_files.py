"""Checkpoints of a process that may open no more files."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.harness.running import finish

SCRIPT = """
import os, resource, sys
from pathlib import Path
import torch
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.errors import CheckpointFailed

folder, tensors = Path(sys.argv[1]), {"x": torch.zeros(5)}
save_checkpoint(folder / "step-00000001", tensors, {"step": 1, "samples": 1})  # imports what it needs
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
taken, failed = [], 0
for free in range(12):
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
    try:
        save_checkpoint(folder / "step-00000002", tensors, {"step": 2, "samples": 2})
    except CheckpointFailed as error:
        failed += 1
        print(error)
    else:
        break
print("saved after", failed)
"""


def test_a_lack_of_open_files_is_not_called_a_full_disk(tmp_path: Path) -> None:
    done = finish([sys.executable, "-c", SCRIPT, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert last == f"saved after {len(errors)}", done.stdout
    assert errors
    for error in errors:
        assert "Too many open files" in error
        assert error.endswith("; raise the limit of open files (ulimit -n), or close what else holds them open)")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
