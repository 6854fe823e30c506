"""Recipes' library: options, plan, one whole study on a tiny network, going on, and what is refused beforehand."""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
evaluate_metrics = pytest.importorskip("peft_surgical.evaluation.evaluate_metrics")

import tiny  # noqa: E402
from peft import PeftModel  # noqa: E402

from paper.parts import Published  # noqa: E402
from paper.protocol import Protocol, as_asked, parser_of, rows_of  # noqa: E402
from paper.study import run_study  # noqa: E402
from peft_surgical.bases import Base  # noqa: E402
from peft_surgical.errors import ConfigError  # noqa: E402
from peft_surgical.evaluation import Report, accuracy, wilson_interval, worst_group_accuracy  # noqa: E402
from peft_surgical.experiment import running  # noqa: E402
from peft_surgical.training.fitting import FitSettings  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402
from peft_surgical.training.progress import DivergedError  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]

PROTOCOL = Protocol(
    name="Tiny birds",
    data=None,
    layouts="nothing",
    model="tiny",
    rows=("block1", "head"),
    lrs=(1e-2, 1e-3),
    head_lrs=(1e-1,),
    fitting=FitSettings(lr=1e-2, epochs=2, batch_size=8, use_cpu=True),
    metrics=("worst_group_accuracy", "accuracy"),
    published={"none": 31.7},
    reference="a paper, Table 0",
)
SIZES = {"source_validation": 10, "tuning": 24, "validation": 20, "test": 40}


