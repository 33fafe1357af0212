"""Configs of arcface_torch: read without executing them, and turned into configs that load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.config import Config, load_config
from partialfc.errors import ConfigError
from partialfc.exchange.import_config import import_config
from partialfc.exchange.insightface_config import read_insightface_config
from tests.harness.running import partialfc

HEAD = "from easydict import EasyDict as edict\n\nconfig = edict()\n"
MS1MV3 = """\
config.margin_list = (1.0, 0.5, 0.0)
config.network = "r50"
config.output = None
config.embedding_size = 512
config.sample_rate = 1.0
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128
config.lr = 0.1
config.verbose = 2000
config.dali = False
config.rec = "/train_tmp/ms1m-retinaface-t1"
config.num_classes = 93431
config.num_image = 5179510
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ['lfw', 'cfp_fp', "agedb_30"]
"""


def _import(tmp_path: Path, text: str, gpus: int = 8) -> tuple[Config, list[str]]:
    """Write a config, import it, and load the result as `partialfc train` does."""
    source, out = tmp_path / "given.py", tmp_path / "imported.yaml"
    source.write_text(HEAD + text)
    yaml, notes = import_config(source, gpus)
    out.write_text(yaml, encoding="utf-8")
    return load_config(out), notes


def test_a_published_recipe_becomes_the_same_run(tmp_path: Path) -> None:
    config, notes = _import(tmp_path, MS1MV3)
    assert (config.run.dir, config.run.seed) == (Path("runs/given"), 2048)
    assert config.data.train == Path("data/ms1m-retinaface-t1")
    assert (config.data.num_classes, config.data.global_batch_size) == (93431, 1024)
    assert (config.data.image_size, config.data.channels, config.data.augment, config.data.workers) == (
        112,
        3,
        "flip",
        2,
    )
    assert (config.model.name, config.model.embedding_dim) == ("iresnet50", 512)
    loss = {"name": "arcface", "scale": 64, "margin": 0.5, "margin_gradient": "straight_through"}
    assert config.head.loss.model_dump() == loss
    optim = config.optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.1, 0.9, 5e-4)
    assert (optim.epochs, optim.warmup, optim.schedule, optim.power, optim.clip) == (20, 0, "polynomial", 1, 5)
    assert (config.engine.precision, config.engine.sync_batchnorm) == ("fp16", False)
    assert config.evaluation.sets == [Path("data/lfw"), Path("data/cfp_fp"), Path("data/agedb_30")]
    assert (config.evaluation.every, config.tracking.log_every) == (2000, 10)
    text = "\n".join(notes)
    assert "partialfc data convert /train_tmp/ms1m-retinaface-t1 --out data/ms1m-retinaface-t1" in text
    assert "partialfc data convert /train_tmp/ms1m-retinaface-t1/lfw.bin --out data/lfw" in text
    assert "num_image has no counterpart" in text
    assert "dali" not in text, "off is no difference"


def test_large_runs_keep_their_sampling_their_accumulation_and_their_filter(tmp_path: Path) -> None:
    text = MS1MV3 + (
        "config.margin_list = (1.0, 0.0, 0.4)\nconfig.sample_rate = 0.3\nconfig.interclass_filtering_threshold = 0.4\n"
        "config.gradient_acc = 4\nconfig.warmup_epoch = config.num_epoch // 10\n"
    )
    config, notes = _import(tmp_path, text, gpus=16)
    assert config.head.loss.model_dump() == {"name": "cosface", "scale": 64, "margin": 0.4}
    assert (config.head.sample_rate, config.head.filter_threshold) == (0.3, 0.4)
    assert (config.data.global_batch_size, config.optim.accumulation) == (128 * 16 * 4, 4)
    assert (config.optim.warmup, config.optim.unsampled_rows) == (2, "decayed")
    assert (config.evaluation.every, config.tracking.log_every) == (500, 2), "its steps are micro-batches"
    assert any("a logit of 0" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "loss", "note"),
    [
        ("margin_list = (1.0, 0.5, 0.3)", {"name": "cosface", "margin": 0.3}, "it is CosFace 0.3"),
        ("margin_list = (1.3, 0.2, 0)", {"name": "combined", "m1": 1.3, "m2": 0.2, "m3": 0}, "refuses"),
        ("loss = 'cosface'", {"name": "cosface", "margin": 0.4}, "losses.py"),
    ],
)
def test_every_margin_becomes_what_arcface_torch_makes_of_it(
    tmp_path: Path, text: str, loss: dict[str, Any], note: str
) -> None:
    published = MS1MV3.replace("config.margin_list = (1.0, 0.5, 0.0)\n", "")
    config, notes = _import(tmp_path, f"{published}config.{text}\n")
    assert config.head.loss.model_dump() == {"scale": 64, **loss}
    assert any(note in each for each in notes)


@pytest.mark.parametrize(
    ("network", "name"), [("r18", "iresnet18"), ("r100", "iresnet100"), ("mbf", "mobilefacenet"), ("vit_t", "vit_t")]
)
def test_networks_get_the_names_of_this_package(tmp_path: Path, network: str, name: str) -> None:
    assert _import(tmp_path, MS1MV3 + f"config.network = {network!r}\n")[0].model.name == name


def test_a_network_that_is_not_built_in_is_left_to_its_owner(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(HEAD + MS1MV3 + "config.network = 'mambavision_b'\n")
    yaml, notes = import_config(tmp_path / "x.py")
    assert "name: mambavision_b" in yaml
    assert "network 'mambavision_b' is not built in: set model.name to my.module:factory or timm:NAME" in notes


def test_adamw_wandb_and_what_has_no_counterpart(tmp_path: Path) -> None:
    text = MS1MV3 + (
        "config.optimizer = 'adamw'\nconfig.lr = 0.001\nconfig.weight_decay = 0.1\nconfig.dali = True\n"
        "config.using_wandb = True\nconfig.wandb_key = 'secret'\nconfig.wandb_project = 'faces'\nconfig.mystery = [1]\n"
        "def lr_step_func(epoch):\n    return 0.1\nconfig.lr_func = lr_step_func\n"
    )
    config, notes = _import(tmp_path, text)
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adamw", 0.001, 0.1)
    assert (config.tracking.wandb.mode, config.tracking.wandb.project) == ("auto", "faces")
    shown = "\n".join(notes)
    assert "secret" not in (tmp_path / "imported.yaml").read_text() + shown
    for words in (
        "dali has no counterpart",
        "wandb_key has no",
        "mystery has no counterpart ([1])",
        "`def lr_step_func",
    ):
        assert words in shown


def test_base_py_beside_the_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(
        HEAD + "config.seed = 7\nconfig.lr = 0.3\nconfig.frequent = 5\nimport os\nos.x()\n"
    )
    config, notes = _import(tmp_path, MS1MV3)
    assert (config.run.seed, config.optim.lr, config.tracking.log_every) == (7, 0.1, 5)
    assert "not read: base.py, line 8: `os.x()`" in notes


def test_values_are_read_as_python_means_them(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        HEAD
        + "n = 3\nconfig.a = 300 * 10000\nconfig['b'] = -n + 2 ** 3\nconfig.update({'c': [1, (2.5, None)]}, d=n / 2)\n"
        "config.e = config.a // 7 % 5\nconfig.update(edict(f='x'))\nconfig.g = edict(h=True)\nconfig.g.i = 1e-4\n"
    )
    found, unread = read_insightface_config(tmp_path / "x.py")
    assert not unread
    assert found == {
        **{"a": 3000000, "b": 5, "c": [1, [2.5, None]], "d": 1.5, "e": 3000000 // 7 % 5, "f": "x"},
        "g": {"h": True, "i": 1e-4},
    }


@pytest.mark.parametrize(
    "line",
    [
        "config.x = open('owned', 'w').write('x')",
        "config.x = __import__('os').system('touch owned')",
        "config.x = [exec('1') for _ in (1,)]",
        "config.x = 9 ** 9 ** 9 ** 9",
        "config.x = 'a' * 10 ** 10",
        "config.x = (lambda: 1)()",
        "config.x = f'{config}'",
        "config.x = 1 / 0",
        "config.x = unknown",
        "config.x = -" + "-" * 3000 + "1",
        "for i in range(10**10): pass",
        "open('owned', 'w')",
    ],
)
def test_nothing_in_a_config_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(HEAD + "config.x = 1\n" + line + "\n")
    try:
        found, unread = read_insightface_config(tmp_path / "x.py")
    except ConfigError as error:  # Python's own parser gives up
        assert "is not Python" in str(error)  # noqa: PT017
    else:
        assert len(unread) == 1
        assert unread[0].startswith("line 5: `")
        assert "x" not in found or not line.startswith("config"), "no earlier value stands for it"
    assert not (tmp_path / "owned").exists()


def test_references_that_double_are_shown_short(tmp_path: Path) -> None:
    doubled = "a = [1]\n" + "a = [a, a]\n" * 100
    (tmp_path / "x.py").write_text(HEAD + MS1MV3 + doubled + "config.y = a\nconfig.margin_list = a\n")
    with pytest.raises(ConfigError, match=r"margin_list must be three numbers, got \[\[.{1,800}$"):
        import_config(tmp_path / "x.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config.batch_size = 0\n", "batch_size must be a number of at least 1, got 0"),
        ("config.lr = 'high'\n", "lr must be a number of at least 0, got 'high'"),
        ("config.num_epoch = None\n", "num_epoch must be a number of at least"),
        ("config.network = 50\n", "network must be a text, got 50"),
        ("config.val_targets = 'lfw'\n", "val_targets must be a list of names, got 'lfw'"),
        ("config.optimizer = 'lamb'\n", "makes no valid config: optim.name"),
        ("config = 3\n", "makes no `config = edict"),
        ("config.x = (\n", "line 22 is not Python"),
    ],
)
def test_values_that_make_no_config_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.py").write_text(HEAD + MS1MV3 + text)
    with pytest.raises(ConfigError, match=words) as refused:
        import_config(tmp_path / "x.py")
    assert "\n" not in str(refused.value)


@settings(max_examples=50)
@given(st.text(alphabet="config.x=()[]{}'\"1\n +*-,:edict", max_size=80))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "x.py"
    path.write_text(HEAD + text)
    try:
        config, _ = read_insightface_config(path)
    except ConfigError:
        return
    assert isinstance(config, dict)


def test_the_command_prints_or_writes_the_config(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(HEAD + MS1MV3)
    printed = partialfc("import", "config", tmp_path / "x.py")
    assert printed.returncode == 0, printed.stderr
    written = partialfc("import", "config", tmp_path / "x.py", "--out", tmp_path / "x.yaml", "--gpus", 4)
    assert written.returncode == 0, written.stderr
    assert "num_image has no counterpart" in written.stdout
    assert printed.stdout.replace("1024", "512").replace("8 GPUs", "4 GPUs") == (tmp_path / "x.yaml").read_text()
    again = partialfc("import", "config", tmp_path / "x.py", "--out", tmp_path / "x.yaml")
    assert again.returncode == 2
    assert "x.yaml exists; choose another file" in again.stderr
