"""The commands and the code of the pages that teach, run as they stand, one after the other, on tiny images."""

import re

import pytest

pytest.importorskip("typer")
timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_pages import ROOT, python_blocks, run_page, shown_commands  # noqa: E402

from peft_surgical.adapters.adapter import read_adapter  # noqa: E402
from peft_surgical.bases import load_base, save_checkpoint  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402

pytestmark = pytest.mark.slow

# What is added to the commands, so that they take seconds and leave an accelerator alone.
ADDED = {
    "tune": ["--epochs", "3", "--cpu"],
    "diagnose": ["--cpu"],
    "score": ["--cpu"],
    "adapt": ["--cpu", "--images", "8"],
}


def write_images(folder, names, count, seed=0):
    """Classes that differ in colour, PNG of 16 pixels."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(80 + 90 * number, 40, (16, 16, 3)).clip(0, 255).astype("uint8")
            PIL.fromarray(pixels).save(folder / name / f"{i + 1:04}.png")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with ``my-network``, a small network of 32 pixels that knows two classes, as working directory."""

    def make(*names):
        overlay = {"input_size": (3, 32, 32), "crop_pct": 1.0}
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=len(names), pretrained_cfg_overlay=overlay)
        save_checkpoint("timm", network, tmp_path / "my-network", label_names=list(names))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def run_commands(page, capsys):
    """Run every command line of a page, and return what each printed."""
    printed = []
    for command, *words in shown_commands(ROOT / page):
        capsys.readouterr()
        code = cli.run([command, *words, *ADDED.get(command, [])])
        out, err = capsys.readouterr()
        assert code == 0, f"{command} {words}: {err[-2000:]}"
        printed.append(out)
    return printed


def test_the_first_page(place, capsys, monkeypatch):
    folder = place("daisy", "rose")
    write_images(folder / "photos", ("daisy", "rose"), 60)
    (folder / "photos/daisy/0001.png").rename(folder / "photos/daisy/0001.jpg")
    (shown,) = run_commands("docs/start.md", capsys)
    assert re.search(r"accuracy +test +[\d.]+ +[\d.]+ to [\d.]+ +60", shown)
    assert "points over the base, 95% interval" in shown
    for left in ("adapter_model.safetensors", "report.json", "figure.png", "mistakes.csv"):
        assert (folder / "site-a" / left).is_file()
    scope = run_page("docs/start.md", folder, monkeypatch)
    assert scope["logits"].shape == (1, 2)
    assert not torch.equal(scope["logits"], scope["before"])
    untouched = load_base("my-network")
    assert torch.equal(scope["before"], untouched.model.eval()(untouched.transform_eval(scope["image"])[None]))


def test_how_to_choose(place, capsys):
    folder = place("cat", "dog")
    write_images(folder / "old-site", ("cat", "dog"), 20)
    write_images(folder / "new-site", ("cat", "dog"), 30, seed=1)
    *_, by_hand = run_commands("docs/choosing.md", capsys)
    assert "block1 + head" in by_hand


def test_a_new_microscope(place, capsys):
    kinds = ("eosinophil", "lymphocyte")
    folder = place(*kinds)
    write_images(folder / "tecom", kinds, 20)
    write_images(folder / "cellavision", kinds, 60, seed=1)
    _, tuned = run_commands("docs/guide-microscope.md", capsys)
    assert (folder / "tecom.safetensors").is_file()
    assert re.search(r"accuracy +source", tuned)


def test_another_camera(place, capsys, monkeypatch):
    folder = place("deer", "fox")
    write_images(folder / "old-camera", ("deer", "fox"), 20)
    for number, part in enumerate(("train", "validation", "test")):
        write_images(folder / "new-camera" / part, ("deer", "fox"), 30, seed=number + 1)
    write_images(folder / "unsorted", ("",), 60, seed=9)
    diagnosed, _, shown, listed, _ = run_commands("docs/guide-camera.md", capsys)
    assert "label_next" in diagnosed
    assert "north" in listed
    assert "block" in shown or "all" in shown
    scope = run_page("docs/guide-camera.md", folder, monkeypatch)
    assert scope["logits"].shape == (3, 2)
    with torch.inference_mode():
        untouched = load_base("my-network").model.eval()(scope["images"])
    assert torch.allclose(scope["logits"][1], untouched[1], atol=1e-5)
    assert not torch.allclose(scope["logits"][0], untouched[0], atol=1e-3)


def test_another_hospital(place, capsys, monkeypatch):
    folder = place("tumour", "normal")
    write_images(folder / "three-hospitals", ("tumour", "normal"), 20)
    for number, part in enumerate(("train", "validation", "test")):
        for patient in ("patient-1", "patient-2"):
            write_images(folder / "hospital-d" / part, (f"tumour/{patient}", f"normal/{patient}"), 15, seed=number)
    saved = ["--source", "three-hospitals", "--save-reference", "three-hospitals.safetensors", "--cpu"]
    assert cli.run(["diagnose", "my-network", "hospital-d", *saved]) == 0
    run_commands("docs/guide-hospital.md", capsys)
    for name in ("d", "e"):
        words = ["--target", "block1", "--output", f"hospital-{name}-adapter", *ADDED["tune"], "--lr", "1e-3"]
        assert cli.run(["tune", "my-network", "hospital-d", "--seed", str(ord(name)), *words]) == 0
    run_page("docs/guide-hospital.md", folder, monkeypatch)
    parents = read_adapter(folder / "both").config.selection["combined"]["parents"]
    assert [parent["weight"] for parent in parents] == [0.6, 0.4]


def test_every_block_of_these_pages_is_a_command_or_python():
    for page in ("start", "choosing", "guide-microscope", "guide-camera", "guide-hospital"):
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"python", ""}
        assert text.count("```python") == len(python_blocks(f"docs/{page}.md"))