def part(size, seed):
    rng = np.random.default_rng(seed)
    label = np.arange(size) % 2
    pixels = rng.integers(0, 100, (size, 8, 8, 3)) + 120 * label[:, None, None, None]
    rows = {
        "image": [PIL.fromarray(p.astype(np.uint8)) for p in pixels],
        "label": label.tolist(),
        "group": (2 * label + np.arange(size) // 2 % 2).tolist(),
        "file": [f"{seed}/{i}.png" for i in range(size)],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
    features = datasets.Features(kinds | {"group": datasets.Value("int64"), "file": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def read(seed):
    parts = {name: part(size, 10 * seed + i) for i, (name, size) in enumerate(SIZES.items())}
    origin = dict.fromkeys(parts, f"drawn: seed {seed}")
    print_ = hashlib.sha256(str(seed).encode()).hexdigest()[:16]
    names = ("dark", "bright"), ("a", "b", "c", "d")
    return Published(
        "tiny",
        None,
        source_test=None,
        **parts,
        label_names=names[0],
        group_names=names[1],
        origin=origin,
        fingerprint=print_,
    )


def transform(image):
    return torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1) / 255 - 0.5


def opener(name, *, seed=0, **how):
    torch.manual_seed(7)
    network = tiny.ConvNet(torch.nn.BatchNorm2d).eval()
    network.fc = torch.nn.Linear(8, 2)
    return Base(network, name, "timm", 2, ("dark", "bright"), transform, transform, head_is_new=False)


def arguments(*words):
    return parser_of(PROTOCOL, "A recipe.").parse_args([*words, "--data", "x", "--cpu"])


def run(*words, protocol=PROTOCOL):
    return run_study(protocol, arguments(*words), read, opener=opener)


def test_a_study_from_end_to_end(tmp_path, monkeypatch):
    measured_by = []

    def counted(name, **settings):
        measured_by.append(name)
        return evaluate_metrics.METRICS[name](**settings)

    monkeypatch.setattr(evaluate_metrics, "metric", counted)
    report = run("--output", str(tmp_path), "--seeds", "0", "1", "--forgetting")
    shown = {p.name for p in tmp_path.iterdir()} - {".peft-surgical"}
    assert shown == {"adapter", "figure.png", "ledger.jsonl", "report.json", "table.md"}
    assert Report.load(tmp_path / "report.json") == report == Report.load(tmp_path / "adapter" / "report.json")

    # What is reported is what the adapter that is kept gives, on a base opened anew.
    kept = report.settings["adapter"]
    assert kept["row"] in ("block1", "head")
    assert kept["seed"] == 0
    model = PeftModel.from_pretrained(opener("tiny").model, tmp_path / "adapter").eval()
    test = read(0).test
    inputs = torch.stack([transform(row["image"]) for row in test])
    labels, groups = (torch.tensor(test[:][name]) for name in ("label", "group"))
    with torch.no_grad():
        logits = model(inputs)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    rate = float(report.settings["chosen"][kept["row"]][0].removeprefix("lr "))
    (own,) = ledger.runs(method=kept["row"], seed=0, lr=rate)
    (tested,) = ledger.runs(test_of=own.key)
    assert tested.result["test"] == worst_group_accuracy(logits, labels, groups)
    assert tested.result["measured"]["accuracy"][0] == accuracy(logits, labels)
    assert len([one for one in ledger if "test_of" in one.key]) == 2 * len(report.settings["chosen"])  # not every rate

    # Every reported number goes through evaluate: two metrics of three rows on two seeds, and two of the source.
    assert measured_by.count("worst_group_accuracy") == 6
    assert measured_by.count("accuracy") == 6 + 2

    # Selection by hand: the rate of block1 on seed 0, the row by its mean over seeds.
    tried = ledger.runs(method="block1", seed=0)
    best = max(tried, key=lambda one: one.result["validation"])
    assert report.settings["chosen"]["block1"] == [f"lr {best.key['lr']:g}"] * 2
    assert len(tried) == 2
    means = {
        row: np.mean(
            [
                ledger.runs(method=row, seed=s, lr=float(chosen.removeprefix("lr ")))[0].result["validation"]
                for s, chosen in enumerate(report.settings["chosen"][row])
            ]
        )
        for row in ("block1", "head")
    }
    assert kept["row"] == max(means, key=means.get)

    assert [m.name for m in report][:2] == ["worst_group_accuracy of none", "accuracy of none"]
    assert report.find("accuracy of none").seeds == (0, 1)
    assert report.find("accuracy", "Tiny birds, source").n == SIZES["source_validation"]
    assert "chosen" in (tmp_path / "table.md").read_text()
    assert "| 31.7 |" in (tmp_path / "table.md").read_text()

    before = (tmp_path / "ledger.jsonl").read_bytes(), (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    assert run("--output", str(tmp_path), "--seeds", "0", "1", "--forgetting") == report
    assert before == (
        (tmp_path / "ledger.jsonl").read_bytes(),
        (tmp_path / "adapter/adapter_model.safetensors").read_bytes(),
    )


def test_the_card_of_the_adapter(tmp_path):
    words = ("--output", str(tmp_path / "birds"), "--seeds", "0", "--target", "head")
    report = run(*words)
    assert not (tmp_path / "birds/adapter/README.md").exists()  # nobody said under which licence
    run(*words, "--license", "apache-2.0")
    card = (tmp_path / "birds/adapter/README.md").read_text()
    assert "license: apache-2.0" in card
    assert "More Information Needed" not in card
    measured = report.find("worst_group_accuracy of head")
    assert f"value: {measured.value}" in card
    assert str(measured.low) in card
    # The two rows that were compared
    for one in (measured, report.find("worst_group_accuracy of none")):
        assert f"{100 * one.value:.1f}" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --license, such as apache-2.0"),
        (("--license", "mit"), "others cannot open 'tiny' by its name"),
    ],
)
def test_a_push_that_could_not_end_well(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run("--output", str(tmp_path), "--push-to-hub", "me/birds", *words)
    assert not list(tmp_path.iterdir())


def test_one_seed_has_the_interval_of_its_images(tmp_path):
    report = run("--output", str(tmp_path), "--seeds", "3", "--target", "head")
    (base,) = (one for one in Ledger(tmp_path / "ledger.jsonl") if one.key.get("test_of", {}).get("method") == "none")
    value, low, high, n = base.result["measured"]["worst_group_accuracy"]
    assert (value, low, high) == wilson_interval(round(value * 10), 10)
    assert n == 10
    found = report.find("worst_group_accuracy of none")
    assert (found.low, found.high, found.n, found.interval) == (low, high, 10, "wilson")


def test_only_none_leaves_no_adapter(tmp_path):
    report = run("--output", str(tmp_path), "--seeds", "0", "--target", "none")
    assert report.target == "none"
    assert not (tmp_path / "adapter").exists()
    assert len(report.measurements) == 2


def test_other_rows_in_the_same_folder_replace_what_was_reported(tmp_path):
    asked = ["--seeds", "0", "--output", str(tmp_path), "--lr", "1e-2"]
    first = run("--target", "block1", *asked)
    second = run("--target", "head", *asked)
    assert [report.settings["adapter"]["row"] for report in (first, second)] == ["block1", "head"]
    assert Report.load(tmp_path / "report.json") == Report.load(tmp_path / "adapter" / "report.json") == second
    tuned = PeftModel.from_pretrained(opener("tiny").model, tmp_path / "adapter")
    assert tuned.peft_config["default"].target == "head"
    with (tmp_path / "report.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"holds report\.json, which something else has written or changed"):
        run("--target", "block1", *asked)


def test_the_effort_reaches_the_search(tmp_path, monkeypatch):
    asked = []

    def stopped(experiment, rows, seeds):
        asked.append(experiment.asked.effort)
        raise KeyboardInterrupt

    monkeypatch.setattr("paper.study.run_grid", stopped)
    for words in ([], ["--effort", "3"]):
        with pytest.raises(KeyboardInterrupt):
            run("--target", "auto", "--seeds", "0", "--output", str(tmp_path), *words)
    assert asked == [1, 3]


def test_plan_trains_nothing(tmp_path, capsys):
    assert (
        run("--output", str(tmp_path / "none"), "--dry-run", "--target", "block1", "auto", "--method", "full") is None
    )
    said = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    # 108 + 8 of the stem, 144 + 4 + 8 of layer1
    assert "block1: 7 tensors, 272 parameters" in said
    assert "rates 0.01, 0.001" in said
    assert "one run: 6 steps (adam, constant rate, batch 8, 2 epochs)" in said
    assert "tuning: 24 images (drawn: seed 0)" in said
    assert "auto: a search over blocks" in said


def test_the_paper_stands_beside_what_it_has_numbers_for(tmp_path):
    protocol = dataclasses.replace(PROTOCOL, published_elsewhere={("tiny", "sgd"): {"none": 40.0}})

    def shown(model, optimizer):
        return dict(as_asked(protocol, argparse.Namespace(model=model, optimizer=optimizer)).published)

    own = protocol.fitting.optimizer
    assert shown("tiny", own) == {"none": 31.7}
    assert shown(str(tmp_path), own) == {"none": 31.7}  # a folder: a copy of the model, as far as can be known
    assert shown("tiny", "sgd") == {"none": 40.0}
    assert shown("large", own) == {}
    assert shown("large", "sgd") == {}


def test_options_say_where_defaults_are_from(capsys):
    with pytest.raises(SystemExit, match="0"):
        parser_of(PROTOCOL, "A recipe.").parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of all processes together; default: 8 (a paper, Table 0)" in said
    assert "--source-checkpoint" not in said  # nothing is trained on a source here
    source = dataclasses.replace(PROTOCOL, data="me/birds")
    assert parser_of(source, "").parse_args([]).data == "me/birds"


def test_rows():
    assert rows_of(PROTOCOL, [], []) == ["none", "block1", "head"]
    assert rows_of(PROTOCOL, ["block2", "none"], ["full", "block2"]) == ["none", "block2", "full"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch-size", "9", "--accumulation", "2"), "--batch-size 9 does not divide .* give a multiple of 2"),
        (("--target", "block9"), "block9"),
        (("--seeds", "0", "0"), "give each seed once"),
    ],
)
def test_refused(words, message, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=message):
        run("--output", str(tmp_path), *words)


def test_forgetting_needs_images_of_the_source(tmp_path, monkeypatch):
    monkeypatch.delitem(SIZES, "source_validation")

    def without(seed):
        return dataclasses.replace(read(seed), source_validation=None)

    monkeypatch.setitem(SIZES, "source_validation", 10)
    with pytest.raises(ConfigError, match="--forgetting: Tiny birds has no held-out images"):
        run_study(PROTOCOL, arguments("--output", str(tmp_path), "--forgetting"), without, opener=opener)
    assert not list(tmp_path.iterdir())


def test_accumulation_is_the_same_batch(tmp_path):
    whole = run("--output", str(tmp_path / "a"), "--seeds", "0", "--target", "block1", "--lr", "1e-2")
    parts = run(
        "--output", str(tmp_path / "b"), "--seeds", "0", "--target", "block1", "--lr", "1e-2", "--accumulation", "2"
    )
    # 24 images: 3 steps of 8 either way, and 20 forward passes, an epoch
    assert whole.settings["batch_size"] == 8
    assert parts.settings["batch_size"] == 4
    assert whole.settings["cost"]["block1"] == pytest.approx(2 * (3 + 20 / 8 / 3))


def _one_of_two(rank, folder, port, place):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    report = run(
        "--output", folder, "--seeds", "0", "--target", "block1", "--method", "gradual-first-last", "--lr", "1e-2"
    )
    with open(place, "w") as file:
        json.dump(None if report is None else report.to_json(), file)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Not of Auto-RGN, whose scores are means over the batches of each process, and so of other batches."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    places = [tmp_path / f"{rank}.json" for rank in range(2)]
    both = [
        context.Process(target=_one_of_two, args=(rank, str(tmp_path / "two"), port, places[rank])) for rank in range(2)
    ]
    try:
        for one in both:
            one.start()
        for one in both:
            one.join(timeout=300)
        assert [one.exitcode for one in both] == [0, 0]
    finally:
        for one in both:
            if one.is_alive():
                one.kill()
    texts = [json.loads(place.read_text()) for place in places]
    assert texts[1] is None  # the first process alone reports
    two = Report.from_json(texts[0])
    words = ("--seeds", "0", "--target", "block1", "--method", "gradual-first-last", "--lr", "1e-2")
    one = run("--output", str(tmp_path / "one"), *words)
    assert two.settings["batch_size"] == 4
    assert one.settings["batch_size"] == 8
    assert [m.value for m in two] == [m.value for m in one]
    assert two.settings["cost"] == pytest.approx(one.settings["cost"])
    ledgers = [Ledger(tmp_path / name / "ledger.jsonl") for name in ("one", "two")]
    curves = [[run.result.get("losses") for run in ledger if "test_of" not in run.key] for ledger in ledgers]
    assert len(curves[0]) == 3
    for single, double in zip(*curves, strict=True):
        assert single == double if single is None else single == pytest.approx(double, abs=1e-5)


def test_what_is_pushed_has_a_base_to_be_found(tmp_path):
    from paper.pretraining import SourceTraining

    protocol = dataclasses.replace(PROTOCOL, source=SourceTraining(PROTOCOL.fitting))
    args = parser_of(protocol, "").parse_args(["--data", "x", "--cpu", "--push-to-hub", "me/birds", "--license", "mit"])
    args.output = str(tmp_path)
    with pytest.raises(ConfigError, match="give its id by --source-checkpoint"):
        run_study(protocol, args, read, opener=opener)


def test_logs_are_kept_where_they_are_asked_for(tmp_path, monkeypatch):
    seen = {}

    def looks(*given, arguments, **how):
        seen[arguments["run_name"]] = os.environ.get("TENSORBOARD_LOGGING_DIR"), arguments["report_to"]
        raise DivergedError(1)

    monkeypatch.setattr(running, "fit", looks)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    words = ("--output", str(tmp_path), "--seeds", "0", "--target", "re:conv1.*|fc.*", "--lr", "1e-2")
    with pytest.raises(ConfigError, match="ended in NaN"):
        run(*words, "--report-to", "tensorboard")
    name = "re:conv1.*|fc.*-lr0.01-seed0"
    assert seen == {name: (str(tmp_path / "logs" / "re_conv1._fc._-lr0.01-seed0"), "tensorboard")}
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
