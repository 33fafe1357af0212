"""Conversion: the same bytes at any number of workers and after any interruption; bad images; what the index tells."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partialfc.data.convert import pipeline, sets
from partialfc.data.convert.pipeline import Options, convert
from partialfc.data.convert.shards import write_shard
from partialfc.data.convert.source import Record, Source, Unreadable
from partialfc.data.dataset import TarDataset
from partialfc.errors import ConfigError, DataError, InvalidData
from tests.harness.converting import content, picture, run, samples, write_folders

IDENTITIES = {"ada": 7, "ben": 1, "eve": 4, "zoe": 11}


def test_samples_are_images_under_the_names_of_their_folders(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    report = run(source, tmp_path / "out", samples_per_shard=5)
    assert (report.num_samples, report.num_classes, report.num_bad) == (23, 4, 0)
    data = TarDataset(tmp_path / "out")
    assert [shard["nsamples"] for shard in data.index["shardlist"]] == [5, 5, 5, 5, 3]
    assert [(entry["name"], entry["samples"]) for entry in data.classes] == sorted(IDENTITIES.items())
    for i in range(len(data)):
        assert data.read(i) == (source / f"{data.key(i)}.png").read_bytes()
        assert data.classes[data.labels[i]]["name"] == data.key(i).partition("/")[0]
    assert not (tmp_path / "out" / ".convert").exists()


def test_identities_are_mixed_over_the_shards(tmp_path: Path) -> None:
    run(write_folders(tmp_path / "in", {f"{i}": 40 for i in range(4)}), tmp_path / "out", samples_per_shard=40)
    labels = TarDataset(tmp_path / "out").labels.reshape(4, 40)
    assert all(len(np.unique(shard)) == 4 for shard in labels)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    (source / "eve" / "bad.png").write_bytes(b"no image")
    for workers in (1, 2, 3):
        run(source, tmp_path / f"{workers}", workers=workers, samples_per_shard=4, max_bad=0.1, holdout=2)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_the_index_tells_source_licence_and_options(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    (source / "LICENSE.txt").write_text("Do what you like. ©")
    (tmp_path / "no.csv").write_text("identity\nben\n")
    run(source, tmp_path / "out", exclude=tmp_path / "no.csv", min_samples=2)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["source"] == {"kind": "folders", "name": "in", "licence": "Do what you like. ©"}
    assert index["options"]["selection"]["min_samples"] == 2
    assert index["options"]["selection"]["exclude"]["name"] == "no.csv"
    assert str(tmp_path) not in json.dumps(index)


def test_names_that_are_no_text_are_recorded(tmp_path: Path) -> None:
    try:
        source = write_folders(tmp_path / os.fsdecode(b"caf\xe9"), IDENTITIES)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    run(source, tmp_path / "out")
    assert TarDataset(tmp_path / "out").index["source"]["name"] == r"caf\xe9"


def test_more_shards_than_an_index_can_list_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    monkeypatch.setattr(sets, "_MAX_SHARDS", 5)
    with pytest.raises(ConfigError, match="23 images in shards of 4 would be more than 5 shards; raise it"):
        run(source, tmp_path / "out", samples_per_shard=4)
    assert run(source, tmp_path / "out", samples_per_shard=5).num_samples == 23


class Killed(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, source: Path, out: Path, **options: Any) -> None:
    """Convert, and let the process end, as it were, when so many shards are finished."""
    left = [shards]

    def write(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return write_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_shard", write)
        with pytest.raises(Killed):
            run(source, out, **options)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_stopped_conversion_goes_on_without_writing_finished_shards_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    options: dict[str, Any] = {"samples_per_shard": 5, "holdout": 2}
    run(source, tmp_path / "whole", **options)
    stop_after(monkeypatch, shards, source, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "index.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert len(finished) == shards
    (tmp_path / "out" / "shard-000002.tar.77.tmp").write_bytes(b"left over")
    monkeypatch.setattr(pipeline, "make_listing", None)  # it is not listed again
    run(source, tmp_path / "out", **options)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_shard_that_was_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    run(source, tmp_path / "whole", samples_per_shard=5)
    stop_after(monkeypatch, 3, source, tmp_path / "out", samples_per_shard=5)
    (tmp_path / "out" / "shard-000000.tar").unlink()
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"cut off")
    run(source, tmp_path / "out", samples_per_shard=5)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


COMMAND = [sys.executable, "-m", "partialfc", "data", "convert"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_can_be_given_again(tmp_path: Path, number: signal.Signals) -> None:
    source = write_folders(tmp_path / "in", {f"{i:03d}": 8 for i in range(25)})
    options = ["--samples-per-shard", "2", "--workers", "2", "--decode"]
    run(source, tmp_path / "whole", samples_per_shard=2, decode=True)
    command = [*COMMAND, str(source), "--out", str(tmp_path / "out"), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while process.poll() is None and len(list((tmp_path / "out").glob("shard-*.tar"))) < 3:
        time.sleep(0.001)
    # As a terminal and a scheduler do; a kill for want of memory is for one process.
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    said = process.communicate()[0]  # ends when no worker is left that could write there
    assert process.returncode == (-9 if number == signal.SIGKILL else 75), said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "index.json").exists()
    run(source, tmp_path / "out", workers=2, samples_per_shard=2, decode=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_bad_images_are_counted_listed_and_left_out(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    (source / "ben" / "000.png").write_bytes(picture(0)[:-20])
    (source / "eve" / "001.png").write_bytes(b"GIF8, or not")
    report = run(source, tmp_path / "out", samples_per_shard=5, max_bad=0.1)
    assert (report.num_samples, report.num_bad) == (21, 2)
    with open(tmp_path / "out" / "bad.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["key"] for row in rows} == {"ben/000", "eve/001"}
    assert all(row["reason"] for row in rows)
    assert [entry["samples"] for entry in TarDataset(tmp_path / "out").classes] == [7, 0, 3, 11]
    assert TarDataset(tmp_path / "out").index["num_bad"] == 2
    run(source, tmp_path / "without", exclude=tmp_path / "out" / "bad.csv")
    assert samples(tmp_path / "without") == samples(tmp_path / "out")


def test_too_many_bad_images_fail_with_the_list_and_a_larger_share_goes_on(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    for path in sorted(source.rglob("*.png"))[:3]:
        path.write_bytes(b"no image")
    with pytest.raises(InvalidData, match=r"--max-bad 0\.05 allows") as error:
        run(source, tmp_path / "out", samples_per_shard=5, max_bad=0.05)
    assert sum(f"\n  ada/{i:03d}: " in str(error.value) for i in range(3)) >= 2
    assert (tmp_path / "out" / "bad.csv").exists()
    assert not (tmp_path / "out" / "index.json").exists()
    assert run(source, tmp_path / "out", samples_per_shard=5, max_bad=0.2).num_bad == 3


def test_images_that_are_all_bad_are_no_data_set(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "in", {"a": 2})
    for path in source.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InvalidData, match="none of the images could be used"):
        run(source, tmp_path / "out", max_bad=1.0)
    assert not (tmp_path / "out" / "index.json").exists()


def test_images_are_resized_as_the_options_say(tmp_path: Path) -> None:
    run(write_folders(tmp_path / "in", {"a": 1}), tmp_path / "out", resize=4)
    assert TarDataset(tmp_path / "out").read(0) != picture(0)


@dataclass(frozen=True)
class Blocks(Source):
    """Images in blocks of seven, the last one shorter, each of which can only be read as a whole."""

    size: int
    kind = "blocks"
    in_blocks = True

    def fingerprint(self) -> Any:
        return self.size

    def parts(self) -> Sequence[int]:
        return range(0, self.size, 7)

    def list_part(self, part: int) -> Iterator[Record]:
        for i in range(part, min(part + 7, self.size)):
            yield Record("equal" if i < 2 else f"{i}", str(i % 3), file=0, offset=part, size=i)

    def read(self, records: Sequence[Record]) -> Iterator[bytes | Unreadable]:
        blocks = [record.offset for record in records]
        changes = sum(a != b for a, b in pairwise(blocks))
        assert changes == len(set(blocks)) - 1, "records of a block follow each other"
        for record in records:
            yield Unreadable("it is the tenth") if record.size == 10 else picture(record.size)


@pytest.mark.parametrize("per_shard", [4, 10, 100])
def test_a_source_in_blocks_is_read_block_by_block_and_written_mixed(tmp_path: Path, per_shard: int) -> None:
    options = Options(samples_per_shard=per_shard, max_bad=0.5)
    for workers in (1, 2):
        report = convert(Blocks(60), tmp_path / "none", tmp_path / f"{workers}", options, workers)
        assert (report.num_samples, report.num_bad) == (59, 1)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    data = TarDataset(tmp_path / "1")
    numbers = [next(n for n in range(60) if picture(n) == data.read(i)) for i in range(59)]
    assert sorted(numbers) == [n for n in range(60) if n != 10]
    assert [number % 3 for number in numbers] == data.labels.tolist()
    assert {data.key(i) for i in range(59) if numbers[i] < 2} <= {"equal", "equal~2"}
    assert numbers[:4] != sorted(numbers[:4]) or numbers[4:8] != sorted(numbers[4:8])


def test_a_changed_source_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    stop_after(monkeypatch, 1, source, tmp_path / "out", samples_per_shard=5)
    (source / "ada" / "new.png").write_bytes(picture(99))
    with pytest.raises(ConfigError, match=r"other options or another source \(source\)"):
        run(source, tmp_path / "out", samples_per_shard=5)
    with pytest.raises(ConfigError, match=r"\(images, samples_per_shard, source\)"):
        run(source, tmp_path / "out", samples_per_shard=6, decode=True)
    assert run(source, tmp_path / "out", samples_per_shard=5, overwrite=True).num_samples == 24


DAMAGED = [
    ("listing/listing.json", b"{"),
    ("listing/listing.json", b"[]"),
    ("listing/rows", b"short"),
    ("listing/texts", b""),
    ("listing/names", None),
    ("shards-training/*.json", b""),
    ("shards-training/*.json", b'{"entry": null}'),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_what_a_crash_of_the_machine_has_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: bytes | None
) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    run(source, tmp_path / "whole", samples_per_shard=5)
    stop_after(monkeypatch, 2, source, tmp_path / "out", samples_per_shard=5)
    (file, *_) = sorted((tmp_path / "out" / ".convert").glob(name))
    file.unlink() if damage is None else file.write_bytes(damage)
    run(source, tmp_path / "out", samples_per_shard=5)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_before_a_shard_is_finished_other_options_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folders(tmp_path / "in", IDENTITIES)
    with pytest.raises(DataError):
        run(source, tmp_path / "out", min_samples=100)
    monkeypatch.setattr(pipeline, "make_listing", None)  # the listing serves again
    assert run(source, tmp_path / "out", min_samples=2).num_classes == 3
