"""Measure how long a set takes to index and to open.

    python benchmarks/index.py                            # 100,000 samples indexed; 300 million opened
    python benchmarks/index.py --open 1000000000 --dir /scratch

Indexing walks over the headers of real shards, of small and of large images, alone and on all cores, beside tarfile,
with which webdataset reads, in the same process. Opened is a made-up index, a sparse file, by a new process: the
seconds until ``TarDataset`` stands, the private (anonymous) memory that it adds, and the same with 1,000 samples looked
up at random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from head_step import processor

from partialfc.data.dataset import TarDataset
from partialfc.data.index import Shard, find_shards
from partialfc.data.indexing import read_shard
from partialfc.data.offsets import FORMAT, HEADER_BYTES, OFFSETS, Layout, entries_check, header_digest, stamps_of
from partialfc.data.pool import Pool
from partialfc.data.tar import END_OF_ARCHIVE, padding, ustar_header

SHARD = 10_000  # samples
LOOK_UPS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="to index")
    parser.add_argument("--open", type=int, default=300_000_000, help="samples of the index to open")
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure; default: temporary")
    parser.add_argument("--opened", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.opened:
        print(json.dumps(opened(arguments.opened)))
        return
    print(f"machine: {processor()}, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        for size in (5_000, 100_000):
            indexing(Path(folder), arguments.samples, size)
        opening(Path(folder), arguments.open)


def indexing(folder: Path, samples: int, size: int) -> None:
    image, paths = os.urandom(size), [folder / f"{i}.tar" for i in range(max(1, samples // SHARD))]
    for path in paths[:1]:
        with path.open("wb") as file:
            for i in range(SHARD):
                for name, content in ((f"{i:08d}.jpg", image), (f"{i:08d}.cls", b"12345")):
                    file.write(ustar_header(name, len(content)) + content + padding(len(content)))
            file.write(END_OF_ARCHIVE)
    for path in paths[1:]:
        path.hardlink_to(paths[0])
    tasks = [(path, None) for path in paths]

    def on_all_cores() -> None:
        with Pool() as pool:
            list(pool.map(read_shard, tasks))

    ways: dict[str, Callable[[], object]] = {
        "tarfile, one core": lambda: [list(iterate(path)) for path in paths[:1]],
        "one core": lambda: [read_shard(*task) for task in tasks],
        "all cores": on_all_cores,
    }
    seconds = {}
    for name, way in ways.items():
        way() if name == "one core" else None
        started = time.perf_counter()
        way()
        seconds[name] = (time.perf_counter() - started) / (SHARD * (1 if "tarfile" in name else len(paths)))
    words = ", ".join(f"{name} {1e6 * value:.2f} µs" for name, value in seconds.items())
    ratio = seconds["tarfile, one core"] / seconds["one core"]
    print(f"indexing images of {size:,} bytes, a sample: {words}; {ratio:.1f} times as fast as tarfile", flush=True)
    for path in paths:
        path.unlink()


def iterate(path: Path) -> list[tuple[str, int]]:
    with tarfile.open(path, "r|") as tar:
        return [(member.name, member.size) for member in tar]


def opening(folder: Path, samples: int) -> None:
    data = write_sparse_set(folder / "sparse", samples)
    command = [sys.executable, __file__, "--opened", str(data)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"opening {samples:,} samples in {found['shards']:,} shards: {found['seconds']:.2f} s, "
        f"{found['private_mb']:.0f} MB of private memory; {LOOK_UPS:,} look-ups {1e6 * found['look_up']:.0f} µs each, "
        f"{found['private_mb_after']:.0f} MB after them"
    )
    print(json.dumps(found))


def opened(folder: Path) -> dict[str, float]:
    before, started = private_mb(), time.perf_counter()
    data = TarDataset(folder)
    seconds, after_open = time.perf_counter() - started, private_mb()
    draw = random.Random(0)
    started = time.perf_counter()
    for _ in range(LOOK_UPS):
        data.describe(draw.randrange(len(data)))
    return {
        "samples": len(data),
        "shards": len(data.shards),
        "seconds": seconds,
        "private_mb": after_open - before,
        "look_up": (time.perf_counter() - started) / LOOK_UPS,
        "private_mb_after": private_mb() - before,
    }


def private_mb() -> float:
    """Return the anonymous memory of this process: pages of mapped files are shared by all that map them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1000


def write_sparse_set(folder: Path, samples: int) -> Path:
    """Write a data set folder of sparse files: shards of zeros, and an index in which all entries are zero."""
    folder.mkdir()
    counts = [min(SHARD, samples - first) for first in range(0, samples, SHARD)]
    shards = []
    for i in range(len(counts)):
        path = folder / f"shard-{i:06d}.tar"
        with path.open("wb") as file:
            file.truncate(1 << 20)
        shards.append({"url": path.name, "nsamples": counts[i], "nbytes": 1 << 20, "sha256": ""})
    index = {"shardlist": shards, "num_classes": 1, "num_samples": samples, "digest": "of zeros"}
    (folder / "index.json").write_text(json.dumps(index))
    write_zeros(folder / OFFSETS, find_shards(folder, index), counts)
    return folder


def write_zeros(path: Path, shards: list[Shard], counts: list[int]) -> None:
    layout = Layout(len(shards), sum(counts), 20 * sum(counts))
    checks = np.zeros((layout.num_checks, 2), dtype="<u4")
    checks[:, 0] = entries_check(*[bytes(8 * 1024)] * 3)
    last = layout.num_samples % 1024
    if last:
        checks[-1, 0] = entries_check(*[bytes(8 * last)] * 3)
    tables = stamps_of(shards, counts).tobytes() + checks.tobytes()
    header = {
        "format": FORMAT,
        "digest": "of zeros",
        "num_samples": layout.num_samples,
        "num_classes": 1,
        "key_bytes": layout.key_bytes,
        "content": "",
    }
    text = json.dumps(header | {"check": header_digest(header, tables)}).encode()
    with path.open("wb") as file:
        file.write(text.ljust(HEADER_BYTES) + tables)
        file.truncate(layout.ends()[-1])


if __name__ == "__main__":
    main()
