"""Measure `partialfc data convert` beside a loop that reads each record of a .rec and adds it with `tarfile`.

    python benchmarks/convert.py --images 100000 --bytes 8000

The source is made first: copies of one noise JPEG with running ids. Loop and conversion write the same samples (an
image and a class id each) in shards of the same size; the conversion besides mixes them, computes digests and syncs to
disk. All runs alternate, the best of each counts; n workers have n cores. The source is cached: reading from cold disks
is not measured.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

MAGIC = struct.pack("<I", 0xCED7230A)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=8000, help="of an image, about")
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="to work in; default: a temporary one")
    parser.add_argument("--loop", nargs=3, metavar=("SOURCE", "OUT", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        source, out, size = arguments.loop
        loop(Path(source), Path(out), int(size))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        compare(Path(folder), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    source = folder / "source"
    num_bytes = write_source(source, arguments.images, arguments.bytes)
    cores = sorted(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {len(cores)} cores, Python {platform.python_version()}")
    print(f"{arguments.images:,} images of {num_bytes:,} bytes, {arguments.samples_per_shard:,} a shard")
    size = str(arguments.samples_per_shard)
    convert = [sys.executable, "-m", "partialfc", "data", "convert", str(source), "--samples-per-shard", size]
    workers = [1, *(count for count in (2, 4, 8, 16, 32) if count <= len(cores))]
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.repeats):
        out = folder / "out"
        command = [sys.executable, __file__, "--loop", str(source), str(out), size]
        seconds.setdefault("loop with tarfile", []).append(measure(command, out, cores[:1]))
        for count in workers:
            command = [*convert, "--out", str(out), "--workers", str(count)]
            seconds.setdefault(f"convert, {count} workers", []).append(measure(command, out, cores[:count]))
    reference: tuple[float, ...] = ()
    print(f"{'':20}  {'seconds':>8} {'of CPU':>8} {'images/s':>9} {'MB/s':>8}  speed beside the loop, by CPU time")
    for name, times in seconds.items():
        best = tuple(map(min, zip(*times, strict=True)))
        reference = reference or best
        speed, by_cpu = (of_loop / own for of_loop, own in zip(reference, best, strict=True))
        rate = arguments.images / best[0]
        numbers = f"{best[0]:8.2f} {best[1]:8.2f} {rate:9,.0f} {rate * num_bytes / 1e6:8,.1f}"
        print(f"{name:20}  {numbers}  {speed:21.2f}  {by_cpu:11.2f}")


def measure(command: list[str], out: Path, cores: list[int]) -> tuple[float, float]:
    """Return the seconds of a command, and those of CPU, start of the interpreter included, on these cores."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def write_source(folder: Path, images: int, size: int) -> int:
    """Write ``train.rec`` and ``train.idx`` with 20 images of each identity; return the bytes of an image."""
    image = noise_image(size)
    folder.mkdir()
    place = 0
    with open(folder / "train.rec", "wb") as records, open(folder / "train.idx", "w") as index:
        for i in range(images):
            data = struct.pack("<IfQQ", 0, float(i // 20), i, 0) + image
            record = MAGIC + struct.pack("<I", len(data)) + data + bytes(-len(data) % 4)
            records.write(record)
            index.write(f"{i}\t{place}\n")
            place += len(record)
    return len(image)


def noise_image(size: int) -> bytes:
    """Return a JPEG of at least about ``size`` bytes."""
    side = 8
    while True:
        encoded = io.BytesIO()
        Image.effect_noise((side, side), 64).convert("RGB").save(encoded, "JPEG", quality=90)
        if encoded.tell() >= size or side >= 4096:
            return encoded.getvalue()
        side += 8


def loop(source: Path, out: Path, samples_per_shard: int) -> None:
    """Do what a script would: read record by record, and add image and class id to a tar."""
    out.mkdir()
    shard: tarfile.TarFile | None = None
    number = 0
    with open(source / "train.rec", "rb") as records:
        while head := records.read(8):
            length = struct.unpack("<II", head)[1] & 0x1FFFFFFF
            data = records.read(length)
            records.read(-length % 4)
            if number % samples_per_shard == 0:
                if shard is not None:
                    shard.close()
                shard = tarfile.open(out / f"shard-{number // samples_per_shard:06d}.tar", "w")  # noqa: SIM115
            assert shard is not None
            label = str(int(struct.unpack_from("<f", data, 4)[0])).encode()
            for extension, content in (("jpg", data[24:]), ("cls", label)):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
            number += 1
    if shard is not None:
        shard.close()


if __name__ == "__main__":
    main()
