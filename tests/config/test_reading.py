"""Reading of configs: a text stays what was written, a number is one, and what nobody can have meant is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from partialfc.config import Config, build_loss, load_config, to_yaml
from partialfc.errors import ConfigError

DATA = "data: {train: some/folder}\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Return a reader of a config's text, with overrides."""

    def reader(text: str, *overrides: str) -> Config:
        file = tmp_path / "c.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(file, overrides)

    return reader


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lr: 0.1}\nhead: {}\noptim: {lr: 0.2}\n", "line 4: the key 'optim' is given twice, first in line 2$"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", "line 4: the key 'lr' is given twice, first in line 3$"),
        ("head: {loss: {name: focal, loss: {name: arcface, name: cosface}}}\n", "line 2: the key 'name' .* in line 2$"),
        ('head:\n  loss:\n    margin: 1\n    "margin": 2\n', "line 5: the key 'margin' .* in line 4$"),
    ],
)
def test_a_key_that_a_file_gives_twice_is_refused_with_both_lines(read: Any, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(DATA + text)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optim.lr=1", "optim.lr=1"], "optim.lr"),
        (["optim={lr: 1}", "optim.lr=2"], "optim.lr"),
        (["optim.lr=2", "optim={clip: 1}"], "optim.lr"),
        (["head.loss.margin=0.2", "head.loss={name: cosface}"], "head.loss.margin"),
    ],
)
def test_an_override_that_drops_an_earlier_one_is_refused(read: Any, overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: given twice on the command line, '{overrides[0]}' and"):
        read(DATA, *overrides)
    with pytest.raises(ConfigError, match=r"^optim: the key 'lr' is given twice"):
        read(DATA, "optim={lr: 1, lr: 2}")


def test_overrides_of_different_keys_add_up(read: Any) -> None:
    config = read(DATA, "head.loss={name: cosface}", "head.loss.margin=0.2", "head.center_loss.weight=0.1")
    assert repr(build_loss(config.head.loss)).startswith("CosFace(")
    assert (build_loss(config.head.loss).margin, config.head.center_loss.weight) == (0.2, 0.1)
    with pytest.raises(ConfigError, match=r"^optim: expected a section, got 5$"):
        read(DATA + "optim: 5\n", "optim.lr=1")


@pytest.mark.parametrize("number", ["1e-05", "1e-5", "+1E-05", "0.00001"])
def test_a_number_is_a_number_in_every_notation(read: Any, number: str) -> None:
    options = f"model: {{name: 'my.nets:build', options: {{rate: {number}}}}}\n"
    assert read(DATA + options).model.options == {"rate": 1e-05}
    assert (
        read(DATA + "model: {name: 'my.nets:build'}\n", f"model.options.rate={number}").model.options["rate"] == 1e-05
    )
    assert read(DATA, f"head.loss.margin={number}").head.loss.model_extra == {"margin": 1e-05}


@pytest.mark.parametrize("text", ["20251126_0651", "2024", "1e5", "yes", "on", "0x1F", "1:30", "2024-01-01", "1.10"])
def test_a_text_key_takes_what_is_written(read: Any, text: str) -> None:
    for config in (
        read(f"data: {{train: {text}}}\nrun: {{dir: {text}}}\ntracking: {{wandb: {{name: {text}, tags: [{text}]}}}}\n"),
        read(DATA, f"run.dir={text}", f"data.train={text}", f"tracking.wandb={{name: {text}, tags: [{text}]}}"),
    ):
        assert {str(config.run.dir), str(config.data.train), config.tracking.wandb.name} == {text}
        assert config.tracking.wandb.tags == [text]
        assert read(to_yaml(config)) == config


def test_an_override_of_a_text_is_taken_literally(read: Any) -> None:
    def wandb(text: str) -> Any:
        return read(DATA, f"tracking.wandb.name={text}").tracking.wandb.name

    for text in ("runs/exp #2", "#2", "a: b", "[1", "*x", "{", "- 1", "it's", '"half'):
        assert wandb(text) == text
        assert str(read(DATA, f"run.dir={text}").run.dir) == text
    assert [wandb(text) for text in ("'2024'", '"a # b"', "null", "~", "")] == ["2024", "a # b", None, None, None]
    sets = read(DATA, "evaluation.sets=[a #1, 2024]").evaluation.sets
    assert list(map(str, sets)) == ["a #1", "2024"]
    with pytest.raises(ConfigError, match=r"optim.lr: .*got '0.2 # low'"):
        read(DATA, "optim.lr=0.2 # low")
    assert read(DATA + "optim: {lr: 0.2} # low\n").optim.lr == 0.2, "a file has comments"


def test_a_home_folder_is_expanded_and_a_variable_refused(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = read("data: {train: ~/faces}\nevaluation: {sets: [~/v]}\n", "run.dir=~/runs/1", "model.pretrained=~/w.pth")
    paths = [config.data.train, config.run.dir, config.model.pretrained, *config.evaluation.sets]
    assert list(map(str, paths)) == ["/home/ann/faces", "/home/ann/runs/1", "/home/ann/w.pth", "/home/ann/v"]
    assert read(DATA, "tracking.wandb.name=~/x").tracking.wandb.name == "~/x", "no path"
    for path in ("$SCRATCH/x", "${SCRATCH}/x"):
        with pytest.raises(
            ConfigError, match=r"run.dir: \$\{?SCRATCH\}? is not expanded here; .* the shell expands it"
        ):
            read(DATA, f"run.dir={path}")
        with pytest.raises(ConfigError, match=r"evaluation.sets: "):
            read(DATA + f"evaluation: {{sets: ['{path}']}}\n")
    assert str(read(DATA, "run.dir=cost$").run.dir) == "cost$"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 5: more than 50,000 values, those that aliases repeat included"),
        ("a: &a {<<: *a}\n", "line 1: the anchor 'a' holds itself"),
        ("[" * 100_000, "line 1: values are nested deeper than 50 levels"),
        ("- " * 100_000, "line 1: values are nested deeper than 50 levels"),
        ("{a: " * 100_000, "line 1: values are nested deeper than 50 levels"),
        ("optim: {lr: !!int x}\n", "line 1: tags such as !!int are not taken here"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: tags such as !!python/object/apply:os.system"),
        ("optim: {lr: " + "9" * 5000 + "}\n", r"optim.lr: expected a number, got '9{79}… \(5,002 characters\)"),
        ("? [a]\n: 1\n", "line 1: expected a word as a key, got a list or a mapping"),
        ("a: 1\n---\na: 1\n", "line 2: not valid YAML"),
        ("a: [\n", "line 2: not valid YAML: expected the node content"),
        ("\x00", "not valid YAML: unacceptable character"),
        ("#" + "x" * (1 << 20), "larger than 1,048,576 bytes"),
        (DATA + "on: 1\n", "unknown name 'on'"),
    ],
)
def test_an_odd_file_is_one_line(read: Any, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "override",
    [
        "optim.warmup=1e308",
        "optim.epochs=1e308",
        "run.timeout=1e308",
        "data.num_classes=1000000000000",
        "data.num_classes=10**12",
        "data.global_batch_size=1" + "0" * 400,
        "optim.lr=" + "[" * 100_000,
        "optim.lr=.inf",
        "head.loss.margin=.nan",
        "head.loss.scale=1" + "0" * 400,
        "head.memory_budget_mb=0.001",
        "run.dir=",
    ],
)
def test_a_number_out_of_all_proportion_is_one_line(read: Any, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}: ") as error:
        read(DATA, override)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_only_a_regular_file_is_a_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    for path, words in [
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "a folder, not a file"),
        (tmp_path / "latin.yaml", "byte 3 is not UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load_config(path)


def test_containers_that_an_alias_repeats_are_not_shared(read: Any) -> None:
    text = "data: {train: x}\nhead: {center_loss: &same {weight: 0.5}, loss: {name: arcface}}\noptim: {spike: null}\n"
    again = text + "model: {name: 'a:b', options: {one: &o {x: 1}, two: *o, three: {<<: *o, y: 2}}}\n"
    options = read(again, "model.options.one.x=5").model.options
    assert options == {"one": {"x": 5}, "two": {"x": 1}, "three": {"x": 1, "y": 2}}


def test_a_warm_up_longer_than_the_run_is_refused(read: Any) -> None:
    with pytest.raises(ConfigError, match=r"optim.warmup: 11 epochs .* longer than the run, optim.epochs=10; lower"):
        read(DATA, "optim.warmup=11")
    assert read(DATA, "optim.warmup=10").optim.warmup == 10


def test_texts_that_look_like_numbers_survive_the_resolved_config(read: Any) -> None:
    texts = {"a": "1e-05", "b": "2024", "c": "yes", "d": "010", "on": ".inf", "2024": "~"}
    written = ", ".join(f"{key!r}: {value!r}" for key, value in texts.items())
    config = read(DATA + f"model: {{name: 'a:b', options: {{{written}}}}}\n")
    assert config.model.options == texts
    assert read(to_yaml(config)) == config
