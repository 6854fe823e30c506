"""One's own data from folder to adapter: choosing, new heads, forgetting, resuming, comparing, and what is written."""

import copy
import csv
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from importlib import metadata
from unittest import mock

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("datasets")
pytest.importorskip("typer")

import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical import Anatomy, SurgicalConfig, anatomy_of  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.blocks import Block  # noqa: E402
from peft_surgical.choosing import BlockScores  # noqa: E402
from peft_surgical.choosing.methods import METHODS, HeadFirst, Progress, method_of  # noqa: E402  # noqa: E402
from peft_surgical.errors import AdapterError, ConfigError, DataError, RowsFailedError  # noqa: E402
from peft_surgical.evaluation import Report, accuracy  # noqa: E402
from peft_surgical.evaluation.metrics import judge  # noqa: E402
from peft_surgical.experiment import keeping, running  # noqa: E402
from peft_surgical.experiment.api import compare, tune  # noqa: E402
from peft_surgical.experiment.automatic import parts_of  # noqa: E402
from peft_surgical.experiment.choosing import (  # noqa: E402
    batch_size_for,
    choose,
    plan_of,
    run_grid,
    search,
    uses_rates,
)
from peft_surgical.experiment.comparison import write_compared  # noqa: E402
from peft_surgical.experiment.experiment import Experiment  # noqa: E402
from peft_surgical.experiment.outputs import read_source, write_tuned  # noqa: E402
from peft_surgical.experiment.requests import Bar, Score, Test, Train, key_of, request_of  # noqa: E402
from peft_surgical.experiment.settings import RunSettings  # noqa: E402
from peft_surgical.experiment.subject import NewHeadFirst, modules_of_head, with_new_head  # noqa: E402
from peft_surgical.results import published  # noqa: E402
from peft_surgical.training.auto import AutoSettings  # noqa: E402
from peft_surgical.training.fitting import FitSettings, fit  # noqa: E402
from peft_surgical.training.ledger import Ledger, canonical  # noqa: E402
from peft_surgical.training.progress import DivergedError, Watch, logging_to  # noqa: E402
from peft_surgical.training.search import Candidate, Variant, candidate_of, candidates_of, cross_val  # noqa: E402

NAMES = ("ant", "bee", "cow")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def write_images(root, count, seed=0, names=NAMES):
    """Three classes that a channel's mean tells apart."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(120, 25, (16, 16, 3))
            pixels[..., number] += 60
            PIL.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``model`` and ``other`` (two classes), ``data`` with given parts, ``flat`` to be split, and ``source``."""
    root = tmp_path_factory.mktemp("experiment")
    for name, classes in (("model", NAMES), ("other", ("yes", "no"))):
        torch.manual_seed(1)
        network = timm.create_model(
            "test_resnet", num_classes=len(classes), pretrained_cfg_overlay={"input_size": (3, 32, 32)}
        )
        save_for_hf(network, root / name, model_config={"label_names": classes}, safe_serialization=True)
    for part, count in (("train", 6), ("validation", 4), ("test", 4)):
        write_images(root / "data" / part, count, seed=len(part))
    write_images(root / "flat", 12)
    write_images(root / "source", 5, seed=9)
    return root


def of(place, folder, data="data", model="model", epochs=1, lrs=(1e-2,), head_lrs=(1e-2,), **more):
    fitting = FitSettings(1e-2, epochs=epochs, batch_size=6, **more.pop("fitting", {}))
    return Experiment(str(place / model), str(place / data), folder, fitting, lrs=lrs, head_lrs=head_lrs, **more)


def reopened(folder):
    """As the last lines of `tune` say."""
    report = Report.load(folder / "report.json")
    base = load_base(report.model, **report.settings["open"])
    return PeftModel.from_pretrained(base.model, folder).eval(), report


def measured(experiment, model, report):
    """Accuracy on test by hand, against the report's."""
    rows = experiment.rows("test", 0)
    inputs = torch.stack([rows[i]["pixel_values"] for i in range(len(rows))])
    with torch.no_grad():
        found = accuracy(model(inputs), torch.tensor(rows.labels))
    assert report.find("accuracy", "test").value == found


# --- a new head ---


def anatomy():
    return anatomy_of(timm.create_model("test_resnet", num_classes=3))


def test_a_new_head_trains_alone_and_then_with_the_target():
    blocks = anatomy()
    schedule = with_new_head(method_of("block1")).schedule(blocks, {})
    assert schedule.criterion is None
    alone = schedule.factors(Progress(0, 9))
    assert set(alone) == set(blocks.tensors) - set(blocks["head"].tensors)
    assert set(alone.values()) == {0.0}
    assert schedule.factors(Progress(2, 9)) == alone
    assert schedule.factors(Progress(3, 9)) == {}  # everything at the full rate


def test_a_schedule_sees_the_rest_of_the_run_and_no_score_of_the_new_head():
    gradual = with_new_head(METHODS["gradual-first-last"]).schedule(anatomy(), {})
    assert [gradual.factors(Progress(step, 30))["layer2.0.conv1.weight"] for step in (0, 13, 14, 29)] == [0, 0, 1, 1]
    assert "fc.weight" not in gradual.factors(Progress(29, 30))
    auto = NewHeadFirst(("a", "b"), METHODS["auto-rgn"].schedule(anatomy(), {}))
    assert auto.criterion == "rgn"
    scores = BlockScores("rgn", {"x": 1.0}, {"a": 1.0, "b": 2.0, "head": 8.0}, {"x": 3}, 6, 1)
    assert auto.factors(Progress(0, 9), scores) == {"a": 0.0, "b": 0.0}
    assert auto.factors(Progress(3, 9), scores) == {"a": 0.5, "b": 1.0}
    assert isinstance(with_new_head(METHODS["lp-ft"]).schedule(anatomy(), {"share": 0.5}), HeadFirst)


def test_what_is_saved_whole_is_exactly_the_head():
    network = timm.create_model("test_resnet", num_classes=3)
    assert modules_of_head(network, anatomy_of(network)) == ["fc"]
    network.layer1[0].my_fc = torch.nn.Linear(2, 2)  # PEFT would take it, too
    assert modules_of_head(network, anatomy_of(network)) == []


def test_a_head_of_zeros_is_the_same_with_every_seed(place):
    bases = [load_base(place / "model", label_names=NAMES, head="zero", seed=seed) for seed in (0, 1)]
    assert all(base.head_is_new for base in bases)
    assert all(not base.model.fc.weight.any() and not base.model.fc.bias.any() for base in bases)
    assert all(base.model.conv1.weight.any() if hasattr(base.model.conv1, "weight") else True for base in bases)


# --- tuning ---


