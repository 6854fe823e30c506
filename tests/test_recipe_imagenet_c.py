"""The ImageNet-C recipe on miniature folders: one cell here; real processes, a kill and mCE in the slow tier."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for needed in ("timm", "datasets", "PIL", "rich", "matplotlib"):
    pytest.importorskip(needed)

from miniatures import cache_changes_nothing, results_in  # noqa: E402
from peft import PeftModel  # noqa: E402
from scripts import script  # noqa: E402
from test_corruptions import write_cell, write_model  # noqa: E402

from paper.corruptions import CORRUPTIONS, read_imagenet_c  # noqa: E402
from paper.over_corruptions import mean_corruption_error  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.data.labelled import collate, items  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402
from peft_surgical.evaluation import Report, accuracy, predict_logits  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402

RECIPE = Path(__file__).parents[1] / "recipes" / "imagenet_c.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "imagenet_c.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``data`` with two corruptions of 4 classes at severity 5, and ``model``, a network with 4 outputs."""
    root = tmp_path_factory.mktemp("imagenet-c")
    for corruption in ("fog", "frost"):
        write_cell(root / "data", corruption, 5, each=6, size=32)
    write_model(root / "model", label_names=["tench", "goldfish", "shark", "tiger shark"])
    return root


def words(place, output, *more):
    given = ["--data", place / "data", "--model", place / "model", "--output", output, "--cpu", "--batch-size", "4"]
    given += [
        "--epochs",
        "2",
        "--lr",
        "1e-2",
        "--tuning-images",
        "8",
        "--validation-images",
        "8",
        "--test-images",
        "0",
        *more,
    ]
    return [str(word) for word in given]


def logits_of(report, adapter, data):
    """Logits of the adapter on its base, both opened as the report says; and of the base alone."""
    base = load_base(report.model, **report.settings["open"])
    rows = collate(list(items(data.test, base.transform_eval)))
    before = predict_logits(base.model, rows["pixel_values"], 100)
    after = predict_logits(PeftModel.from_pretrained(base.model, adapter).eval(), rows["pixel_values"], 100)
    return before, after, rows["labels"]


def test_one_cell_from_end_to_end(recipe, place, tmp_path, capsys):
    one_cell = words(place, tmp_path, "--corruptions", "fog", "--target", "block1", "--seeds", "0")
    recipe.main(one_cell)
    cell = tmp_path / "fog" / "5"
    assert {p.name for p in tmp_path.iterdir()} == {"fog", "report.json", "table.md", "figure.png"}
    assert {"adapter", "ledger.jsonl", "report.json", "table.md"} <= {p.name for p in cell.iterdir()}

    report, data = Report.load(cell / "report.json"), read_imagenet_c(place / "data", "fog", 5, 0, 8, 8, 0)
    assert report.settings["parts"] == {"tuning": 8, "validation": 8, "test": 8}
    assert report.settings["head"] == "kept"
    before, after, labels = logits_of(report, cell / "adapter", data)
    assert not torch.equal(before, after)
    runs = results_in(cell / "ledger.jsonl")
    assert runs["none"]["test"] == accuracy(before, labels)
    assert runs["block1"]["test"] == accuracy(after, labels)

    summary = Report.load(tmp_path / "report.json")
    assert [(one.name, one.value) for one in summary] == [
        ("accuracy of none", runs["none"]["test"]),
        ("accuracy of block1", runs["block1"]["test"]),
    ]
    table = (tmp_path / "table.md").read_text()
    assert "mCE: not all severities" in table
    assert table in capsys.readouterr().out
    assert "paper (%)" in (cell / "table.md").read_text()
    assert "18.2" not in (cell / "table.md").read_text()  # that is the mean over corruptions

    ledger = (cell / "ledger.jsonl").read_bytes()
    recipe.main(one_cell)
    assert (cell / "ledger.jsonl").read_bytes() == ledger
    assert Report.load(tmp_path / "report.json") == summary


def test_the_plan_trains_nothing_and_reads_no_weights(recipe, place, tmp_path, capsys):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((place / "model" / "config.json").read_text())
    recipe.main(
        words(place, tmp_path / "out", "--corruptions", "fog", "frost", "--dry-run", "--model", tmp_path / "config")
    )
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "tuning: 8 images (drawn: seed 0, 2 of each class of fog, severity 5)" in said
    assert "one run: 4 steps (adam, constant rate, batch 4, 2 epochs)" in said
    assert "cross-val: the one of block1, " in said
    assert "and so for each of 2 corruptions and severities" in said


