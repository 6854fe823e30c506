"""Saving is atomic, also under SIGKILL at arbitrary moments, and the page beside an adapter is no template."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tiny import CASES, images, outputs

import peft_surgical  # noqa: F401 (or PEFT would not know the method)
from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterError
from peft_surgical.evaluation import Report, measure
from peft_surgical.tuner import model as tuner_model
from peft_surgical.tuner import plan
from peft_surgical.tuner.saving import PAGE_MARK, write_card

SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from peft import get_peft_model
from tiny import CASES, disturb
from peft_surgical import SurgicalConfig
models = []
for seed, target in enumerate(("block1", "head + block2")):
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target=target))
    disturb(model, seed=seed)
    models.append(model)
print("ready", flush=True)
while True:
    for model in models:
        model.save_pretrained(sys.argv[1])
"""


def test_a_plan_is_made_once_on_saving(tmp_path, monkeypatch):
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target="block1 + head"))
    made, make_plan = [], plan.make_plan

    def counted(*given):
        made.append(given)
        return make_plan(*given)

    for module in (plan, tuner_model):
        monkeypatch.setattr(module, "make_plan", counted)
    model.save_pretrained(tmp_path)
    assert len(made) == 1


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_one_whole_adapter(tmp_path):
    random.seed(0)
    base = CASES["conv+BN"].network()
    folder, seen = tmp_path / "adapter", []
    for _ in range(8):
        arguments = [sys.executable, "-W", "ignore", "-c", SAVER, str(folder), str(Path(__file__).parent)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout.readline() == "ready\n"
            while not (folder / "adapter_config.json").is_file():
                time.sleep(0.01)
            time.sleep(random.uniform(0.05, 0.4))
            os.kill(saver.pid, signal.SIGKILL)
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert torch.isfinite(outputs(model, images())).all()
        seen.append(model.peft_config["default"].target)
    assert set(seen) <= {"block1", "head + block2"}


@pytest.fixture
def model():
    model = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d).eval(), SurgicalConfig(target="block1"))
    tiny.disturb(model)
    return model


def test_a_full_disk_is_an_error_in_words_and_the_old_adapter_stays(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    tiny.disturb(model)
    with pytest.raises(AdapterError, match=r"was not saved to .*No space left on device.*free space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_known_is_said(model, tmp_path):
    model.peft_config["default"].base_model_name_or_path = "timm/resnet18.a1_in1k"
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.base_model) == ("peft", "timm/resnet18.a1_in1k")
    assert card.data.load_with == "import peft_surgical"
    assert "Deltas of `block1` for [`timm/resnet18.a1_in1k`](https://huggingface.co/timm/resnet18.a1_in1k)" in text
    assert "Nothing was measured when this adapter was saved." in text
    assert "More Information Needed" not in text
    scope = {"base": tiny.ConvNet(torch.nn.BatchNorm2d), "folder": tmp_path}
    scope["base"].load_state_dict(model.unload().state_dict())
    exec(text.split("```python\n")[1].split("```")[0], scope)
    assert isinstance(scope["model"], PeftModel)


def test_a_folder_of_this_machine_is_not_named(model, tmp_path):
    (tmp_path / "nets").mkdir()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "nets")
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    assert "for `nets`" in text
    assert str(tmp_path) not in text


def test_numbers_stand_on_it_until_another_adapter_is_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    rows = (measure("accuracy", [0.75], dataset="test", n=40, seeds=[0], selection="none"),)
    write_card(tmp_path, Report("base", "block1", rows))
    assert "| accuracy | test | 75.0 |" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert "75.0" not in (tmp_path / "README.md").read_text()


def test_ones_own_page_stays(model, tmp_path):
    for folder in (tmp_path, tmp_path / "second"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text("Ours.")
    model.add_adapter("second", SurgicalConfig(target="head"))
    model.save_pretrained(tmp_path)
    assert [(folder / "README.md").read_text() for folder in (tmp_path, tmp_path / "second")] == ["Ours.", "Ours."]
    (tmp_path / "README.md").write_text(f"{PAGE_MARK}\nNot ours.")
    (tmp_path / "second/README.md").unlink()
    model.save_pretrained(tmp_path)
    assert "# Surgical adapter: block1" in (tmp_path / "README.md").read_text()
    assert "# Surgical adapter: head" in (tmp_path / "second/README.md").read_text()


def test_a_template_that_somebody_has_begun_to_fill_in_stays(model, tmp_path):
    get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path)
    page = tmp_path / "README.md"
    blank = page.read_text()
    page.write_text(blank.replace("[More Information Needed]", "Ours.", 1))
    model.save_pretrained(tmp_path)
    assert "Ours." in page.read_text()
    page.write_bytes(b"\xff\xfe not UTF-8")
    write_card(tmp_path)
    assert page.read_bytes().startswith(b"\xff\xfe")
    page.write_text(blank)
    model.save_pretrained(tmp_path)
    assert "# Surgical adapter: block1" in page.read_text()


def test_without_an_adapter_the_page_goes(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("Ours.")
    write_card(tmp_path)
    assert (tmp_path / "README.md").exists()


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["default", "second"])
def test_another_method_on_top_does_not_lose_the_surgical_training(model, tmp_path, name, inside):
    below = model if inside else model.base_model.model
    lora = get_peft_model(below, LoraConfig(target_modules=["fc"]), adapter_name=name)
    with pytest.raises(
        AdapterError, match=r"LoraModel is on top of a surgical adapter, .* call merge_and_unload first"
    ):
        lora.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_another_method_on_a_merged_network_is_saved(model, tmp_path):
    lora = get_peft_model(model.merge_and_unload(), LoraConfig(target_modules=["fc"]))
    lora.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_other_methods_keep_pefts_card(tmp_path):
    get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