def test_a_target_with_two_rates_and_a_source(place, tmp_path):
    run = of(place, tmp_path, lrs=(1e-2, 1e-5), epochs=2)
    choice = choose(run, "block1", 0)
    source = read_source(run, place / "source")
    report = write_tuned(run, choice, 0, source).report
    runs = run.ledger.runs()
    assert [(one.key["method"], one.key["lr"], one.key["seed"]) for one in runs] == [
        ("block1", 1e-2, 0),
        ("block1", 1e-5, 0),
    ]
    assert report.settings["lr"] == max(runs, key=lambda one: one.result["validation"]).key["lr"]
    names = [(one.name, one.dataset, one.n) for one in report]
    kinds = ("accuracy before", "accuracy")
    parts = (("validation", 12), ("test", 12), (f"source {place / 'source'}", 15))
    assert names == [(kind, part, n) for part, n in parts for kind in kinds]
    assert {one.selection for one in report if one.name == "accuracy before"} == {"none"}
    assert "optimistically biased" in report.find("accuracy", "validation").selection
    assert report.find("accuracy", "test").selection == "learning rate and epoch by validation accuracy"
    assert report == Report.load(tmp_path / "report.json")
    model, again = reopened(tmp_path)
    assert again == report
    measured(run, model, report)
    config = SurgicalConfig.from_pretrained(tmp_path)
    assert (config.target, config.base_model_name_or_path) == ("block1", str(place / "model"))
    assert config.selection["learning_rates"] == {
        f"block1 at {one.key['lr']:g}": one.result["validation"] for one in runs
    }
    page = (tmp_path / "README.md").read_text()
    assert "# Surgical adapter: block1" in page
    assert f"| accuracy | test | {100 * report.find('accuracy', 'test').value:.1f} |" in page
    moved = report.settings["moved"]
    assert moved["block1"] > 0
    assert [value for name, value in moved.items() if name != "block1"] == [0.0] * 4
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {
        *ADAPTER,
        "README.md",
        "report.json",
        "figure.png",
        "mistakes.csv",
        "ledger.jsonl",
        ".peft-surgical",
    }


def test_what_moved_by_hand(place, tmp_path):
    run = of(place, tmp_path)
    report = write_tuned(run, choose(run, "block2", 0), 0).report
    base = load_base(place / "model").model.state_dict()
    deltas = load_file(tmp_path / ADAPTER[0])
    names = [name for name in run.anatomy["block2"].tensors if "running" not in name and "num_batches" not in name]
    assert len(names) == len(deltas)
    expected = sum(v.double().square().sum() for v in deltas.values()) ** 0.5
    expected /= sum(base[name].double().square().sum() for name in names) ** 0.5
    assert report.settings["moved"]["block2"] == pytest.approx(float(expected), rel=1e-5)


def test_scores_choose_the_blocks(place, tmp_path):
    run = of(place, tmp_path, data="flat")
    choice = choose(run, "auto-rgn", 0, num_blocks=2)
    scores = run.scores("rgn", 0)
    assert choice.run.key["method"] == " + ".join(scores.contiguous(2))
    assert choice.rule == "blocks by rgn on tuning images; epoch by validation accuracy"
    assert choice.cost == choice.run.result["cost"] + scores.num_batches
    report = write_tuned(run, choice, 0).report
    assert SurgicalConfig.from_pretrained(tmp_path).selection["block_scores"] == dict(scores.block_scores)
    assert [one.dataset for one in report] == ["validation"] * 2
    assert run.data(0).label_names == NAMES
    # As a method it is something else: all tensors, each at its own rate.
    assert METHODS["auto-rgn"].target == "all"


def test_a_solved_head_says_that_validation_images_chose_nothing(place, tmp_path):
    run = of(place, tmp_path, data="flat")
    choice = choose(run, "logistic-head", 0, is_method=True)
    assert choice.rule == "nothing by validation images: the head is solved"


def test_a_stopped_run_leaves_no_report_beside_the_adapter_of_another(place, tmp_path, monkeypatch):
    def tune(target):
        run = of(place, tmp_path)
        return write_tuned(run, choose(run, target, 0), 0).report

    first = tune("block1")
    wanted = (tmp_path / ADAPTER[0]).read_bytes()
    with monkeypatch.context() as stopped:
        stopped.setattr(keeping, "_moved", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tune("block2")
    assert (tmp_path / ADAPTER[0]).read_bytes() != wanted
    assert not (tmp_path / "report.json").exists()  # of block1
    again = tune("block1")
    assert (tmp_path / ADAPTER[0]).read_bytes() == wanted
    assert again.find("accuracy", "test") == first.find("accuracy", "test")


class Counted(Watch):
    def __init__(self):
        self.total, self.told, self.begins, self.failures = 0, [], [], []

    def planned(self, requests, epochs):
        self.total += len(requests)

    def begun(self, request, done, epochs):
        self.begins.append((str(request), done))

    def finished(self, request, result, known):
        self.told.append((str(request), known))

    def failed(self, row, error):
        self.failures.append(row)


def test_auto_takes_the_best_and_trains_it_on_all_labels(place, tmp_path):
    watch = Counted()
    run = of(place, tmp_path, epochs=2, watch=watch, asked=AutoSettings(lrs=(1e-2,)))
    choice = choose(run, "auto", 0)
    keys = [one.key for one in choice.trials]
    solved = [key["how"]["norm_stats"] for key in keys if key["method"] == "logistic-head"]
    assert sorted(solved[:2]) == ["estimated", "frozen"]
    assert {key["method"] for key in keys} == {"none", "logistic-head", *parts_of(run.anatomy)}
    assert {key["lr"] for key in keys} <= {None, 1e-2}
    assert len([known for _, known in watch.told if not known]) == watch.total
    assert (choice.selection["asked"], choice.selection["chosen"]) == ("auto", str(candidate_of(choice.run)))
    assert choice.selection["gain"]["images"] == 12
    assert choice.rule == "auto: target, learning rate and norm statistics by validation images"
    report = write_tuned(run, choice, 0).report
    assert report.target == choice.run.key["method"] != "none"
    assert choice.run.key["how"]["refit"]
    measured(run, reopened(tmp_path)[0], report)
    # The validation images were trained on in the end: what is reported of them is from before.
    found = report.find("accuracy", "validation")
    assert found.value == choice.run.result["validation"]
    assert "measured before the adapter was trained on these images, too" in found.selection
    counts = report.settings["test"]["confusion"]
    assert [sum(row) for row in counts] == [4, 4, 4]
    assert report.settings["test"]["accuracy_of_class"]["bee"] == counts[1][1] / 4
    with (tmp_path / "mistakes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == report.settings["test"]["mistakes"] == 12 - sum(counts[i][i] for i in range(3))
    # The same data, asked for again, trains nothing.
    again = of(place, tmp_path, epochs=2, asked=AutoSettings(lrs=(1e-2,)))
    assert choose(again, "auto", 0) == choice
    assert len(again.found) == len(keys)


def test_training_on_all_labels_takes_as_many_steps_as_without(place, tmp_path):
    run = of(place, tmp_path, epochs=2)  # of 18 images; one of 30 comes nearest
    how = Variant(average=True, refit=True)
    found = run.train(key_of(Train("block1", 1e-2, 0, how=how), run.shared))
    assert len(found["curve"]) == 1


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["block1", "head"], ["block1", "all"]),
        (["block1", "block2", "head"], ["block1", "block2", "all"]),
        (["embedding", "block1", "block2", "head"], ["embedding", "block1", "block2", "all"]),
        (["a", "b", "c", "d", "head"], ["a", "b + c", "d", "all"]),
        (["a", "b", "c", "d", "e", "head"], ["a", "b + c", "d + e", "all"]),
        (["a", "b", "c", "d", "e", "f"], ["a + b", "c + d", "e + f", "all"]),
    ],
)
def test_the_parts_that_auto_compares_are_thirds(names, parts):
    found = Anatomy(tuple(Block(name, (name,), 1) for name in names))
    assert parts_of(found) == parts


