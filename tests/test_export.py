"""What ONNX Runtime computes with a site's file is what PyTorch computes with its adapter."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import get_peft_model
from tiny import outputs

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.export import export_onnx, run_onnx, session_of
from peft_surgical.errors import AdapterError, BaseMismatchError, DataError

NETWORKS = {"ResNet": tiny.used_batchnorm, "ViT": tiny.vit, "CLIP": tiny.clip}


def adapted(base, folder, target, seed=3, **config):
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, **config))
    tiny.disturb(model, 0.1, seed)
    for name, buffer in model.named_buffers():
        if "surgical_stats" in name and buffer.is_floating_point():
            buffer.add_(0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def base():
    torch.manual_seed(0)
    return tiny.used_batchnorm().eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_one_graph_serves_every_site(kind, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    base = NETWORKS[kind]().eval()
    before = tiny.snapshot(base)
    models = {
        "frost": adapted(base, tmp_path / "frost", "block1", norm_stats="target"),
        "head-b": adapted(base, tmp_path / "head-b", "head", seed=4, modules_to_save=None),
        "part": adapted(base, tmp_path / "part", "block2", seed=5, scale=0.5, delta_dtype="bfloat16"),
    }
    models["part"] = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block2"))
    models["part"] = type(models["part"]).from_pretrained(copy.deepcopy(base), tmp_path / "part").eval()
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    places = {name: tmp_path / name for name in models}
    found = export_onnx(base, places, images[:2], tmp_path / "out", merged=True, label_names=list("abcde"))
    assert tiny.same(tiny.snapshot(base), before)
    assert [row.file for row in found.files] == [
        "base.onnx",
        *(f"sites/{name}.onnx_adapter" for name in models),
        *(f"merged/{name}.onnx" for name in models),
    ]
    assert all(row.difference < 1e-5 for row in found.files)
    session = session_of(tmp_path / "out" / "base.onnx")
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    assert {one.name for one in session.get_overridable_initializers()} == {*found.inputs}
    assert session.get_modelmeta().custom_metadata_map["label_names"] == '["a", "b", "c", "d", "e"]'
    for name, model in {"": base, **models, "frost again": models["frost"]}.items():
        # More images than were traced with, one site after another on one session.
        site = name.removesuffix(" again")
        file = tmp_path / "out" / "sites" / f"{site}.onnx_adapter" if site else None
        logits = run_onnx(session, images, file)
        torch.testing.assert_close(logits, outputs(model, images), rtol=1e-4, atol=1e-5)
        if site:
            alone = session_of(tmp_path / "out" / "merged" / f"{site}.onnx")
            torch.testing.assert_close(run_onnx(alone, images), outputs(model, images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(base, tmp_path, monkeypatch):
    images = tiny.images(2)
    monkeypatch.setattr("peft_surgical.adapters.export.require", lambda *given: None)
    with pytest.raises(AdapterError, match=r"'a/b' names no site: use letters"):
        export_onnx(base, {"a/b": tmp_path}, images, tmp_path / "out")
    with pytest.raises(AdapterError, match="Give an adapter"):
        export_onnx(base, {}, images, tmp_path / "out")
    adapted(base, tmp_path / "site", "head")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(AdapterError, match="is not empty: choose a new folder"):
        export_onnx(base, {"site": tmp_path / "site"}, images, tmp_path / "full")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.fc.bias.add_(1)
    with pytest.raises(BaseMismatchError, match=r"trained on another base .* first fc.bias"):
        export_onnx(other, {"site": tmp_path / "site"}, images, tmp_path / "out")
    whole = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", modules_to_save=["fc"]))
    whole.save_pretrained(tmp_path / "whole")
    other.fc = torch.nn.Linear(8, 7)
    with pytest.raises((BaseMismatchError, AdapterError), match="fc"):
        export_onnx(other, {"whole": tmp_path / "whole"}, images, tmp_path / "out")
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **more: 1 / 0)
    with pytest.raises(AdapterError, match=r"torch.onnx does not export this network \(ZeroDivisionError"):
        export_onnx(base, {"site": tmp_path / "site"}, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_extra_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(DataError, match=r'exporting to ONNX needs onnx: pip install "peft-surgical\[onnx\]"'):
        export_onnx(base, {"site": tmp_path}, tiny.images(2), tmp_path / "out")


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = Path(__file__).parents[1] / "benchmarks" / "onnx_sites.py"
    given = ["--networks", "test_resnet:block1", "--sites", "2", "--batch", "2", "--size", "32", "--rounds", "2"]
    command = [sys.executable, str(file), *given, "--markdown", str(tmp_path / "table.md")]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| network, target | base graph | a site's file | a merged graph | largest difference |"
    assert sum(line.startswith("| test_resnet, block1 |") for line in lines) == 6
