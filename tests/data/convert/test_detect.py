"""Which format a path is taken for, and which options then mean something."""

from __future__ import annotations

from pathlib import Path

import pytest

from partialfc.data.convert.detect import FORMATS, SourceOptions, open_source
from partialfc.data.convert.manifest import Manifest
from partialfc.errors import ConfigError, InvalidData


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.rec", "recordio"),
        ("faces/any.rec", "recordio"),
        ("faces.csv", "manifest"),
        ("faces.jsonl", "manifest"),
        ("train.parquet", "parquet"),
        ("faces/data/train-00000-of-00001.parquet", "parquet"),
        ("train.tar", "webdataset"),
        ("shards/train-000000.tar", "webdataset"),
        ("faces/ada/1.jpg", "folders"),
    ],
)
def test_a_format_is_told_by_names(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    source = tmp_path / Path(name).parts[0]
    assert open_source(source).kind == open_source(source, kind).kind == kind


def test_a_pattern_of_tars_is_one_source(tmp_path: Path) -> None:
    assert open_source(tmp_path / "train-{000..123}.tar").kind == "webdataset"


def test_options_reach_the_source(tmp_path: Path) -> None:
    options = SourceOptions(images=tmp_path, image_field="a", label_field="b", key_field="c")
    source = open_source(tmp_path / "faces.csv", None, options)
    assert isinstance(source, Manifest)
    assert (source.images, source.fields) == (tmp_path, options.fields)
    assert (source.fields.image, source.fields.label, source.fields.key) == ("a", "b", "c")


@pytest.mark.parametrize("format", FORMATS)
def test_an_option_that_means_nothing_to_a_format_is_refused(tmp_path: Path, format: str) -> None:
    for name in SourceOptions.__dataclass_fields__:
        options = SourceOptions(**{name: "x"})  # type: ignore[arg-type]
        if name not in FORMATS[format].options:
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} means nothing for .* {format}"):
                open_source(tmp_path, format, options)


def test_what_is_not_there_or_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="none does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(ConfigError, match="did you mean 'recordio'"):
        open_source(tmp_path, "record")
