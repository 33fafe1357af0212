"""How a conversion ends that cannot work: one line that says why, and nothing that looks like a data set."""

from __future__ import annotations

import errno
import re
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from partialfc.cli.data import app
from partialfc.data.convert import pipeline
from partialfc.data.writer import DatasetWriter
from partialfc.errors import ConfigError, DataError, DataUnavailable, InvalidData
from tests.harness.converting import FIXTURES, class_names, content, run, write_folders
from tests.harness.recordio_files import write_rec


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "in", {"ada": 7, "ben": 3})


def test_source_and_target_must_not_lie_in_one_another(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", tmp_path, tmp_path / "link" / "ada"):
        with pytest.raises(ConfigError, match="lie in one another"):
            run(source, out)
    assert sorted(path.name for path in source.iterdir()) == ["ada", "ben"]


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("none", None, "none does not exist"),
        ("file", None, "file is in none of the formats recordio, "),
        ("file", "folders", "file is not a folder"),
        ("none", "recordio", "none is no file; expected a "),
        ("file", "recordio", "byte 0: expected a record"),
        ("empty", None, "found none"),
        ("empty", "recordio", r"expected a file train\.rec"),
        ("file", "mxnet", "--format: unknown name 'mxnet'"),
    ],
)
def test_a_source_that_is_not_what_it_says_is_refused(
    tmp_path: Path, name: str, format: str | None, message: str
) -> None:
    (tmp_path / "file").write_bytes(b"text, no records")
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / name), "--out", str(tmp_path / "out"), *(["--format", format] if format else [])]
    result = CliRunner().invoke(app, ["convert", *arguments])
    assert isinstance(result.exception, InvalidData | ConfigError)
    assert result.exception.exit_code == 2
    assert re.search(message, str(result.exception))
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_class_can_have_is_refused_with_its_sample(tmp_path: Path, name: str) -> None:
    (tmp_path / "faces.csv").write_text(f"path,identity\na.png,ada\nb.png,{name}\n")
    with pytest.raises(InvalidData, match="sample 'b': an identity's name must be 1 to 4,096 bytes"):
        run(tmp_path / "faces.csv", tmp_path / "out")


def test_a_table_with_an_endless_header_is_refused_in_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "faces.csv").write_text("x" * 1_000_000)
    with pytest.raises(InvalidData, match=r"a column path, file, .*was expected") as error:
        run(tmp_path / "faces.csv", tmp_path / "out")
    assert len(str(error.value)) < 2000


def test_more_processes_than_any_machine_has_are_refused(tmp_path: Path, source: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(tmp_path / "out"), "--workers", "100000"])
    assert result.exit_code == 2
    assert "--workers" in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone_and_replaced_on_request(tmp_path: Path, source: Path) -> None:
    run(FIXTURES / "faces_a", tmp_path / "out", holdout=2)
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty; choose another folder, or pass --overwrite"):
        run(source, tmp_path / "out")
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("keep")
    run(source, tmp_path / "out", overwrite=True)
    assert class_names(tmp_path / "out") == ["ada", "ben"]
    run(source, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh") | {"mine.txt": b"keep"}


def test_a_set_that_takes_the_place_of_an_unfinished_one_counts_as_finished(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match="without finish"), DatasetWriter(tmp_path / "out") as writer:
        writer.write("half", b"image", "png", 0)
    run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        DatasetWriter(tmp_path / "out")
    assert class_names(tmp_path / "out") == ["ada", "ben"]


def test_a_source_that_cannot_be_read_costs_no_earlier_data_set(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(InvalidData):
        run(write_rec(tmp_path / "rec", []), tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == before


def test_a_file_in_place_of_the_target_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out is not a folder"):
        run(source, tmp_path / "out", overwrite=True)


def test_only_one_process_converts_to_a_folder(tmp_path: Path, source: Path) -> None:
    command = f"""if True:
        from pathlib import Path
        from partialfc.data.convert.workspace import Workspace
        with Workspace(Path({str(tmp_path / "out")!r}), {{}}, False):
            print("locked", flush=True)
            input()
    """
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(DataError, match="another process converts to"):
        run(source, tmp_path / "out", overwrite=True)
    process.communicate(b"\n")
    assert run(source, tmp_path / "out").num_samples == 10


def test_a_target_that_cannot_be_written_is_named(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataUnavailable, match=r"out cannot be written: Read-only file system"):
        run(source, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=False)


def test_a_full_disk_is_said_and_what_is_finished_stays(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folders(tmp_path / "in", {f"{i}": 8 for i in range(10)})
    out = small_disk / "out"
    with pytest.raises(DataError, match=r"about .* KiB are to be written, but .* KiB are free"):
        run(source, out, samples_per_shard=5)
    monkeypatch.setattr(pipeline, "_require_space", lambda *_: None)
    with pytest.raises(DataUnavailable, match="the disk is full; free some space and give the same command again"):
        run(source, out, samples_per_shard=5)
    assert not (out / "index.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert finished
    assert not list(out.glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    run(source, out, samples_per_shard=5)
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}.items()
    run(source, tmp_path / "whole", samples_per_shard=5)
    assert content(out) == content(tmp_path / "whole")


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"out: about .* KiB are to be written, but 10\.0 bytes are free"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_write_that_fails_in_a_worker_is_one_line(tmp_path: Path, source: Path) -> None:
    command = [sys.executable, "-B", "-m", "partialfc", "data", "convert", str(source), "--workers", "2", "--out"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    result = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert re.fullmatch(r"error: .* cannot be written: File too large\n", result.stderr)
    assert not list((tmp_path / "out").glob("shard-*"))