def test_auto_keeps_the_norm_policy_that_is_given(place, tmp_path):
    run = of(place, tmp_path, config={"norm_stats": "all"}, asked=AutoSettings(lrs=(1e-2,), policies=("all",)))
    found = search(run, "auto", 0)
    assert {one.key["how"]["norm_stats"] for one in found.trials} == {"all"}


def test_in_auto_a_run_that_diverges_loses(place, tmp_path, monkeypatch):
    def diverging(network, method, *args, **how):
        if method.name == "all":
            raise DivergedError(3)
        return fit(network, method, *args, **how)

    monkeypatch.setattr(running, "fit", diverging)
    run = of(place, tmp_path, asked=AutoSettings(lrs=(1e-2,)))
    found = search(run, "auto", 0)
    lost = [one for one in found.trials if one.result.get("diverged")]
    assert {one.key["method"] for one in lost} == {"all"}
    assert (lost[0].result["score"], lost[0].result["right"]) == (0.0, "0" * 12)
    assert found.chosen.method != "all"


def test_not_to_tune_can_win(place, tmp_path, monkeypatch):
    run = of(place, tmp_path)
    monkeypatch.setattr(running, "fit", lambda *args, **how: pytest.fail("nothing is to be trained"))
    choice = choose(run, "none", 0)
    with published(tmp_path) as stage:
        (stage / ADAPTER[0]).write_bytes(b"of an earlier choice")
    report = write_tuned(run, choice, 0).report
    assert report.target == "none"
    assert report.find("accuracy", "test").value == report.find("accuracy before", "test").value
    assert not (tmp_path / ADAPTER[0]).exists()
    (tmp_path / ADAPTER[0]).write_bytes(b"somebody else's")
    with pytest.raises(ConfigError, match=r"holds adapter_model\.safetensors, which something else has written"):
        write_tuned(run, choice, 0)
    assert (tmp_path / ADAPTER[0]).read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    ("asked", "method", "head"),
    [("block1", False, "saved whole"), ("head", False, "all zeros"), ("auto-rgn", True, "saved whole")],
)
def test_new_classes(place, tmp_path, asked, method, head):
    run = of(place, tmp_path, model="other", epochs=3)
    choice = choose(run, asked, 0, is_method=method)
    report = write_tuned(run, choice, 0).report
    assert head in report.settings["head"]
    config = SurgicalConfig.from_pretrained(tmp_path)
    assert config.modules_to_save == (None if asked == "head" else ["fc"])
    model, _ = reopened(tmp_path)
    assert model.get_base_model().num_classes == 3
    measured(run, model, report)
    if asked != "head":
        assert report.settings["moved"]["block1"] > 0
        assert "head" not in report.settings["moved"]
        assert any(
            name.endswith("fc.weight") and value.shape[0] == 3
            for name, value in load_file(tmp_path / ADAPTER[0]).items()
        )


def test_as_many_classes_of_other_names(place, tmp_path):
    write_images(tmp_path / "data", 5, names=("x", "y", "z"))
    run = of(place, tmp_path / "out", data=tmp_path / "data")
    with pytest.warns(UserWarning, match="The head is new: the data has 3 of 3 classes that"):
        assert run.head_is_new
    write_tuned(run, choose(run, "block1", 0), 0)
    _, report = reopened(tmp_path / "out")  # without the warning
    assert report.settings["open"] == {
        "label_names": ["x", "y", "z"],
        "head": "new",
        "weights": "pretrained",
        "seed": 0,
    }


