"""The command adapt, on folders that the tests write and a tiny timm network with random weights."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

typer = pytest.importorskip("typer")
timm = pytest.importorskip("timm")
pytest.importorskip("datasets")

from peft import PeftModel  # noqa: E402

from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.data.incoming import read_incoming  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402
from peft_surgical.evaluation import Report  # noqa: E402
from peft_surgical.experiment import adapting as module  # noqa: E402
from peft_surgical.experiment.adapting import AdaptSettings, numbered_as, open_base  # noqa: E402
from peft_surgical_cli.adapt import adapt_command  # noqa: E402

MODEL = "test_resnet"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six noisy images, three of each of two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
    return folder


@pytest.fixture
def run(capsys):
    app = typer.Typer()
    app.command()(adapt_command)

    def call(*arguments):
        call.code = app(args=[str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_an_online_stream_with_labels(run, photos, tmp_path):
    out = run(MODEL, photos, "--random", "--output", tmp_path, "--lr", "0.05", "--views", 3, "--cpu")
    report = Report.load(tmp_path / "report.json")
    assert (report.target, report.settings["optimizer"], report.settings["images"]) == ("stem", "sgd", 6)
    assert (report.settings["steps"], report.settings["skipped"]) == (6, 0)
    assert [(m.name, m.dataset) for m in report] == [
        ("accuracy before", "stream"),
        ("accuracy", "stream"),
        ("accuracy", "stream, with the saved adapter"),
    ]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for column, metric in (("class", "accuracy"), ("class before", "accuracy before")):
        assert report.find(metric).value == sum(row[column] == row["label"] for row in rows) / 6
    assert {row["file"].split("/")[0]: row["label"] for row in rows} == {"cat": "0", "dog": "1"}
    assert all(row["name"] == ("cat", "dog")[int(row["class"])] for row in rows)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert f"{100 * report.find('accuracy').value:.1f}" in out
    assert "adapter_model.safetensors" in out
    assert f"| accuracy | stream | {100 * report.find('accuracy').value:.1f} |" in (tmp_path / "README.md").read_text()

    base = load_base(report.model, **report.settings["open"])
    model = PeftModel.from_pretrained(base.model, tmp_path)
    moved = [value for name, value in model.named_parameters() if "surgical_delta" in name]
    assert any(value.abs().max() > 0 for value in moved)
    assert {name.split(".surgery")[0].split(".")[-1] for name, _ in model.named_parameters() if "surgery" in name} <= {
        "conv1",
        "bn1",
        *"0123456789",
    }


def test_the_same_command_gives_the_same_predictions(run, photos, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(
            MODEL,
            photos,
            "--random",
            "--output",
            tmp_path / name,
            "--lr",
            "0.05",
            "--views",
            2,
            "--seed",
            seed,
            "--cpu",
        )
        texts.append((tmp_path / name / "predictions.csv").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_without_labels_is_predicted_too(run, photos, tmp_path):
    out = run(
        *(MODEL, photos, "--unlabelled", "--random", "--output", tmp_path, "--lr", "1e-3", "--mode", "episodic"),
        *("--views", 2, "--crop", "resize", "--images", 4, "--target", "head", "--cpu"),
    )
    report = Report.load(tmp_path / "report.json")
    assert report.measurements == ()
    assert (report.settings["images"], report.settings["optimizer"]) == (4, "adamw")
    header, *rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert "label" not in header
    assert [row.split(",")[0] for row in rows] == ["cat/0.png", "cat/2.png", "cat/4.png", "dog/1.png"]
    assert "4 images" in out
    assert not (tmp_path / "adapter_model.safetensors").exists()  # nothing was kept


def test_tent_with_statistics(run, photos, tmp_path):
    run(
        *(MODEL, photos, "--random", "--output", tmp_path, "--method", "tent", "--lr", "1e-2", "--batch-size", 4),
        *("--norm-stats", "all", "--cpu"),
    )
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert (settings["target"], settings["optimizer"], settings["steps"]) == ("norm", "adam", 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert any(name.endswith("running_mean") for name in config["tensor_names"])


def test_what_tent_saves_predicts_as_it_is_reported_to(run, photos, tmp_path):
    """Statistics of the stream belong to the adapter by default, and it is measured as it is when it is loaded."""
    out = run(MODEL, photos, "--random", "--output", tmp_path, "--method", "tent", "--lr", "0.1", "--batch-size", 3)
    report = Report.load(tmp_path / "report.json")
    assert (report.settings["norm_stats"], report.settings["saved"]) == ("all", True)
    base = load_base(report.model, **report.settings["open"])
    model = PeftModel.from_pretrained(base.model, tmp_path).eval()
    assert model.peft_config["default"].norm_stats == "all"
    images = read_incoming(photos)
    with torch.no_grad():
        logits = model(torch.stack([base.transform_eval(images.read(i)) for i in range(len(images))]))
    right = (logits.argmax(1) == images.labels).float().mean().item()
    assert report.find("accuracy", "stream, with the saved adapter").value == pytest.approx(right)
    assert "accuracy, stream, with the saved adapter" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("--method", "tent", "--norm-stats", "frozen"),
            "TENT predicts with the statistics of each batch, which norm_",
        ),
        (
            ("--method", "tent", "--norm-stats", "target", "--target", "head"),
            ".* which norm_stats='target' does not keep for every Bat",
        ),
        (("--prior-strength", 16, "--views", 2), r"with prior_strength \(--prior-strength\) MEMO predicts with statis"),
    ],
)
def test_what_no_adapter_can_hold_is_not_saved(run, photos, tmp_path, arguments, reason):
    run(MODEL, photos, "--random", "--output", tmp_path, "--lr", "1e-3", "--views", 2)
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.warns(UserWarning, match=f"No adapter will be saved: {reason}"):
        out = run(MODEL, photos, "--random", "--output", tmp_path, "--lr", "1e-3", *arguments)
    shown = {file.name for file in tmp_path.iterdir() if not file.name.startswith(".")}
    assert shown == {"predictions.csv", "report.json", "figure.png"}
    report = Report.load(tmp_path / "report.json")
    assert [m.dataset for m in report] == ["stream", "stream"]
    assert not report.settings["saved"]
    assert "adapter_model.safetensors" not in out


def test_a_network_without_batchnorm_can_be_saved_under_any_policy(photos):
    images = read_incoming(photos, limit=2)
    settings = AdaptSettings("tent", "norm", "online", 1e-3, norm_stats="frozen")
    assert module.adapt(open_base("test_vit", images, "random"), images, settings).keeps_statistics


def test_worse_predictions_are_warned_of_and_another_exit_code(run, photos, tmp_path, monkeypatch):
    arguments = (MODEL, photos, "--random", "--output", tmp_path, "--lr", "1e-3", "--views", 2, "--mode", "episodic")
    run(*arguments)
    assert run.code is None

    def spoilt(base, images, *rest):
        adapted = adapt(base, images, *rest)
        right = torch.nn.functional.one_hot(images.labels, 2).float()
        return dataclasses.replace(adapted, before=right, after=1 - right)

    adapt = module.adapt
    monkeypatch.setattr(module, "adapt", spoilt)
    with pytest.warns(UserWarning, match=r"made it worse: 0.0% of the stream is predicted right, without it 100"):
        run(*arguments)
    assert run.code == 3
    assert Report.load(tmp_path / "report.json").settings["worse"] == ["stream"]


def test_a_loss_that_may_be_chance_is_none(photos):
    images = read_incoming(photos)
    before, after = images.labels.clone(), images.labels.clone()
    after[0] = 1 - after[0]
    assert not module._is_worse(before, after, images.labels)
    after[1:4] = 1 - after[1:4]
    assert module._is_worse(before, after, images.labels)
    assert not module._is_worse(after, before, images.labels)


def test_predictions_are_named_by_the_network_where_the_data_has_no_names(run, photos, tmp_path):
    names = ["ant", "bee", "cow"]
    network = timm.create_model(MODEL, num_classes=3)
    timm.models.save_for_hf(network, tmp_path / "base", model_config={"label_names": names}, safe_serialization=True)
    run(tmp_path / "base", photos, "--unlabelled", "--output", tmp_path / "out", "--lr", "1e-3", "--views", 2)
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [names[int(row["class"])] for row in rows]


def test_an_adapter_that_does_not_reload_is_not_passed_over(photos, tmp_path, monkeypatch):
    images = read_incoming(photos, limit=2)
    settings = AdaptSettings("memo", "stem", "online", 0.05, views=2)
    told = []
    adapted = module.adapt(open_base(MODEL, images, "random"), images, settings, tell=lambda *now: told.append(now))
    right = [(logits.argmax(1) == images.labels).float().mean().item() for logits in (adapted.after, adapted.before)]
    assert told == [(2, 2, *right)]
    monkeypatch.setattr(module, "predict_logits", lambda model, inputs: torch.rand(2))
    with pytest.raises(module.AdapterError, match="does not reload"):
        module.write_adapted(tmp_path, MODEL, images, settings, adapted, "random")


def test_a_base_without_a_head_for_the_classes_is_refused(photos, tmp_path):
    timm.models.save_for_hf(timm.create_model(MODEL, num_classes=7), tmp_path, safe_serialization=True)
    with pytest.raises(DataError, match="no head for the 2 classes of the data, and without labels none can be"):
        open_base(str(tmp_path), read_incoming(photos))
    assert open_base(str(tmp_path), read_incoming(photos, unlabelled=True)).classes == 7


def test_labels_are_those_of_the_base(run, photos, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(MODEL, num_classes=3)
    torch.nn.init.normal_(network.get_classifier().weight)
    names = {"label_names": ["dog", "owl", "Cat"]}
    timm.models.save_for_hf(network, tmp_path / "base", model_config=names, safe_serialization=True)
    images = read_incoming(photos, seed=None)
    with pytest.warns(UserWarning, match="The head is kept: the data has 2 of the 3 classes"):
        base = open_base(str(tmp_path / "base"), images)
    assert base.outputs == (2, 0)
    numbered = numbered_as(base, images)
    assert numbered.label_names == ("dog", "owl", "Cat")
    assert numbered.labels.tolist() == [2, 2, 2, 0, 0, 0]
    assert numbered_as(base, read_incoming(photos, unlabelled=True)).labels is None
    out = run(
        tmp_path / "base", photos, "--output", tmp_path / "out", "--lr", "0.01", "--views", 2, "--cpu", "--head", "keep"
    )
    assert "accuracy before" in out
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["name"] == ("dog", "owl", "Cat")[int(row["class"])] for row in rows)
    assert all(int(row["label"]) == {"cat": 2, "dog": 0}[row["file"].split("/")[0]] for row in rows)
    with pytest.raises(ConfigError, match="head='new': adaptation has no labels"):
        open_base(str(tmp_path / "base"), images, head="new")
    # Another name for each class, which only who asks for the head may take for the same.
    classes = images.among((0, 1), ("x", "y"))
    timm.models.save_for_hf(timm.create_model(MODEL, num_classes=2), tmp_path / "two", safe_serialization=True)
    assert numbered_as(open_base(str(tmp_path / "two"), classes), classes).label_names == ("x", "y")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "ttt"}, "method='ttt': choose one of memo, tent"),
        ({"target": "auto-rgn"}, "target='auto-rgn': scores and searches need labels, which a stream has not"),
        ({"mode": "both"}, "mode='both': choose one of online, episodic"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"crop": "centre"}, "crop='centre'"),
        ({"optimizer": "lion"}, "optimizer='lion': choose one of sgd, adam, adamw"),
        ({"method": "tent", "prior_strength": 16.0}, "prior_strength is MEMO's"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        AdaptSettings(**{"method": "memo", "target": "stem", "mode": "online", "lr": 0.1, **changed})
