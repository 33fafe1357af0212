"""Conversion of many small records: memory does not follow their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from partialfc.data.convert.listing import ROW
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


PLANNER = """
import sys, threading, time
from pathlib import Path
from partialfc.data.convert.listing import Listing
from partialfc.data.convert.plan import Selection, make_plan

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

folder = Path(sys.argv[1])
listing = Listing.open(folder)
before, seen = anonymous(), []

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
make_plan(listing, Selection(max_samples=30, holdout=100), folder)
print(max(seen) - before)
"""


def write_listing(folder: Path, records: int, identities: int) -> None:
    """Write a listing of records without texts, which a plan does not read."""
    rows = np.zeros(records, ROW)
    rows["identity"] = np.arange(records) % identities
    rows["hash"] = np.random.default_rng(0).integers(2**32, size=records, dtype=np.uint32)
    rows.tofile(folder / "rows")
    (folder / "names").write_text("".join(f"{i}\0" for i in range(identities)))
    summary = {"records": records, "identities": identities, "bytes": 0, "skipped": {}}
    (folder / "listing.json").write_text(json.dumps(summary))


@pytest.mark.slow
def test_a_plan_takes_less_than_16_bytes_of_private_memory_a_record(tmp_path: Path) -> None:
    write_listing(tmp_path, 20_000_000, 50_000)
    found = subprocess.run([sys.executable, "-c", PLANNER, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 16 * 20_000_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_million_records_take_less_than_400_mb_of_memory_a_process(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path / "in", 1_000_000, 50_000)
    assert peak_of_conversion(source, tmp_path / "out", workers, max_samples=19) < 400e6
    index = TarDataset(tmp_path / "out").index
    assert (index["num_samples"], index["num_classes"]) == (19 * 49_990, 49_990)