def test_some_of_the_networks_classes_in_another_order_keep_its_head(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["label_names"] = ["cow", "ant", "bee"]  # what the outputs mean, so that labels 0 and 1 are outputs 1 and 0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_images(tmp_path / "data", 6, names=("Ant", "cow"))
    run = of(place, tmp_path / "out", model=tmp_path / "model", data=tmp_path / "data", reading={"test": 5})
    assert not run.head_is_new
    assert run.shared["outputs"] == [1, 0]
    assert plan_of(run, ["block1"]).splitlines()[-2].startswith("head: kept: the data has 2 of the 3 classes")
    assert "test: 5 images, drawn: seed 0, class-balanced as far as it goes, 2 to 3 per class" in plan_of(
        run, ["block1"]
    )
    assert sorted(set(run.rows("tuning", 0).labels)) == [0, 1]
    row = next(i for i, label in enumerate(run.data(0).tuning["label"]) if label == 0)  # an ant
    assert run.rows("tuning", 0)[row]["labels"] == run.rows("tuning", 0).labels[row] == 1
    write_images(tmp_path / "source", 3, names=("ant", "bee", "cow"))
    report = write_tuned(run, choose(run, "block1", 0), 0, read_source(run, tmp_path / "source", validation=3)).report
    assert report.settings["head"].startswith("kept: the data has 2 of the 3 classes")
    assert report.settings["open"]["head"] == "keep"
    assert report.settings["data_parts"]["test"].endswith("2 to 3 per class of the tuning images")
    # What is taken for a class that the data has not is a mistake like any other.
    looked = report.settings["test"]
    counts = looked["confusion"]
    assert [len(row) for row in counts] == [3, 3]  # ant and cow, as ant, cow, and another class
    assert (counts[0][0] + counts[1][1]) / 5 == report.find("accuracy", "test").value
    assert looked["mistakes"] == 5 - counts[0][0] - counts[1][1]
    with (tmp_path / "out" / "mistakes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows].count("bee") == counts[0][2] + counts[1][2]
    model, _ = reopened(tmp_path / "out")  # without the warning
    assert model.get_base_model().num_classes == 3
    measured(run, model, report)
    # Before: the network as it is, against the outputs that its own config names.
    own = load_base(tmp_path / "model")
    inputs = torch.stack([run.rows("test", 0)[i]["pixel_values"] for i in range(5)])
    names = [("ant", "cow")[label] for label in run.data(0).test["label"]]
    with torch.no_grad():
        right = [own.label_names[i] == name for i, name in zip(own.model(inputs).argmax(1), names, strict=True)]
    assert report.find("accuracy before", "test").value == sum(right) / 5
    source = report.find("accuracy before", f"source {tmp_path / 'source'}")
    assert source.n == 9
    again = of(place, tmp_path / "new", model=tmp_path / "model", data=tmp_path / "data", head="new")
    assert again.head_is_new
    assert again.base(0).classes == 2
    with pytest.raises(ConfigError, match="head='zero': choose one of auto, keep, new"):
        of(place, tmp_path / "no", head="zero")


def test_a_transformers_model(place, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    run = of(place, tmp_path / "out", model=tmp_path / "vit", epochs=3)
    report = write_tuned(run, choose(run, "block2", 0), 0).report
    assert run.head_is_new
    assert SurgicalConfig.from_pretrained(tmp_path / "out").modules_to_save == ["classifier"]
    rows = run.rows("test", 0)
    model, _ = reopened(tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.stack([rows[i]["pixel_values"] for i in range(len(rows))])).logits
    assert report.find("accuracy", "test").value == accuracy(logits, torch.tensor(rows.labels))


def test_a_new_head_that_cannot_be_saved_whole_becomes_deltas_on_zeros(place, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_surgical.experiment.subject.modules_of_head", lambda *args: [])
    run = of(place, tmp_path, model="other", epochs=3)
    report = write_tuned(run, choose(run, "block1", 0), 0).report
    assert "tuned as deltas" in report.settings["head"]
    assert report.settings["open"]["head"] == "zero"
    assert SurgicalConfig.from_pretrained(tmp_path).target == "block1 + head"
    measured(run, reopened(tmp_path)[0], report)


def test_a_race_looks_only_after_a_new_head_has_trained_alone(place, tmp_path, monkeypatch):
    run = of(place, tmp_path, model="other", epochs=15)
    seen = []
    monkeypatch.setattr(
        "peft_surgical.experiment.choosing.race",
        lambda candidates, *args, rungs: seen.append((candidates, rungs)),
    )
    search(run, "race", 0)
    candidates, rungs = seen[0]
    assert rungs == [6 / 15, 7 / 15, 1.0]  # it trains alone for 5 epochs
    assert "none" not in [one.method for one in candidates]


def test_half_precision_on_disk_and_bfloat16_in_training(place, tmp_path):
    run = of(place, tmp_path, config={"delta_dtype": "bfloat16", "norm_stats": "target"}, fitting={"precision": "bf16"})
    report = write_tuned(run, choose(run, "block1", 0), 0).report
    assert {value.dtype for name, value in load_file(tmp_path / ADAPTER[0]).items() if "delta" in name} == {
        torch.bfloat16
    }
    measured(run, reopened(tmp_path)[0], report)
    run = of(place, tmp_path / "b", fitting={"precision": "bf16"})
    measured(run, reopened_after(run)[0], Report.load(tmp_path / "b" / "report.json"))


def reopened_after(run):
    write_tuned(run, choose(run, "block1", 0), 0)
    return reopened(run.folder)


# --- interrupted ---


class Interrupted:
    """`fit`, until it is to be stopped: in the middle of its second call, after one of its epochs."""

    def __init__(self, at):
        self.at, self.calls = at, []

    def __call__(self, network, method, *args, **how):
        self.calls.append((method.name, how["stop_epoch"]))
        if len(self.calls) == self.at:
            fit(network, method, *args, **{**how, "stop_epoch": 1})
            raise KeyboardInterrupt
        return fit(network, method, *args, **how)


def differing(one, other):
    assert (one.model, one.target, one.measurements) == (other.model, other.target, other.measurements)
    assert one.settings.keys() == other.settings.keys()
    return [name for name, value in one.settings.items() if other.settings[name] != value]


def test_an_interrupted_experiment_ends_as_if_it_had_not_been(place, tmp_path, monkeypatch):
    lrs = (1e-2, 1e-3)
    whole = of(place, tmp_path / "whole", lrs=lrs, epochs=2)
    write_tuned(whole, choose(whole, "block1", 0), 0)
    monkeypatch.setattr(running, "fit", Interrupted(at=2))
    run = of(place, tmp_path / "parts", lrs=lrs, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        choose(run, "block1", 0)
    assert len(run.ledger) == 1
    assert any((tmp_path / "parts" / ".peft-surgical" / "checkpoints").rglob("checkpoint-*"))
    again = Interrupted(at=None)
    monkeypatch.setattr(running, "fit", again)
    run = of(place, tmp_path / "parts", lrs=lrs, epochs=2)
    write_tuned(run, choose(run, "block1", 0), 0)
    assert len(again.calls) == 1
    assert run.ledger.runs() == whole.ledger.runs()
    assert all(set(one.notes) == {"seconds", "prefix", "saved"} for one in whole.ledger)
    for name in ADAPTER:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    parts, wholes = (Report.load(tmp_path / name / "report.json") for name in ("parts", "whole"))
    assert set(differing(parts, wholes)) <= {"finished", "seconds", "taken", "runs_from_ledger"}
    assert (parts.settings["runs_from_ledger"], wholes.settings["runs_from_ledger"]) == (1, 0)
    # Once more, nothing is trained: what was written is read.
    run = of(place, tmp_path / "parts", lrs=lrs, epochs=2)
    write_tuned(run, choose(run, "block1", 0), 0)
    assert len(again.calls) == 1
    assert (tmp_path / "parts" / ADAPTER[0]).read_bytes() == (tmp_path / "whole" / ADAPTER[0]).read_bytes()
    # Without the adapter it is trained again.
    (tmp_path / "parts" / "report.json").unlink()
    write_tuned(run, choose(run, "block1", 0), 0)
    assert len(again.calls) == 2
    assert (tmp_path / "parts" / ADAPTER[0]).read_bytes() == (tmp_path / "whole" / ADAPTER[0]).read_bytes()


def test_keys_hold_what_determines_a_run(place, tmp_path):
    base = of(place, tmp_path).shared
    others = [
        of(place, tmp_path, data="flat"),
        of(place, tmp_path, model="other"),
        of(place, tmp_path, epochs=2),
        of(place, tmp_path, augment="flip"),
        of(place, tmp_path, weights="random"),
        of(place, tmp_path, config={"norm_stats": "target"}),
        of(place, tmp_path, fitting={"optimizer": "sgd"}),
        of(place, tmp_path, data="flat", reading={"tuning": 6}),
    ]
    keys = [json.dumps(one.shared, sort_keys=True) for one in others]
    assert len({*keys, json.dumps(base, sort_keys=True)}) == 9
    moved = place / "moved"
    shutil.copytree(place / "data", moved, dirs_exist_ok=True)
    assert of(place, tmp_path, data="moved").shared == base
    # The drawn head of a new base is no part of it: seeds have their own.
    assert of(place, tmp_path, model="other", seed=1).shared["base"] == others[1].shared["base"]


def test_a_run_that_diverges_loses(place, tmp_path):
    run = of(place, tmp_path, lrs=(1e30, 1e-3), fitting={"optimizer": "sgd"})
    choice = choose(run, "block1", 0)
    assert choice.run.key["lr"] == 1e-3
    assert choice.trials[0].result["diverged"]
    alone = of(place, tmp_path, lrs=(1e30,), fitting={"optimizer": "sgd"})
    with pytest.raises(ConfigError, match=r"block1 with learning rate 1e\+30 and seed 0 ended in NaN"):
        choose(alone, "block1", 0)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_run_that_needs_too_much_memory_loses(place, tmp_path, monkeypatch, error, capsys):
    def greedy(network, method, *args, **how):
        if method.name == "all":
            raise error
        return fit(network, method, *args, **how)

    monkeypatch.setattr(running, "fit", greedy)
    run = of(place, tmp_path, watch=Bar())
    candidates = [Candidate("all", 1e-2), Candidate("block1", 1e-2)]
    found = cross_val(candidates, run.train, run.ledger, {**run.shared, "seed": 0}, run.run)
    assert found.chosen.method == "block1"
    record = found.record()
    assert (list(record["validation"]), record["out_of_memory"]) == (["block1 at 0.01"], ["all at 0.01"])
    assert (
        "all at 0.01: needs more memory than there is, and is left out: a smaller batch_size" in capsys.readouterr().err
    )
    with pytest.raises(RowsFailedError) as raised:
        run_grid(run, ["none", "all", "block1"], [0])
    assert list(raised.value.done) == ["none", "block1"]
    message = "all with learning rate 0.01 needs more memory than there is with batches of 6: give batch_size=3 or less"
    assert str(raised.value.failed["all"]) == message
    assert write_compared(run, raised.value.done, [0], raised.value.failed).settings["failed"] == {"all": message}


def test_auto_goes_on_with_what_fits(place, tmp_path, monkeypatch):
    def greedy(network, method, *args, **how):
        if method.name == "all":
            raise torch.OutOfMemoryError
        return fit(network, method, *args, **how)

    def solve(*args, **how):
        raise MemoryError

    monkeypatch.setattr(running, "fit", greedy)
    monkeypatch.setitem(running.SOLVERS, "logistic-head", solve)
    found = search(of(place, tmp_path, asked=AutoSettings(lrs=(1e-2,))), "auto", 0)
    assert {one.key["method"] for one in found.trials if one.result.get("out_of_memory")} == {"all", "logistic-head"}
    assert found.chosen.method not in ("all", "logistic-head")


def test_other_errors_and_those_of_the_base_are_no_lack_of_memory(place, tmp_path, monkeypatch):
    run = of(place, tmp_path)
    for error in (RuntimeError("shapes"), *OUT_OF_MEMORY):
        monkeypatch.setattr(running, "fit", lambda *args, error=error, **how: (_ for _ in ()).throw(error))
        monkeypatch.setattr(run, "logits", lambda *args, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            run.train(run.key("none", None, 0))
        if not running.is_out_of_memory(error):
            with pytest.raises(RuntimeError, match="shapes"):
                run.train(run.key("block1", 1e-2, 0))
        monkeypatch.undo()


def test_a_reloaded_adapter_that_differs_is_an_error(place, tmp_path):
    run = of(place, tmp_path)
    model = load_base(place / "model").model
    other = load_base(place / "model").model
    run.check(model, other, 0)
    with torch.no_grad():
        other.fc.bias[0] += 1e-6
    with pytest.raises(AdapterError, match="does not give the logits of the trained network"):
        run.check(model, other, 0)


# --- comparing ---


def test_compare_over_drawn_splits(place, tmp_path, monkeypatch):
    def few(*args, **how):
        return [one for one in candidates_of(*args, **how) if one.method in {"none", "block1", "head"}]

    monkeypatch.setattr("peft_surgical.experiment.choosing.candidates_of", few)
    run = of(place, tmp_path, data="flat", lrs=(1e-2, 1e-4), reading={"test": 9, "validation": 9})
    rows = run_grid(run, ["none", "block1", "cross-val"], [0, 1])
    assert list(rows) == ["none", "block1", "cross-val"]
    assert run.draws
    assert [one.key["seed"] for one in rows["block1"]] == [0, 1]
    assert len({one.key["lr"] for one in rows["block1"]}) == 1
    tried = run.ledger.runs(method="block1", seed=0)
    best = max(tried, key=lambda one: one.result["validation"])
    assert rows["block1"][0].key["lr"] == best.key["lr"]
    report = write_compared(run, rows, [0, 1])
    assert report == Report.load(tmp_path / "report.json")
    assert [one.name for one in report] == ["accuracy of none", "accuracy of block1", "accuracy of cross-val"]
    assert all((one.interval, one.n, one.seeds) == ("t", 9, (0, 1)) for one in report)
    values = {name: [one.result["test"] for one in found] for name, found in rows.items()}
    assert [one.value for one in report] == pytest.approx([sum(found) / 2 for found in values.values()])
    for name, rank in report.settings["rank"].items():
        ranks = [1 + sum(other[i] > values[name][i] for other in values.values()) for i in (0, 1)]
        assert rank == sum(ranks) / 2
    # The test images were looked at for what is reported alone, and once for each run.
    tested = [one.key["test_of"] for one in run.ledger if "test_of" in one.key]
    reported = [one.key for found in rows.values() for one in found]
    assert all(key in reported for key in tested)
    assert all(tested.count(key) == 1 for key in reported)
    assert not any("test" in one.result for one in run.ledger if "test_of" not in one.key)
    assert len(tried) == 2
    # A search over more chose at least as well on validation, and cost what all its runs cost.
    assert rows["cross-val"][0].result["validation"] >= rows["block1"][0].result["validation"]
    every = [one.result["cost"] for one in run.ledger.runs(seed=0)]
    assert rows["cross-val"][0].result["cost"] == pytest.approx(sum(every))
    taken = [one.notes["seconds"] for one in run.ledger.runs(seed=0)]
    assert rows["cross-val"][0].notes["seconds"] == pytest.approx(sum(taken))
    assert report.settings["taken"]["cross-val"]["seconds"] > report.settings["taken"]["block1"]["seconds"] > 0
    caption = report.settings["caption"]
    assert "9 test images per seed, mean with the 95% interval (Student's t) over the seeds 0, 1" in caption
    assert "A seed changes the split and the training order" in caption
    assert "test images were not used for selection" in caption
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| method | accuracy (%) | 95% interval | rank | cost | seconds | saved | chosen |\n")
    assert caption in table
    assert (tmp_path / "figure.png").is_file()


def test_a_run_whose_adapter_is_gone_is_trained_again_to_be_tested(place, tmp_path):
    both = of(place, tmp_path, lrs=(1e-2, 1e-4))
    (chosen,) = run_grid(both, ["block1"], [0])["block1"]
    both.tidy()  # as every experiment does in the end
    other = next(lr for lr in both.lrs if lr != chosen.key["lr"])
    before = len(both.ledger)
    (asked,) = run_grid(of(place, tmp_path, lrs=(other,)), ["block1"], [0])["block1"]
    assert asked.key["lr"] == other
    assert len(both.ledger) == before + 1  # no second entry of the run itself
    (fresh,) = run_grid(of(place, tmp_path / "fresh", lrs=(other,)), ["block1"], [0])["block1"]
    assert asked.result == fresh.result


def test_compare_on_given_parts_changes_only_the_order(place, tmp_path):
    run = of(place, tmp_path)
    rows = run_grid(run, ["none"], [3])
    report = write_compared(run, rows, [3])
    assert not run.draws
    assert run.data(3) is run.data(0)
    assert report.find("accuracy of none").interval == "wilson"
    assert "A seed changes only the training order" in report.settings["caption"]
    assert report.find("accuracy of none").selection == "none"


def test_compare_without_test_images_says_that_it_is_biased(place, tmp_path):
    run = of(place, tmp_path, data="flat")
    report = write_compared(run, run_grid(run, ["none"], [0]), [0])
    assert "on the very images that are reported, which is optimistically biased" in report.settings["caption"]


def few_candidates(monkeypatch):
    def few(*args, **how):
        return [one for one in candidates_of(*args, **how) if one.method in {"none", "block1", "head"}]

    monkeypatch.setattr("peft_surgical.experiment.choosing.candidates_of", few)


@pytest.mark.parametrize("rows", [["block1", "race", "auto"]])
def test_searches_share_their_runs(place, tmp_path, monkeypatch, rows):
    few_candidates(monkeypatch)
    settings = {"data": "flat", "epochs": 5, "lrs": (1e-2, 1e-4), "reading": {"test": 9, "validation": 9}}
    settings["asked"] = AutoSettings(lrs=(1e-2,))
    monkeypatch.setattr("peft_surgical.experiment.choosing.RUNGS", (0.2, 0.6, 1.0))
    monkeypatch.setattr("peft_surgical.experiment.automatic.parts_of", lambda anatomy: ["block1"])
    shared = of(place, tmp_path / "shared", **settings)
    found = run_grid(shared, rows, [0])
    for name in rows:
        alone = of(place, tmp_path / name, **settings)
        assert run_grid(alone, [name], [0])[name] == found[name]
    assert shared.found == set()  # what one search takes from another was done by this very process


def test_a_killed_run_goes_on_whether_a_search_or_a_row_asks_for_it(place, tmp_path, monkeypatch):
    few_candidates(monkeypatch)
    monkeypatch.setattr(running, "fit", Interrupted(at=1))
    run = of(place, tmp_path, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        run_grid(run, ["block1"], [0])  # leaves a checkpoint of one epoch
    monkeypatch.setattr(running, "fit", fit)
    monkeypatch.setattr("peft_surgical.experiment.choosing.RUNGS", (2 / 3, 1.0))
    run.watch = Counted()
    run_grid(run, ["race"], [0])
    assert ("seed 0, block1 at 0.01", 1.0) in run.watch.begins


def test_rows_that_are_done_are_written_when_another_fails(place, tmp_path, monkeypatch):
    def breaking(network, method, *args, **how):
        if method.name == "block2":
            raise RuntimeError("out of memory")
        return fit(network, method, *args, **how)

    monkeypatch.setattr(running, "fit", breaking)
    run = of(place, tmp_path, watch=Counted())
    with pytest.raises(RowsFailedError, match=r"1 of 3 rows failed: block2: RuntimeError: out of memory") as raised:
        run_grid(run, ["none", "block2", "block1"], [0, 1])
    error = raised.value
    assert list(error.done) == ["none", "block1"]
    assert run.watch.failures == ["block2"]
    report = write_compared(run, error.done, [0, 1], error.failed)
    assert report.settings["failed"] == {"block2": "RuntimeError: out of memory"}
    assert report.settings["caption"].endswith("Missing, since they failed: block2.")
    assert [one.name for one in report] == ["accuracy of none", "accuracy of block1"]
    assert (tmp_path / "figure.png").is_file()
    assert "Missing, since they failed: block2." in (tmp_path / "table.md").read_text()
    # Once it is mended, the same call does what is missing, and nothing else.
    monkeypatch.setattr(running, "fit", Interrupted(at=None))
    again = of(place, tmp_path)
    rows = run_grid(again, ["none", "block2", "block1"], [0, 1])
    assert [name for name, _ in running.fit.calls] == ["block2", "block2"]
    assert rows["block1"] == error.done["block1"]
    write_compared(again, rows, [0, 1])
    assert not (tmp_path / ".peft-surgical" / "runs").exists()


def test_a_search_whose_run_fails_loses_its_own_row_only(place, tmp_path, monkeypatch):
    few_candidates(monkeypatch)

    def breaking(network, method, *args, **how):
        if how["stop_epoch"] is not None:
            raise RuntimeError("out of memory")
        return fit(network, method, *args, **how)

    monkeypatch.setattr(running, "fit", breaking)
    with pytest.raises(RowsFailedError, match=r"1 of 2 rows failed: race: RuntimeError") as raised:
        run_grid(of(place, tmp_path, epochs=5), ["race", "head"], [0])
    assert list(raised.value.done) == ["head"]


def test_what_is_known_is_reported_before_anything_is_trained(place, tmp_path):
    run_grid(of(place, tmp_path), ["block1"], [0])
    run = of(place, tmp_path, watch=Counted())
    told = run.watch.told
    run.watch.planned = lambda requests, epochs: told.append(("planned", [str(one) for one in requests]))
    run_grid(run, ["block1"], [0, 1])
    one, other = "seed 0, block1 at 0.01", "seed 1, block1 at 0.01"
    assert told[:3] == [(one, True), ("planned", [other]), (other, False)]


# --- requests and the plan ---


def test_requests_are_written_as_ledgers_have_them():
    shared = {"model": "m", "epochs": 15}
    run = Train("block1", 0.1, 3)
    for request, key in (
        (run, {"model": "m", "epochs": 15, "seed": 3, "method": "block1", "lr": 0.1}),
        (
            Train("block1", 0.1, 3, stop=0.2),
            {"model": "m", "epochs": 15, "seed": 3, "method": "block1", "lr": 0.1, "stop": 0.2},
        ),
        (Train("none", None, 0), {"model": "m", "epochs": 15, "seed": 0, "method": "none", "lr": None}),
        (Score("rgn", 1), {"model": "m", "epochs": 15, "seed": 1, "method": "scores rgn", "lr": None}),
        (Test(run), {"test_of": {"model": "m", "epochs": 15, "seed": 3, "method": "block1", "lr": 0.1}}),
    ):
        assert json.dumps(key_of(request, shared)) == json.dumps(key)
        assert request_of(key) == request


@pytest.mark.parametrize(
    ("images", "size"), [(5, 8), (120, 8), (140, 8), (241, 16), (256, 16), (481, 32), (960, 32), (961, 64), (9999, 64)]
)
def test_a_batch_size_leaves_a_sensible_number_of_steps(images, size):
    assert batch_size_for(images) == size
    assert -(-images // size) >= 16 or size == 8


def test_the_plan_says_images_batches_steps_and_rates(place, tmp_path):
    run = of(place, tmp_path, epochs=4, lrs=(1e-3, 1e-4), head_lrs=(1e-2,))
    images = "images: 18 to tune on, 12 to choose with, 12 to test on"
    start = f"{images}; batches of 6, 4 epochs: 12 steps for a whole run"
    for asked, rates in (
        ("none", ""),
        ("block1", "; learning rates 0.001, 0.0001"),
        ("head", "; learning rates 0.01 for the head alone"),
        ("race", "; learning rates 0.001, 0.0001 and 0.01 for the head alone"),
        ("auto", "; learning rates between 1e-05 and 0.01"),
    ):
        lines = plan_of(run, [asked]).splitlines()
        assert lines[:2] == ["tuning: 18 images, given", "validation: 12 images, given"]
        assert lines[-2:] == ["head: kept", f"{start}{rates}"]
    assert "none to test on" in plan_of(of(place, tmp_path, data="flat"), ["block1"])
    uses = {
        name: uses_rates(run, [name])
        for name in ("none", "greedy", "race", "auto", "auto-rgn", "head", "linear-probe", "lp-ft")
    }
    assert uses == {
        "none": (False, False),
        "greedy": (True, False),
        "race": (True, True),
        "auto": (True, False),
        "auto-rgn": (True, True),
        "head": (False, True),
        "linear-probe": (False, True),
        "lp-ft": (True, False),
    }
    assert uses_rates(run, ["auto-rgn"], is_method=True) == (True, False)
    assert uses_rates(run, ["none", "head", "greedy"]) == (True, True)


def test_a_report_says_where_when_how_long_and_with_what(place, tmp_path):
    run = of(place, tmp_path)
    settings = write_compared(run, run_grid(run, ["none"], [0]), [0]).settings
    assert settings["data_from"] == str(place / "data")
    assert datetime.fromisoformat(settings["finished"]).tzinfo is not None
    assert settings["seconds"] >= 0
    assert settings["versions"]["python"] == platform.python_version()
    assert settings["versions"]["torch"] == metadata.version("torch")
    assert {"transformers", "peft", "timm", "peft-surgical"} <= set(settings["versions"])
    tuned = write_tuned(run, choose(run, "block1", 0), 0, read_source(run, place / "source")).report.settings
    assert (tuned["data_from"], tuned["source_from"]) == (str(place / "data"), str(place / "source"))


def test_images_of_another_size(place, tmp_path):
    run = of(place, tmp_path, image_size=24)
    report = write_tuned(run, choose(run, "block1", 0), 0).report
    assert run.rows("test", 0)[0]["pixel_values"].shape == (3, 24, 24)
    assert report.settings["image_size"] == report.settings["open"]["image_size"] == 24
    measured(run, reopened(tmp_path)[0], report)
    assert "image_size" not in of(place, tmp_path).shared


# --- errors ---


@pytest.mark.parametrize(
    ("asked", "more", "error", "match"),
    [
        ("blok1", {}, ConfigError, "Near misses: block1.*Methods: full, .*Searches: auto, race"),
        ("block1", {"num_blocks": 2}, ConfigError, "'block1' has none: use auto-rgn, auto-snr, auto-fisher"),
        ("race", {"budget": 0.5}, ConfigError, "'race' has none"),
        ("block1", {"is_method": True}, ConfigError, "'block1' is no method: choose one of full"),
        ("auto-rgn", {"num_blocks": 9}, DataError, "k=9: choose 1 to 5"),
    ],
)
def test_what_cannot_be_chosen(place, tmp_path, asked, more, error, match):
    with pytest.raises(error, match=match):
        choose(of(place, tmp_path), asked, 0, **more)


def test_a_method_takes_its_option(monkeypatch):
    monkeypatch.setattr("peft_surgical.experiment.choosing._best_rate", lambda experiment, asked, *others: asked)
    for name in ("dp-head@4", "l1-sp@0.001", "full"):
        assert choose(None, name, 0, is_method=True) == name
    with pytest.raises(ConfigError, match="'block1@3' is no method"):
        choose(None, "block1@3", 0, is_method=True)


def test_what_cannot_be_compared(place, tmp_path):
    run = of(place, tmp_path)
    with pytest.raises(ConfigError, match="'auto-fisher' names nothing to train by itself"):
        run_grid(run, ["none", "auto-fisher"], [0])
    with pytest.raises(ConfigError, match="give each seed once"):
        run_grid(run, ["none"], [0, 0])
    assert not run.ledger.file.exists()


def test_settings_are_checked_before_anything_is_read(place, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for more, match in (
        ({"config": {"norm_stats": "mine"}}, "norm_stats='mine'"),
        ({"lrs": (0.0,)}, "all must be positive"),
        ({"fitting": {"precision": "fp16"}}, "precision='fp16' needs a GPU"),
    ):
        with pytest.raises(ConfigError, match=match):
            of(place, tmp_path, data="nowhere", **more)


def test_forgetting_needs_the_same_classes(place, tmp_path):
    write_images(tmp_path / "other", 5, names=("x", "y", "z"))
    with pytest.raises(DataError, match="has the classes x, y, z, the network ant, bee, cow"):
        read_source(of(place, tmp_path), tmp_path / "other")
    given = read_source(of(place, tmp_path), place / "data")
    assert (len(given.rows), given.name) == (12, f"source {place / 'data'}, test")


def test_images_stay_in_memory_unless_they_are_augmented(place, tmp_path, monkeypatch):
    run = of(place, tmp_path)
    rows = run.rows("tuning", 0)
    assert rows[0] is rows[0]
    assert run.rows("tuning", 0) is rows
    assert of(place, tmp_path, augment="flip").rows("tuning", 0).keep is False
    monkeypatch.setattr("peft_surgical.experiment.subject._KEPT_BYTES", 10)
    assert rows[1] is not rows[1]


def test_without_matplotlib_there_is_no_figure(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = of(place, tmp_path)
    with pytest.warns(UserWarning, match="no figure: drawing a figure needs matplotlib"):
        write_tuned(run, choose(run, "none", 0), 0)
    assert (tmp_path / "report.json").is_file()


# --- in one call ---


HOW = {"lr": 1e-2, "epochs": 1, "batch_size": 6, "cpu": True}


def test_tune_in_one_call_is_what_the_parts_do(place, tmp_path):
    found = tune(str(place / "model"), place / "data", "block1", source=place / "source", output=tmp_path / "a", **HOW)
    run = of(place, tmp_path / "b", config={"norm_stats": "frozen", "delta_dtype": None})
    parts = write_tuned(run, choose(run, "block1", 0), 0, read_source(run, place / "source"))
    assert found.adapter == found.folder == tmp_path / "a"
    assert found.report.measurements == parts.report.measurements
    assert set(differing(found.report, parts.report)) <= {"finished", "seconds", "taken"}
    assert (found.adapter / ADAPTER[0]).read_bytes() == (parts.adapter / ADAPTER[0]).read_bytes()
    measured(run, found.model, found.report)


def test_compare_in_one_call(place, tmp_path):
    found = compare(place / "model", place / "data", ["none", "block1"], seeds=[0], output=tmp_path, **HOW)
    assert [one.name for one in found.report] == ["accuracy of none", "accuracy of block1"]
    assert [run.key["method"] for runs in found.rows.values() for run in runs] == ["none", "block1"]
    assert (found.folder, found.failed) == (tmp_path, {})
    assert found.report == Report.load(tmp_path / "report.json")


def test_a_network_itself_is_tuned_and_stays_as_it_is(place, tmp_path):
    base = load_base(place / "model")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    names = ["cow", "ant", "bee"]  # what its outputs mean, so that the data's classes are outputs 1, 2 and 0
    bare = tune(
        base.model,
        place / "data",
        "block1",
        transform=base.transform_eval,
        label_names=names,
        output=tmp_path / "a",
        **HOW,
    )
    assert bare.report.settings["outputs"] == [1, 2, 0]
    assert bare.report.model == "ResNet"
    opened = tune(base, place / "data", "head", **HOW)
    assert opened.report.model == str(place / "model")
    assert opened.folder.name.startswith("peft-surgical-")
    assert opened.adapter.is_relative_to(tempfile.gettempdir())
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "a").eval()
    inputs = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(inputs), bare.model(inputs))
        assert not torch.equal(again(inputs), base.model(inputs))


def test_a_base_with_a_new_head_is_tuned_with_it(place):
    base = load_base(place / "other", label_names=NAMES)
    for target, head in (("block1", "saved whole"), ("head", "all zeros")):
        found = tune(base, place / "data", target, **{**HOW, "epochs": 3})
        assert head in found.report.settings["head"]
        assert found.model.get_base_model().num_classes == 3


def test_each_run_has_its_own_run_of_wandb_and_that_of_the_caller_stays_open(monkeypatch):
    class Wandb:
        run = None

    class Run:
        def finish(self):
            Wandb.run = None

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for _ in range(2):
        with logging_to(None):
            assert Wandb.run is None
            Wandb.run = Run()
    assert Wandb.run is None
    Wandb.run = own = Run()
    with logging_to(None):
        pass
    assert Wandb.run is own


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("peft_surgical.experiment.settings.get_available_reporting_integrations", list)
    with pytest.raises(ConfigError, match="report_to='wandb' needs its package: pip install wandb"):
        RunSettings(report_to="wandb")


@pytest.mark.parametrize(
    ("network", "more", "match"),
    [
        (torch.nn.Linear(2, 2), {}, "give transform= .*and label_names="),
        ("model", {"label_names": NAMES}, "transform= and label_names= are for a network itself"),
        (3, {}, "a network is a name, a folder, a Base or an nn.Module, not a int"),
        ("base", {"augment": "flip"}, "augment=, image_size= and weights= say how a network is opened by name"),
        ("base", {"head": "new"}, 'head="new" is for a network that is opened by name'),
        ("stranger", {}, "3 of 3 classes that ResNet does not know.* give the network by its name"),
        ("model", {"target": "head", "method": "full"}, "target='head' and method='full' both say what to tune"),
        ("model", {"scheduler": "linear"}, "scheduler='linear': choose one of constant, cosine"),
        ("model", {"engine": "spark"}, "engine='spark': choose one of local, ray"),
        ("model", {"report_to": "paper"}, "report_to='paper': choose one of .*tensorboard, trackio, wandb"),
        ("model", {"target": "none", "lr": 1.0}, "lr= is not used by none: leave it out"),
    ],
)
def test_what_cannot_be_tuned(place, tmp_path, network, more, match):
    if network == "base":
        network = load_base(place / "model")
    elif network == "stranger":
        base = load_base(place / "other")
        network, more = base.model, {"transform": base.transform_eval, "label_names": ("yes", "no")}
    elif network == "model":
        network = place / "model"
    with pytest.raises(ConfigError, match=match):
        tune(network, place / "data", output=tmp_path, **more)


def test_what_is_reported_is_measured_by_the_judge_of_the_experiment(place, tmp_path):
    asked = []

    def counting(names, scores, labels, groups):
        asked.append((tuple(names), len(labels)))
        return {name: value / 2 for name, value in judge(names, scores, labels, groups).items()}

    run = of(place, tmp_path / "a", judge=counting)
    (halved,) = run_grid(run, ["none"], [0])["none"]
    assert asked == [(("accuracy",), 12)]  # the test images, and no validation images
    plain = of(place, tmp_path / "b")
    (whole,) = run_grid(plain, ["none"], [0])["none"]
    assert halved.key == whole.key
    assert halved.result == {**whole.result, "test": whole.result["test"] / 2}
    report = write_tuned(run, choose(run, "none", 0), 0).report
    assert report.find("accuracy", "test").value == whole.result["test"] / 2


def test_an_experiment_can_be_sent_to_other_processes(place, tmp_path):
    run = of(place, tmp_path, watch=Bar())
    key = run.key("none", None, 0)
    sent = pickle.loads(pickle.dumps(run))
    assert sent.shared == run.shared
    here, there = ({**one.train(key), "seconds": 0} for one in (run, sent))
    assert here == there
    assert type(sent.watch) is Watch


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "tune"])
def test_two_workers_of_a_ray_cluster_carry_out_the_same_runs(place, tmp_path, command):
    ray = pytest.importorskip("ray", reason='needs ray: pip install "peft-surgical[ray]"')
    rows = {"compare": ["--methods", "none", "block1", "cross-val", "--seeds", "0"], "tune": ["--target", "cross-val"]}
    options = [*rows[command], "--epochs", "1", "--test", "6", "--lr", "1e-2", "--head-lr", "1e-2", "--cpu"]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        # Ray gives a task that asks for one core one thread, and sums of two threads round differently.
        cluster = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"}
        for engine in ("local", "ray"):
            line = command_line(place, tmp_path / engine, command, *options, "--engine", engine)
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=900, env=cluster)
            assert done.returncode == 0, done.stderr
    finally:
        ray.shutdown()
    ledgers = [Ledger(tmp_path / engine / "ledger.jsonl") for engine in ("local", "ray")]
    runs = [sorted(ledger, key=lambda run: canonical(run.key)) for ledger in ledgers]
    assert runs[0] == runs[1]  # but for their seconds
    reports = [Report.load(tmp_path / engine / "report.json") for engine in ("local", "ray")]
    assert set(differing(*reports)) <= {"finished", "seconds", "taken"}
    assert reports[1].settings["runs_from_ledger"] == 0


# --- processes ---


def command_line(place, output, *arguments):
    paths = [str(place / "model"), str(place / "flat"), "--output", str(output)]
    return [sys.executable, "-m", "peft_surgical", arguments[0], *paths, *arguments[1:]]


@pytest.mark.slow
def test_tune_from_the_shell(place, tmp_path):
    line = command_line(
        place, tmp_path, "tune", "--target", "block1", "--lr", "1e-2", "1e-3", "--epochs", "2", "--test", "6"
    )
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count(": validation")) == (0, 2), done.stderr  # one for each rate
    lines = done.stdout[done.stdout.index("from peft import") :].replace("(image)", "(PIL.new('RGB', (16, 16)))")
    found = {}
    exec(f"from PIL import Image as PIL\n{lines}", found)
    assert found["logits"].shape == (1, 3)


@pytest.mark.slow
def test_two_processes_share_a_comparison(place, tmp_path):
    options = ["compare", "--methods", "none", "all", "block1", "race", "--seeds", "0", "1", "--epochs", "2"]
    options += ["--lr", "1e-2", "--head-lr", "1e-2", "--test", "6"]
    alone = subprocess.run(command_line(place, tmp_path / "one", *options), capture_output=True, text=True, check=True)
    shared = [
        subprocess.Popen(
            command_line(place, tmp_path / "two", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=600)[0] for process in shared]
    assert [process.returncode for process in shared] == [0, 0]
    assert said[1] == ""
    texts = (said[0].replace(str(tmp_path / "two"), ""), alone.stdout.replace(str(tmp_path / "one"), ""))
    # What was measured in seconds differs, and with it the width of its column.
    together, own = (re.sub(r" \d+\.\d (-|-?\d+%) ", r" seconds \1 ", re.sub(" +", " ", text)) for text in texts)
    assert together == own
    assert together.count("seconds") > 3
    runs = [
        sorted(str((run.key, run.result)) for run in Ledger(tmp_path / name / "ledger.jsonl"))
        for name in ("one", "two")
    ]
    assert runs[0] == runs[1]
    assert (tmp_path / "two" / "ledger.jsonl").read_bytes().count(b"\n") == len(runs[0])  # nothing was done twice
