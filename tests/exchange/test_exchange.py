"""Export and import of weights."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from partialfc import PartialFC, losses
from partialfc.checkpoint.folders import latest_valid
from partialfc.checkpoint.writer import save_checkpoint
from partialfc.config import load_config, parse_config
from partialfc.errors import ConfigError, DamagedCheckpoint, DataError
from partialfc.exchange import export as export_module
from partialfc.exchange.export import export
from partialfc.exchange.head_shards import find_shards, load_head
from partialfc.exchange.merge import merge
from partialfc.models import BY_NAME
from partialfc.models.weights import load_backbone
from partialfc.runs.folder import RunFolder
from tests.harness.checkpoints import Hostile, made, train_a_little
from tests.harness.running import partialfc, run
from tests.harness.tasks import write_set, write_task


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished run on three ranks."""
    folder = tmp_path_factory.mktemp("task")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(write_task(folder)))
    done = run(config, 3, "evaluation.sets=[]")
    assert done.returncode == 0, done.stdout + done.stderr
    return config


# --- out --------------------------------------------------------------------------------------------------------------


def test_an_export_computes_what_the_run_does_and_finds_the_classes_of_images(trained: Path) -> None:
    folder = trained.parent / "run"
    done = partialfc("export", folder, "--centers")
    assert done.returncode == 0, done.stderr
    assert "ONNX as torch within" in done.stdout
    out = folder / "export"
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.onnx",
        "backbone.safetensors",
        "class_centers.npy",
        "classes.jsonl",
        "export.json",
        "nearest.py",
    ]
    about = json.loads((out / "export.json").read_text())
    assert (about["model"], about["step"], about["num_classes"]) == ("glyph_net", 36, 37)

    backbone = BY_NAME["glyph_net"](32, 1, 16)
    backbone.load_state_dict(load_file(out / "backbone.safetensors"))
    session = onnxruntime.InferenceSession(out / "backbone.onnx")
    for batch in (1, 3, 17):
        images = torch.randn(batch, 1, 16, 16)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), backbone.eval()(images).detach(), rtol=1e-4, atol=1e-5)

    centers = np.load(out / "class_centers.npy", mmap_mode="r")
    assert centers.shape == (37, 32)
    merged = folder / "merged.safetensors"
    assert partialfc("checkpoint", "merge", folder, merged, "--only", "head.").returncode == 0
    weight = load_file(merged)["head.weight"]
    torch.testing.assert_close(torch.from_numpy(centers.copy()), torch.nn.functional.normalize(weight))
    assert partialfc("checkpoint", "merge", folder, merged).returncode == 2, "nothing is overwritten"

    from partialfc.data.dataset import TarDataset

    known = TarDataset(trained.parent / "known")
    right = 0
    for sample in range(0, 74, 6):
        (out / "image.png").write_bytes(known.read(sample))
        found = subprocess.run(
            [sys.executable, out / "nearest.py", out / "image.png", "3"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert len(found) == 3
        assert found == sorted(found, reverse=True)
        right += f"(class {known.labels[sample]})" in found[0]
    assert right >= 4, "chance is one in 37"
    (out / "image.png").unlink()

    again = partialfc("export", folder, "--no-onnx", "--centers", "--center-dtype", "float16")
    assert again.returncode == 0, again.stderr
    assert not (out / "backbone.onnx").exists(), "an export is replaced as a whole"
    half = np.load(out / "class_centers.npy", mmap_mode="r")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, centers, atol=1e-3)


def test_the_example_is_eleven_lines_and_the_page_shows_it() -> None:
    code = (Path(export_module.__file__).parent / "nearest.py").read_text()
    body = code[code.index("folder = ") :]
    assert len(body.splitlines()) <= 11
    page = (Path(__file__).parents[2] / "docs" / "export-and-import.md").read_text()
    assert f"```python\n{body}```" in page


def test_an_export_never_replaces_anything_else_and_is_complete_or_absent(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("…")
    with pytest.raises(ConfigError, match="holds something that is not an export"):
        export(trained.parent / "run", tmp_path / "thesis", onnx=False)
    monkeypatch.setattr(export_module, "_TOLERANCE", -1.0)
    with pytest.raises(export_module.ExportFailed, match="differs from the backbone"):
        export(trained.parent / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis"]
    with pytest.raises(DataError, match="cannot be written"):
        export(trained.parent / "run", tmp_path / "thesis" / "chapter1.txt" / "out", onnx=False)
    with pytest.raises(ConfigError, match=r"chapter1\.txt: expected a folder \(Not a directory\)"):
        export(trained.parent / "run", tmp_path / "thesis" / "chapter1.txt", onnx=False)
    with pytest.raises(ConfigError, match="thesis is some other folder; expected the folder of a run"):
        export(tmp_path / "thesis")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_exported(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    save_checkpoint(folder, made().tensors(), {"step": 1, "samples": 7})
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="holds no valid checkpoint"):
        export(tmp_path)


def test_a_merged_checkpoint_holds_every_tensor_unchanged(tmp_path: Path) -> None:
    state = made()
    train_a_little(state)
    save_checkpoint(tmp_path / "step-00000003", state.tensors(), {"step": 3, "samples": 21})
    size = merge(tmp_path / "step-00000003", tmp_path / "all.safetensors")
    assert size == (tmp_path / "all.safetensors").stat().st_size
    found = load_file(tmp_path / "all.safetensors")
    expected = state.tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
    with pytest.raises(ConfigError, match="no tensor whose name begins with 'nothing'"):
        merge(tmp_path / "step-00000003", tmp_path / "none.safetensors", only="nothing")


def test_an_unwritable_output_is_an_error_in_one_line(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-00000003", made().tensors(), {"step": 3, "samples": 21})
    (tmp_path / "file").write_text("in the way")
    done = partialfc("checkpoint", "merge", tmp_path / "step-00000003", tmp_path / "file" / "all.safetensors")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'file' / 'all.safetensors'} cannot be written: ")
    config = parse_config({"run": {"dir": str(tmp_path / "file" / "run")}, "data": {"train": "unused"}})
    with pytest.raises(ConfigError, match=r"run\.dir: .* cannot be written: .*Not a directory"):
        RunFolder(config, 1, 0)


@pytest.mark.parametrize("sub_centers", [None, 3])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_class_centres_of_sub_centers_and_of_bfloat16(
    tmp_path: Path, sub_centers: int | None, weight_dtype: torch.dtype
) -> None:
    loss: Any = losses.ArcFace() if sub_centers is None else losses.SubCenter(losses.ArcFace(), sub_centers)
    head = PartialFC(13, 8, loss, weight_dtype=weight_dtype)
    save_checkpoint(tmp_path / "step-00000003", {"head.weight": head.weight.detach()}, {"step": 3, "samples": 0})
    path = tmp_path / "centers.npy"
    from partialfc.tracking.console import no_progress

    export_module._write_centers(tmp_path / "step-00000003", path, "float32", no_progress)
    found = torch.from_numpy(np.load(path))
    assert found.shape == head.weight.shape
    torch.testing.assert_close(found, torch.nn.functional.normalize(head.weight.detach().float(), dim=-1))


# --- in ---------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, weight: torch.Tensor, world_size: int, kind: str) -> None:
    """Cut and write shards as arcface_torch does."""
    folder.mkdir(exist_ok=True)
    first = 0
    for rank in range(world_size):
        size = len(weight) // world_size + int(rank < len(weight) % world_size)
        rows = weight[first : first + size].clone()
        first += size
        if kind == "softmax_fc":
            torch.save({"weight": rows}, folder / f"softmax_fc_gpu_{rank}.pt")
        elif kind == "softmax_weight":  # before 2022
            torch.save(rows, folder / f"rank_{rank}_softmax_weight.pt")
            torch.save(torch.zeros_like(rows), folder / f"rank_{rank}_softmax_weight_mom.pt")
        else:
            backbone = torch.nn.Linear(2, 2)
            optimizer = torch.optim.SGD([torch.nn.Parameter(rows)], lr=0.1, momentum=0.9)
            content = {
                "epoch": 3,
                "global_step": 700,
                "state_dict_backbone": backbone.state_dict(),
                "state_dict_softmax_fc": {"weight": rows},
                "state_optimizer": optimizer.state_dict(),
                "state_lr_scheduler": {"last_epoch": 700, "_last_lr": [0.1], "base_lrs": [0.1]},
            }
            torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")


def _load_shards(group: Any, folder: Path, classes: int) -> torch.Tensor:
    head = PartialFC(classes, 8, losses.ArcFace(), process_group=group)
    load_head(head, folder)
    return head.weight.detach()


@pytest.mark.parametrize("kind", ["softmax_fc", "softmax_weight", "checkpoint"])
@pytest.mark.parametrize(("classes", "written_on"), [(23, 1), (23, 3), (23, 8), (24, 12), (5, 7)])
def test_a_set_of_any_number_of_ranks_loads_on_any_number(
    ranks: Any, tmp_path: Path, kind: str, classes: int, written_on: int
) -> None:
    weight = torch.randn(classes, 8)
    write_shards(tmp_path / "set", weight, written_on, kind)
    for world_size in (1, 2, 3):
        found = ranks.run(world_size, _load_shards, tmp_path / "set", classes)
        assert torch.equal(torch.cat(found), weight)


def test_incomplete_and_ambiguous_sets_are_refused(tmp_path: Path) -> None:
    weight = torch.randn(23, 8)
    head = PartialFC(23, 8, losses.ArcFace())
    write_shards(tmp_path / "set", weight, 11, "softmax_fc")
    assert [path.name for path in find_shards(tmp_path / "set")][9:] == ["softmax_fc_gpu_9.pt", "softmax_fc_gpu_10.pt"]
    assert find_shards(tmp_path / "set" / "softmax_fc_gpu_3.pt") == find_shards(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"has 23 classes, but data\.train has 40"):
        load_head(PartialFC(40, 8, losses.ArcFace()), tmp_path / "set")
    with pytest.raises(ConfigError, match=r"weights have shape \[8\] per class, but \[6\] in this head"):
        load_head(PartialFC(23, 6, losses.ArcFace()), tmp_path / "set")
    (tmp_path / "set" / "softmax_fc_gpu_4.pt").unlink()
    with pytest.raises(DataError, match="the file of rank 4 is missing, beside 10 others"):
        load_head(head, tmp_path / "set")
    write_shards(tmp_path / "cut", torch.randn(23, 8), 4, "softmax_fc")  # 6, 6, 6, 5
    (tmp_path / "cut" / "softmax_fc_gpu_3.pt").unlink()
    write_shards(tmp_path / "cut", torch.randn(19, 8), 3, "checkpoint")
    with pytest.raises(DataError, match="2 sets; name one file"):
        load_head(head, tmp_path / "cut")
    torch.save({"weight": torch.randn(9, 8)}, tmp_path / "cut" / "softmax_fc_gpu_1.pt")
    with pytest.raises(DataError, match="has 6 classes; of 21 classes over 3 ranks it should have 7"):
        load_head(head, tmp_path / "cut" / "softmax_fc_gpu_0.pt")
    with pytest.raises(DataError, match="found none"):
        load_head(head, tmp_path)
    weight[20, 3] = torch.nan
    write_shards(tmp_path / "nan", weight, 2, "softmax_fc")
    with pytest.raises(DataError, match=r"softmax_fc_gpu_1\.pt: weight holds NaN"):
        load_head(head, tmp_path / "nan")


def test_hostile_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    head = PartialFC(3, 8, losses.ArcFace())
    for content in (pickle.dumps(Hostile(f"touch {tmp_path}/owned")), b"", b"garbage" * 100):
        (tmp_path / "softmax_fc_gpu_0.pt").write_bytes(content)
        with pytest.raises(DataError, match=r"softmax_fc_gpu_0\.pt (is refused|cannot be read)"):
            load_head(head, tmp_path)
    torch.save({"weight": Hostile(f"touch {tmp_path}/owned")}, tmp_path / "softmax_fc_gpu_0.pt")
    with pytest.raises(DataError, match="is refused, since it holds more than tensors"):
        load_head(head, tmp_path)
    for odd in ([1, 2], {1: torch.zeros(3)}, {"state_dict": [1]}, {"state_dict_softmax_fc": 3}):
        torch.save(odd, tmp_path / "softmax_fc_gpu_0.pt")
        with pytest.raises(DataError, match="expected a "):
            load_head(head, tmp_path)
        with pytest.raises((DataError, ConfigError), match=r"expected a dictionary of tensors|does not fit model.name"):
            load_backbone(torch.nn.Linear(2, 2), tmp_path / "softmax_fc_gpu_0.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("form", ["plain", "module", "checkpoint", "safetensors", "legacy"])
def test_a_backbone_loads_from_every_form_of_file(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    make = BY_NAME["iresnet18"]
    torch.manual_seed(1)
    original = make(16, 3, 32)
    state = original.state_dict()
    path = tmp_path / ("backbone.safetensors" if form == "safetensors" else "backbone.pth")
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif form == "legacy":
        torch.save(dict(state), path, _use_new_zipfile_serialization=False)
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()} if form == "module" else dict(state)
        torch.save({"epoch": 1, "state_dict_backbone": wrapped} if form == "checkpoint" else wrapped, path)
    torch.manual_seed(2)
    backbone = make(16, 3, 32)
    load_backbone(backbone, path)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(ConfigError, match=r"fc.weight is \[16, 2048\], and \[16, 8192\] in this backbone"):
        load_backbone(make(16, 3, 64), path)
    with pytest.raises(ConfigError, match=r"lacks layer\d.* and \d+ more"):
        load_backbone(BY_NAME["iresnet34"](16, 3, 32), path)


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_starts_from_imported_weights(tmp_path: Path, ranks: int) -> None:
    task = write_task(tmp_path)
    write_set(tmp_path / "unused", 3, 1, seed=1)
    task["model"] = {"name": "iresnet18", "embedding_dim": 8}
    task["evaluation"] = {"sets": []}
    task["optim"]["epochs"] = 0.5
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(task))
    torch.manual_seed(5)
    backbone = BY_NAME["iresnet18"](8, 1, 16)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    weight = torch.randn(37, 8)
    write_shards(tmp_path / "set", weight, 5, "checkpoint")
    arguments = ("import", "weights", config, "--backbone", tmp_path / "backbone.pth", "--head", tmp_path / "set")
    weight[1, 2] = torch.nan
    write_shards(tmp_path / "broken", weight, 5, "checkpoint")
    broken = partialfc(*arguments[:-1], tmp_path / "broken", ranks=ranks)
    assert broken.returncode != 0
    # On every rank; but torchrun ends the others once the first has said so.
    assert "checkpoint_gpu_0.pt: weight holds NaN or Inf" in broken.stderr
    weight[1, 2] = 0.5
    write_shards(tmp_path / "set", weight, 5, "checkpoint")
    nothing = partialfc("import", "weights", config)
    assert nothing.returncode == 2
    assert "give --backbone, --head or both" in nothing.stderr
    done = partialfc(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "step-00000000 written" in done.stdout
    found = latest_valid(load_config(config).run.dir / "checkpoints")
    assert found is not None
    assert found[1]["step"] == 0
    merge(found[0], tmp_path / "all.safetensors")
    stored = load_file(tmp_path / "all.safetensors")
    assert torch.equal(stored["head.weight"], weight)
    assert torch.equal(stored["backbone.fc.weight"], backbone.fc.weight)
    again = partialfc(*arguments, ranks=ranks)
    assert again.returncode != 0
    assert "already holds checkpoints" in again.stderr
    trained = run(config, 2, "optim.epochs=0.2", "optim.warmup=0.2")
    assert trained.returncode != 0, "another length needs --force"
    trained = run(config, 2)
    assert trained.returncode == 0, trained.stderr
    assert "resuming from step 0" in trained.stdout
    assert "step-00000000" in trained.stdout
