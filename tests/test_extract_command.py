"""`peft-surgical extract` from two checkpoints of timm to a folder that opens by its name."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import outputs

pytest.importorskip("typer")
timm = pytest.importorskip("timm")
datasets = pytest.importorskip("datasets")

from PIL import Image  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical.hub import load_adapted  # noqa: E402
from peft_surgical.hub.extracting import extract_to  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402


def network(classes, seed=1, base=None):
    torch.manual_seed(seed)
    overlay = {"input_size": (3, 32, 32)}
    made = timm.create_model("test_resnet", num_classes=classes, pretrained_cfg_overlay=overlay).eval()
    if base is not None:
        own = {name: value for name, value in base.state_dict().items() if not name.startswith("fc.")}
        made.load_state_dict(own, strict=False)
    return made


def saved(made, folder, names=None):
    save_for_hf(
        made, folder, safe_serialization=True, model_args={}, model_config={"label_names": names} if names else {}
    )
    return folder


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def pair(tmp_path):
    """A base, and the same network with its stem and first stage moved."""
    base = network(3)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, tensor in tuned.state_dict().items():
            if not name.startswith(("layer2", "layer3", "layer4", "fc")) and tensor.is_floating_point():
                tensor.mul_(1.5)
    return saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned"), tuned


@pytest.fixture
def images(tmp_path):
    for label, colour in enumerate(["red", "green", "blue"]):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for n in range(8):
            Image.new("RGB", (32, 32), colour).point(lambda v, n=n: v * (n + 4) // 12).save(folder / f"{n}.png")
    return tmp_path / "images"


def test_extract_and_open(run, pair, images, tmp_path):
    base, tuned, moved = pair
    code, out, err = run("extract", base, tuned, "--output", tmp_path / "site", "--data", images, "--cpu")
    assert (code, err) == (0, "")
    for text in ("block1", "exact: loaded from there", "without block1", "none: the base", "Accuracy on 24 tuning and"):
        assert text in out
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(load_adapted(tmp_path / "site"), inputs), outputs(moved, inputs))
    assert (tmp_path / "site" / "README.md").is_file()
    again = run("extract", base, tuned, "--output", tmp_path / "site")
    assert again[0] == 2
    assert "is not empty: choose a new folder" in again[2]


def test_a_home_folder_is_written_to_and_measured(run, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = run("extract", *pair[:2], "--output=~/site")
    assert (code, err) == (0, "")
    assert "exact: loaded from there" in out
    assert (tmp_path / "site" / "adapter_model.safetensors").is_file()


def test_extract_json_and_a_part(run, pair, tmp_path):
    base, tuned, _ = pair
    given = ("--output", tmp_path / "site", "--blocks", "stem", "--delta-dtype", "bfloat16", "--json")
    code, out, err = run("extract", base, tuned, *given)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["target"], found["delta_dtype"], found["exact"]) == ("stem", "bfloat16", False)
    assert found["inexact"]
    assert {name.split(".")[0] for name in found["left_out"]} == {"layer1"}
    assert found["knock_out"] == []


def test_a_head_for_other_classes_is_a_delta_of_zeros(pair, tmp_path):
    base = network(3)
    tuned = network(5, seed=2, base=base)
    found = extract_to(pair[0], saved(tuned, tmp_path / "five"), tmp_path / "site")
    assert found.extraction.exact
    assert found.extraction.adapter.config.target == "head"
    assert found.extraction.blocks[-1].relative is None
    inputs = torch.randn(2, 3, 32, 32)
    opened = load_adapted(tmp_path / "site")
    assert torch.equal(outputs(opened, inputs), outputs(tuned, inputs))
    record = json.loads((tmp_path / "site" / "base.json").read_text(encoding="utf-8"))
    assert (record["head"], record["num_classes"]) == ("zero", 5)


def test_another_architecture_is_refused_by_its_tensors(run, pair, tmp_path):
    torch.manual_seed(0)
    other = saved(timm.create_model("test_vit", num_classes=3), tmp_path / "vit")
    code, _, err = run("extract", pair[0], other, "--output", tmp_path / "site")
    assert code == 2
    assert "The networks differ in more than values: the tuned network lacks" in err
    assert not (tmp_path / "site").exists()


def test_export_without_the_extra_and_with_a_format_that_is_none(run, pair, tmp_path, monkeypatch):
    base, tuned, _ = pair
    assert run("extract", base, tuned, "--output", tmp_path / "site")[0] == 0
    code, _, err = run("export", tmp_path / "site", "--output", tmp_path / "out", "--format", "tflite")
    assert (code, err) == (2, "peft-surgical: --format tflite: choose one of onnx\n")
    code, _, err = run("export", tmp_path / "site", tmp_path / "site", "--output", tmp_path / "out")
    assert (code, "two adapters are called site" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = run("export", tmp_path / "site", "--output", tmp_path / "out")
    assert (code, 'pip install "peft-surgical[onnx]"' in err) == (2, True)


@pytest.mark.slow
def test_export_to_onnx(run, pair, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    base, tuned, moved = pair
    for name, part in (("frost", "stem"), ("fog", "block1")):
        assert run("extract", base, tuned, "--output", tmp_path / name, "--blocks", part)[0] == 0
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", "frost", "fog", "--output", "exported", "--merged")
    assert (code, err) == (0, "")
    assert "sites/fog.onnx_adapter" in out
    assert "merged/frost.onnx" in out
    page = (Path(__file__).parents[1] / "docs" / "extract.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    scope = {"images": torch.randn(3, 3, 32, 32)}
    exec(block, scope)
    torch.testing.assert_close(torch.from_numpy(scope["logits"]), outputs(moved, scope["images"]), rtol=1e-3, atol=1e-4)
