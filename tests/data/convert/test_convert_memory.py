"""Conversion of many small records: memory does not follow their number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from partialfc.data.dataset import TarDataset
from tests.harness.converting import picture
from tests.harness.recordio_files import record, write_rec

CHILD = """
import resource, sys
from pathlib import Path
from partialfc.data.convert.detect import open_source
from partialfc.data.convert.pipeline import Options, convert
from partialfc.data.convert.plan import Selection

source, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options = Options(selection=Selection(max_samples=int(sys.argv[4]), holdout=10))
convert(open_source(source), source, out, options, workers)
# Not RUSAGE_SELF, which begins with the memory of the process that started this one.
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
"""


def peak_of_conversion(source: Path, out: Path, workers: int, max_samples: int) -> int:
    """Return the largest resident memory of a process, in bytes, mapped files included."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(workers), str(max_samples)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def write_source(folder: Path, records: int, identities: int) -> Path:
    image = picture(0)
    return write_rec(folder, (record(image, float(i % identities)) for i in range(records)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_million_records_take_less_than_400_mb_of_memory_a_process(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path / "in", 1_000_000, 50_000)
    assert peak_of_conversion(source, tmp_path / "out", workers, max_samples=19) < 400e6
    index = TarDataset(tmp_path / "out").index
    assert (index["num_samples"], index["num_classes"]) == (19 * 49_990, 49_990)