def test_what_cannot_be_done_is_refused_before_anything_is_trained(recipe, place, tmp_path):
    with pytest.raises(DataError, match="has no folder snow"):
        recipe.main(words(place, tmp_path, "--corruptions", "fog", "snow"))
    with pytest.raises(DataError, match="fog has no folder 1, but 5"):
        recipe.main(words(place, tmp_path, "--corruptions", "fog", "--severities", "5", "1"))
    with pytest.raises(ConfigError, match="--push-to-hub takes one adapter, and 2 corruptions and severities have"):
        recipe.main(words(place, tmp_path, "--corruptions", "fog", "frost", "--push-to-hub", "me/fog"))
    with pytest.raises(ConfigError, match="give --license"):  # and not that nobody could open the network
        recipe.main(words(place, tmp_path, "--corruptions", "fog", "--push-to-hub", "me/fog"))
    six = write_model(tmp_path / "six", classes=6)
    with pytest.raises(DataError, match="six has 6 outputs, and the data has 4 classes"):
        recipe.main(words(place, tmp_path / "out", "--corruptions", "fog", "--model", six, "--dry-run"))
    assert not (tmp_path / "out").exists()


def test_help_names_every_option_and_the_protocol(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        recipe.parse_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--corruptions" in said
    assert "default: resnet50.tv_in1k (reference code, config/imagenet-c.yaml" in said
    assert "NOT measured here" in said
    args = recipe.parse_arguments(["--data", "x"])
    assert tuple(args.corruptions) == CORRUPTIONS
    assert (args.severities, args.epochs, args.lr, args.batch_size) == ([5], 10, (1e-3, 1e-4, 1e-5), 64)
    assert args.output == "outputs/imagenet-c"
    with pytest.raises(SystemExit, match="2"):
        recipe.parse_arguments(["--data", "x", "--corruptions", "rain"])
    assert set(recipe.PROTOCOL.published) == {"none", *recipe.PROTOCOL.rows} - {"auto"}


# Real processes


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launched(*given):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPE)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=600, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_between_cells_and_launched_again(recipe, place, tmp_path):
    more = ("--corruptions", "fog", "frost", "--target", "block1", "head", "--seeds", "0", "1", "--epochs", "4")
    asked = words(place, tmp_path / "killed", *more)
    process = subprocess.Popen([sys.executable, str(RECIPE), *asked], env=environment(), start_new_session=True)
    ledger, end = tmp_path / "killed" / "frost" / "5" / "ledger.jsonl", time.monotonic() + 600
    try:
        while process.poll() is None and time.monotonic() < end and not (ledger.exists() and len(Ledger(ledger)) > 1):
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    before = {name: (tmp_path / "killed" / name / "5" / "ledger.jsonl").read_bytes() for name in ("fog", "frost")}
    assert not (tmp_path / "killed" / "report.json").exists()

    launched(*asked)
    after = {name: (tmp_path / "killed" / name / "5" / "ledger.jsonl").read_bytes() for name in ("fog", "frost")}
    assert after["fog"] == before["fog"]  # nothing was trained again
    assert after["frost"].startswith(before["frost"][: before["frost"].rfind(b"\n") + 1])
    recipe.main(words(place, tmp_path / "whole", *more))
    whole, killed = (Report.load(tmp_path / name / "report.json") for name in ("whole", "killed"))
    assert whole == killed
    for corruption in ("fog", "frost"):
        one, other = (
            tmp_path / name / corruption / "5" / "adapter" / "adapter_model.safetensors" for name in ("whole", "killed")
        )
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_all_75_cells_give_mce(place, tmp_path):
    data = tmp_path / "data"
    for corruption in CORRUPTIONS:
        for severity in range(1, 6):
            write_cell(data, corruption, severity, each=3, size=32)
    more = ("--severities", "1", "2", "3", "4", "5", "--target", "none", "--seeds", "0")
    output = launched(
        *words(place, tmp_path / "out", *more, "--data", data, "--tuning-images", "4", "--validation-images", "4")
    )
    summary = Report.load(tmp_path / "out" / "report.json")
    errors = {}
    for corruption in CORRUPTIONS:
        cells = [Report.load(tmp_path / "out" / corruption / str(s) / "report.json") for s in range(1, 6)]
        errors[corruption] = 1 - sum(cell.find("accuracy of none").value for cell in cells) / 5
    assert summary.find("mCE of none").value == pytest.approx(mean_corruption_error(errors))
    assert "mCE: of 15 corruptions at 5 severities" in output
    assert "| 76.7 |" in output


@pytest.mark.slow
def test_the_cached_prefix_changes_nothing(recipe, place, tmp_path):
    more = ("--corruptions", "fog", "frost", "--severities", "5", "--target", "head", "block4", "--head-lr", "1e-1")
    assert len(cache_changes_nothing(recipe.main, lambda folder: words(place, folder, *more), tmp_path)) == 2
