"""The pages' examples run as they stand, from top to bottom, and the options that they show exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hub_server import hub  # noqa: F401 (a fixture)

pytest.importorskip("typer")
timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")

import tiny  # noqa: E402
import typer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402
from peft_surgical_cli.options import TAKEN_FROM_TRANSFORMERS  # noqa: E402

ROOT = Path(__file__).parents[1]
SKILL = ".agents/skills/peft-surgical/SKILL.md"
EXAMPLE = "recipes/surgical_finetuning/README.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]
PAGES += [ROOT / SKILL, ROOT / EXAMPLE]
GUIDES = {"docs/start.md", "docs/guide-camera.md", "docs/guide-hospital.md"}
# By test_hub_commands.py, test_combination.py, test_extract.py, test_recipe_classification.py and test_guides.py.
RUN_ELSEWHERE = {"docs/hub.md", "docs/combining.md", "docs/extract.md", "docs/serving.md", SKILL, EXAMPLE} | GUIDES
RUN_HERE = {"README.md", "docs/adaptation.md", "docs/cli.md", "docs/prefix.md", "docs/selection.md"}
COMMANDS = typer.main.get_command(cli.app).commands


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def write_photos(folder, names, count):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            PIL.new("RGB", (16, 16), (50 * i, 99 * number, 7)).save(folder / name / f"{i:04}.jpg")


def run_page(page, folder, monkeypatch):
    """Run the Python blocks of a page in one scope, in a folder of their own, and return the scope."""
    monkeypatch.chdir(folder)
    scope = {"__name__": "page"}
    for block in python_blocks(page):
        exec(block, scope)
    return scope


def shown_commands(page):
    """The command lines of a page that start this package's program, as lists of words after the program's name."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ *((?:peft-surgical|\S.* -m peft_surgical) .*)", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        yield words[words.index("peft-surgical" if "peft-surgical" in words else "peft_surgical") + 1 :]


def options_of(command):
    return {option for parameter in COMMANDS[command].params for option in parameter.opts} | {"--help"}


def test_the_page_on_prefixes_caches_one(tmp_path, monkeypatch):
    assert run_page("docs/prefix.md", tmp_path, monkeypatch)["cached"].reason == ""


def test_every_page_with_python_is_run():
    found = {str(page.relative_to(ROOT)) for page in PAGES if python_blocks(page)}
    assert found == RUN_HERE | RUN_ELSEWHERE


def test_the_readme_runs(hub, tmp_path, monkeypatch):  # noqa: F811
    save_for_hf(timm.create_model("test_resnet"), tmp_path / "base", safe_serialization=True)
    hub.add("timm/test_resnet.r160_in1k", {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()})
    write_photos(tmp_path / "PHOTOS", ("fog", "frost"), 5)
    scope = run_page("README.md", tmp_path, monkeypatch)
    assert scope["site"].report.target == "block1"
    assert (scope["site"].adapter / "adapter_model.safetensors").is_file()
    assert type(scope["merged"]) is type(timm.create_model("resnet26"))
    assert scope["config"].selection["criterion"] == "rgn"
    assert "adapter_model.safetensors" in hub.repos["me/frost-adapter"].files()
    images = torch.randn(2, 3, 32, 32)
    base = load_base("timm/test_resnet.r160_in1k").model.eval()
    assert torch.equal(tiny.outputs(scope["model"], images), tiny.outputs(base, images))
    assert scope["memo"].record.images == 2


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_the_page_on_selection_runs(tmp_path, monkeypatch):
    scope = run_page("docs/selection.md", tmp_path, monkeypatch)
    assert [entry for entry in scope["trainer"].state.log_history if "surgical_factors" in entry]
    assert scope["pace"].step == len(scope["loader"])
    assert {run.key["method"] for run in Ledger(tmp_path / "runs.jsonl")} == {"none", "all", *scope["anatomy"].names}
    assert 0 <= scope["found"].validation <= 1


def test_the_page_on_adaptation_runs(tmp_path, monkeypatch):
    scope = run_page("docs/adaptation.md", tmp_path, monkeypatch)
    assert (tmp_path / "site-a" / "adapter_model.safetensors").is_file()
    assert scope["logits"].shape == (16, 1000)


def test_the_page_on_the_command_line_runs(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path / "flowers", ("daisy", "rose"), 5)
    monkeypatch.chdir(tmp_path)
    tune = "tune test_resnet flowers --output tuned --target block1 --lr 1e-3 --epochs 1 --random --cpu"
    assert cli.run(tune.split()) == 0, capsys.readouterr().err
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "model.safetensors")
    assert run_page("docs/cli.md", tmp_path, monkeypatch)["logits"].shape == (1, 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_that_a_page_shows_exist(page):
    for command, *words in shown_commands(page):
        assert command in COMMANDS, command
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given <= options_of(command), f"{command} {' '.join(words)}"


def test_command_lines_are_found():
    assert len(list(shown_commands(ROOT / "docs" / "cli.md"))) >= 15
    assert len(list(shown_commands(ROOT / "README.md"))) >= 7


def test_options_that_the_text_on_the_command_line_names_exist():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    named = {option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert {"--target", "--num-blocks", "--source"} <= named
    assert {option.removeprefix("--") for option in named if "_" in option} == {
        option for option in TAKEN_FROM_TRANSFORMERS if "_" in option
    }
    named -= {"--version", *(f"--{option}" for option in TAKEN_FROM_TRANSFORMERS)}
    assert named <= {option for command in COMMANDS for option in options_of(command)}
