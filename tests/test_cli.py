"""The command line: what it prints, its exit codes, and one clean line for what the user can mend."""

import ast
import dataclasses
import importlib.metadata
import io
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer

timm = pytest.importorskip("timm")

import tiny  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402

import peft_surgical  # noqa: E402
from peft_surgical import SurgicalConfig  # noqa: E402
from peft_surgical.adaptation.streams import COLLAPSE_WINDOW  # noqa: E402
from peft_surgical.adapters.adapter import read_adapter, read_config  # noqa: E402
from peft_surgical.bases.transforms import AUGMENTS  # noqa: E402
from peft_surgical.choosing import BlockScores  # noqa: E402
from peft_surgical.choosing.scores import CRITERIA  # noqa: E402
from peft_surgical.config import DELTA_DTYPES, NormPolicy  # noqa: E402
from peft_surgical.errors import (  # noqa: E402
    AdapterError,
    AdapterFileError,
    ConfigError,
)
from peft_surgical.evaluation import Report, measure  # noqa: E402
from peft_surgical.experiment.api import COMPARED  # noqa: E402
from peft_surgical.experiment.choosing import (  # noqa: E402
    BATCH_SIZES,
    SCORED,
    STEPS_PER_EPOCH,
)
from peft_surgical.experiment.outputs import Tuned  # noqa: E402
from peft_surgical.experiment.requests import Bar, Train  # noqa: E402
from peft_surgical.experiment.settings import (  # noqa: E402
    ENGINES,
    SCHEDULERS,
    RunSettings,
)
from peft_surgical.experiment.subject import SEARCHES  # noqa: E402
from peft_surgical.training.fitting import OPTIMIZERS  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402
from peft_surgical_cli.options import ManyValues, NamesOfTransformers, SharedOptions  # noqa: E402
from peft_surgical_cli.tune import _print as print_tuned  # noqa: E402


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def adapter(folder, network=None, value=2.0, **config):
    network = tiny.ConvNet(torch.nn.BatchNorm2d) if network is None else network
    model = get_peft_model(network, SurgicalConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "surgical_delta" in name:
                parameter.fill_(value)
    model.save_pretrained(folder)
    return folder


# What a folder holds


def summary(*args, **config):
    return read_adapter(adapter(*args, **config)).summary()


def test_summary_by_hand(tmp_path):
    found = summary(tmp_path, target="head", scale=0.5)
    assert (found["target"], found["norm_stats"], found["scale"], found["dtypes"]) == (
        "head",
        "frozen",
        0.5,
        ["float32"],
    )
    norm = pytest.approx(2 * 45**0.5)
    assert found["blocks"] == [{"name": "head", "tensors": 2, "parameters": 45, "norm": norm}]
    assert [(row["name"], row["parameters"]) for row in found["largest"]] == [("fc.weight", 40), ("fc.bias", 5)]
    assert found["largest"][0]["norm"] == pytest.approx(2 * 40**0.5)
    assert (found["tensors"], found["parameters"]) == (2, 45)
    files = [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert found["file_bytes"] == files[0].stat().st_size


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"target": "block1 + head"}, ["conv1", "bn1", "layer1", "fc"]),  # only the base knows the blocks
        ({"target_modules": ["layer1.0", "layer1.1"]}, ["layer1.0", "layer1.1"]),  # as deep as it takes
    ],
)
def test_summary_by_module(tmp_path, config, names):
    found = summary(tmp_path, **config)
    assert [part["name"] for part in found["modules"]] == names
    assert "blocks" not in found


def test_summary_by_the_blocks_of_the_config(tmp_path):
    blocks = {"block1": ["conv1", "bn1", "layer1"], "block2": ["layer2"], "head": ["fc"]}
    found = summary(tmp_path, target="all", blocks=blocks)
    assert [part["name"] for part in found["blocks"]] == ["block1", "block2", "head"]


def test_summary_with_statistics_and_modules_saved_whole(tmp_path):
    found = summary(tmp_path, target="block1", norm_stats="target", modules_to_save=["fc"])
    assert (found["statistics"], found["modules_to_save"], found["tensors"]) == (6, ["fc"], 7)


def test_summary_of_root_parameters_and_half_precision(tmp_path):
    found = summary(tmp_path, tiny.RootTokens(), target=["cls_token", "pos_embed"], delta_dtype="bfloat16")
    assert [part["name"] for part in found["modules"]] == ["cls_token", "pos_embed"]
    assert found["dtypes"] == ["bfloat16"]


def test_a_live_adapter_has_no_file_to_sum_up():
    model = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), SurgicalConfig(target="head"))
    with pytest.raises(AdapterError, match="the adapter 'default' is not on disk: save it"):
        read_adapter(model).summary()


def test_folders_that_are_no_adapter(tmp_path):
    with pytest.raises(AdapterFileError, match=r"nowhere is no folder: pass a folder that save_pretrained wrote"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)
    get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="is a LORA adapter: only surgical ones"):
        read_adapter(tmp_path)
    adapter(tmp_path / "a", target="head")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json cannot be read"):
        read_adapter(tmp_path / "a")


# Commands


def test_show(run, tmp_path):
    adapter(tmp_path, target="head")
    code, out, err = run("show", tmp_path, "--top", 1)
    assert (code, err) == (0, "")
    assert "fc.weight" in out
    assert "fc.bias" not in out
    assert "verified" in out
    assert f"{2 * 45**0.5:.4g}" in out
    assert "largest" not in run("show", tmp_path, "--top", 0)[1]


def test_show_json(run, tmp_path):
    adapter(tmp_path, target="head")
    code, out, _ = run("show", tmp_path, "--json", "--top", 1)
    found = json.loads(out)
    assert code == 0
    assert found["blocks"] == [{"name": "head", "tensors": 2, "parameters": 45, "norm": pytest.approx(2 * 45**0.5)}]
    assert [row["name"] for row in found["largest"]] == ["fc.weight"]
    assert (found["target"], found["scale"], found["norm_stats"]) == ("head", 1.0, "frozen")


def test_show_refuses_an_altered_file(run, tmp_path):
    file = adapter(tmp_path, target="head") / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = run("show", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("peft-surgical: ")
    assert "is not the file that its config was saved with" in err
    assert err.count("\n") == 1


def test_blocks(run):
    code, out, err = run("blocks", "test_vit", "--random", "--num-classes", 7)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    model = timm.create_model("test_vit", num_classes=7)
    rows = {line[0]: line for line in lines if line}
    assert list(rows)[1:-1] == ["embedding", *(f"block{i + 1}" for i in range(len(model.blocks))), "head", "total"]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in rows["total"]
    assert f"{model.head.weight.numel() + 7}" in rows["head"]
    assert out.rstrip().endswith("blocks by timm")


# One's own data: what the commands compute is tested in test_experiment.py


@pytest.fixture
def data(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            image.new("RGB", (16, 16), (50 * i, 99 * number, 7)).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_score(run, data, tmp_path):
    files = (tmp_path / "scores.json", tmp_path / "scores.png")
    code, out, err = run(
        "score", "test_resnet", data, "--random", "--batch-size", 4, "--json", files[0], "--plot", files[1]
    )
    assert (code, err) == (0, "")
    scores = BlockScores.from_json(files[0].read_text())
    assert (scores.criterion, scores.num_samples, scores.num_batches) == ("rgn", 8, 2)
    assert all(name in out for name in ("block1", "block4", "head"))
    assert "The head is new" in out
    assert files[1].read_bytes().startswith(b"\x89PNG")
    again = run("score", "test_resnet", data, "--random", "--batch-size", 4, "--criterion", "snr-reference")[1]
    assert "snr-reference" in again
    assert "choose one of rgn" in run("score", "test_resnet", data, "--criterion", "gnr")[2]


def test_tune_and_compare(run, data, tmp_path):
    how = ("--random", "--epochs", 1, "--batch-size", 8, "--cpu")
    code, out, err = run("tune", "test_resnet", data, "--output", tmp_path / "a", "--target", "head", *how)
    lines = err.splitlines()
    assert code == 0
    assert lines[1] == "validation: 2 images, drawn: seed 0, class-balanced, 1 per class of the tuning images"
    assert lines[2].startswith("head: new: all weights are random")
    assert lines[3] == (
        "images: 8 to tune on, 2 to choose with, none to test on; batches of 8, 1 epoch: 1 steps for a whole run; "
        "learning rates 0.01, 0.001 for the head alone"
    )
    epoch, done = "seed 0, head at 0.01: epoch 1 of 1, validation ", "seed 0, head at 0.01: validation "
    assert [line.startswith(start) for line, start in zip(lines[4:6], (epoch, done), strict=True)] == [True, True]
    assert lines[6] == "head: prefix cached: 100% of a forward pass, all before fc, is computed once"
    assert len(lines) == 9
    assert "validation" in out
    assert "learning rate and epoch by validation accuracy on these images" in out
    assert "load_base(report.model, **report.settings" in out
    assert "The head is new" in out
    assert read_adapter(tmp_path / "a").config.target == "head"
    code, out, err = run(
        "compare", "test_resnet", data, "--methods", "none", "head", "--seeds", "0,1", "--output", tmp_path / "b",
        "--head-lr", "1e-2", "--workers", 1, *how,
    )  # fmt: skip
    assert (code, err.count("\n")) == (
        0,
        4 + 4 + 2 + 1,
    )  # plan, runs, epochs of those that train, what is cached
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[1:3]] == ["none", "head"]
    assert "over the seeds 0, 1" in out
    assert (tmp_path / "b" / "table.md").is_file()


def test_what_tune_says_of_gain_and_classes(capsys, tmp_path):
    found = measure("accuracy", [0.5], dataset="test", n=4, seeds=[0], selection="auto")
    settings = {
        "lr": 1e-3,
        "cost": 10.0,
        "taken": {"seconds": 61.2, "saved": 2.5},
        "head": "kept",
        "selection": {"gain": {"mean": 0.04, "low": -0.04, "high": 0.12, "images": 60}},
        "test": {"accuracy_of_class": {"ant": 1.0, "bee": 0.0, "cow": None}, "confusion": [], "mistakes": 2},
    }
    print_tuned(Tuned(None, Report("m", "block1", (found,), settings), None, tmp_path), str(tmp_path))
    out = capsys.readouterr().out
    assert "all runs together cost 10 training steps in 61 s, of which the cached prefix saved 25%" in " ".join(
        out.split()
    )
    assert "By class, on test images: ant 100 %, bee 0 %. 2 are wrong." in out  # there is no image of a cow
    assert "+4.0 points over the base, 95% interval -4.0 to +12.0" in out
    assert "About 240 validation images would show it." in out


def test_folders_that_hold_other_things_are_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events").write_text("TensorBoard's")
    for command, more in (("tune", ()), ("compare", ()), ("adapt", ("--lr", "0.1"))):
        code, out, err = run(command, "test_resnet", tmp_path / "nowhere", "--output", tmp_path, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{tmp_path} holds runs, which might be overwritten: name a folder that is new or empty" in err
        code, _, err = run(command, "test_resnet", "x", "--output", tmp_path / "runs" / "events", *more)
        assert (code, "no results can be written to" in err, err.count("\n")) == (2, True, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "events"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--seed", "-1"), "seed"),
        (("--seed", 10**20), "--seed 100000000000000000000: give a number from 0 to "),
        (("--lr", "inf"), "all must be positive and finite"),
        (("--lr", "nan"), "all must be positive and finite"),
        (("--weight-decay", "inf"), "--weight-decay inf: give a number from 0 to"),
    ],
)
def test_numbers_that_are_none_to_train_with(run, data, tmp_path, arguments, match):
    how = ("--output", tmp_path / "out", "--target", "block1", "--random", "--cpu")
    code, out, err = run("tune", "test_resnet", data, *how, *arguments)
    assert (code, out) == (2, "")
    assert match in err


def test_what_strangers_wrote_moves_no_cursor(run, tmp_path):
    model = get_peft_model(tiny.used_batchnorm(), SurgicalConfig(target="block1"))
    model.peft_config["default"].base_model_name_or_path = "\x1b]0;owned\x07 a\nb \u202e"
    model.save_pretrained(tmp_path / "a\x1b[2J")
    for command in (("show", tmp_path / "a\x1b[2J"), ("list", tmp_path), ("diff", *[tmp_path / "a\x1b[2J"] * 2)):
        code, out, err = run(*command)
        assert (code, err) == (0, "")
        assert (out.replace("\n", "")).isprintable()
    assert r"\x1b]0;owned\x07 a\nb \u202e" in run("show", tmp_path / "a\x1b[2J")[1]
    assert r"a\x1b[2J" in run("list", tmp_path)[1]
    code, out, err = run("show", tmp_path / "no\x1b[2J\nsuch")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert r"no\x1b[2J\nsuch" in err
    assert run("show", "\udcff")[0] == 2


def test_an_error_of_the_disk_is_one_line(run, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "scores.json")

    monkeypatch.setattr("peft_surgical.adapters.adapter.read_adapter", full)
    assert run("show", tmp_path) == (2, "", "peft-surgical: scores.json: No space left on device\n")


def test_rates_that_are_given_are_used_or_refused(run, data, tmp_path):
    def tune(*options, command="tune"):
        how = ("--random", "--epochs", 1, "--cpu", "--output", tmp_path / "x")
        return run(command, "test_resnet", data, *options, *how)

    code, _, err = tune("--target", "head", "--lr", "0.5,0.25")
    assert code == 0
    assert "batches of 8" in err
    assert "learning rates 0.5, 0.25 for the head alone" in err
    assert "seed 0, head at 0.5: validation" in err
    for options, match in (
        (
            ("--target", "block1", "--head-lr", "1e-2"),
            "--head-lr is for the head tuned alone, which block1 does not do",
        ),
        (("--target", "greedy", "--head-lr", "1e-2"), "which greedy does not do: give --lr"),
        (("--head-lr", "1e-2"), "--head-lr is for the head tuned alone, which auto does not do: give --lr"),
        (("--method", "linear-probe", "--lr", "1", "--head-lr", "1"), "--head-lr says at which rate: leave --lr out"),
        (("--target", "none", "--lr", "1"), "--lr is not used by none: leave it out"),
    ):
        assert match in tune(*options)[2], options
    code, _, err = tune("--methods", "none", "all", "--seeds", "0", "--head-lr", "1", command="compare")
    assert (code, "which none, all does not do: give --lr" in err) == (2, True)
    # There auto-rgn is the method, which never tunes the head alone.
    _, _, err = tune("--methods", "auto-rgn", "--seeds", "0", "--head-lr", "1", command="compare")
    assert "which auto-rgn does not do: give --lr" in err


def test_compare_writes_the_rows_that_are_done(run, data, tmp_path, monkeypatch):
    from peft_surgical.experiment import running

    def breaking(network, method, *args, **how):
        if method.name == "block1":
            raise RuntimeError("out of memory")
        return fit(network, method, *args, **how)

    fit = running.fit
    monkeypatch.setattr(running, "fit", breaking)
    place = tmp_path / "out"
    line = ("compare", "test_resnet", data, "--output", place, "--random", "--epochs", 1, "--seeds", 0, "--cpu")
    code, out, err = run(*line, "--methods", "none", "block1", "head", "--lr", "1e-2")
    assert code == 2
    assert [row.split()[0] for row in out.splitlines()[1:3]] == ["none", "head"]
    assert "Missing, since they failed: block1." in out
    assert "Traceback" in err
    assert err.endswith("peft-surgical: 1 of 3 rows failed: block1: RuntimeError: out of memory\n")
    assert (place / "table.md").is_file()
    code, out, err = run(*line, "--methods", "block1", "--lr", "1e-2")
    assert (code, out) == (2, "")
    assert "1 of 1 rows failed" in err


def test_progress_in_lines(capsys):
    bar = Bar()
    rung, whole = Train("block1", 0.1, 0, stop=0.5), Train("block1", 0.1, 0)
    bar.planned([rung, Train("none", None, 0)], 4)
    bar.begun(rung, 1.0, 4)
    bar.step(rung, 1.5, 4)
    bar.epoch(rung, 2, 4, {"validation": 0.5, "loss": 1.23456})
    bar.finished(rung, {"validation": 0.5, "cost": 9.0}, known=False)
    bar.finished(Train("none", None, 0), {"validation": 0.25, "cost": 0.0}, known=True)
    bar.planned([whole], 4)
    bar.begun(whole, 2.0, 4)  # this process has come so far itself: no news
    assert (bar.total, bar.done) == (3.0, 1.0)  # epochs 2, 3 and 4; of these 2
    bar.finished(whole, {"validation": 0.5, "cost": 18.0}, known=False)
    assert bar.done == 3.0
    bar.failed("race", ConfigError("no such thing"))
    assert capsys.readouterr().err.splitlines() == [
        "seed 0, block1 at 0.1: goes on after epoch 1 of 4",
        "seed 0, block1 at 0.1: epoch 2 of 4, validation 50.0 %, loss 1.23",
        "seed 0, block1 at 0.1 after 50% of the run: validation 50.0 %, cost 9",
        "seed 0, none: validation 25.0 %, cost 0 (in the ledger)",
        "seed 0, block1 at 0.1: validation 50.0 %, cost 18",
        "race: failed: no such thing",
    ]


def test_progress_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    bar = Bar()
    bar.out = bar.progress.live.console = Console(file=io.StringIO(), force_terminal=True, width=150)
    run = Train("block1", 0.1, 0)
    bar.progress.disable = False
    bar.planned([run], 10)
    bar.begun(run, 0.0, 10)
    bar.epoch(run, 3, 10, {"validation": 0.5, "loss": 0.25})
    bar.step(run, 3.5, 10)
    bar.out.print(bar.progress.get_renderable())
    text = bar.out.file.getvalue()
    assert "4/10 epochs" in text
    assert "left:" in text
    assert "seed 0, block1 at 0.1: epoch 3 of 10, validation 50.0 %, loss 0.25" in text
    assert text.count("epoch 3") == 1  # in the bar, and in no line of its own


def test_ctrl_c_says_how_to_go_on(run, data, tmp_path, monkeypatch):
    def stopped(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_surgical.experiment.running.fit", stopped)
    line = ("tune", "test_resnet", data, "--output", tmp_path / "a", "--target", "block1", "--random", "--epochs", 1)
    code, out, err = run(*line)
    assert (code, out) == (130, "")
    assert err.endswith("stopped; the same command goes on from here\n")


def test_several_values_of_one_option():
    app, seen = typer.Typer(), []

    @app.command(cls=ManyValues)
    def take(
        place: str,
        lr: list[float] = typer.Option([]),  # noqa: B008
        name: str = "",
        flag: bool = False,
        word: list[str] = typer.Option([]),  # noqa: B008
    ):
        seen.append(word if word else (place, lr, name, flag))

    for line, found in (
        ("here --lr 1 2e-1", ("here", [1.0, 0.2], "", False)),
        ("here --lr 1 --lr -2 3 --flag", ("here", [1.0, -2.0, 3.0], "", True)),
        ("--lr 1 2 --name x here", ("here", [1.0, 2.0], "x", False)),
        ("here --lr=1 --name --lr", ("here", [1.0], "--lr", False)),
        ("here --lr 1e-3,1e-4", ("here", [1e-3, 1e-4], "", False)),
        ("--lr 1,2, 3 --name a,b here", ("here", [1.0, 2.0, 3.0], "a,b", False)),
        ("here --lr=1,2 --flag", ("here", [1.0, 2.0], "", True)),
    ):
        app(args=line.split(), standalone_mode=False)
        assert seen.pop() == found, line
    app(args=["here", "--word", "re:a{1,2}", "b"], standalone_mode=False)
    assert seen.pop() == ["re:a{1,2}", "b"]  # a comma in a pattern is its own


def test_tune_takes_the_options_of_transformers_script():
    app, seen = typer.Typer(), []

    @app.command(cls=NamesOfTransformers)
    def take(
        model: str,
        data: str,
        output: str = "",
        lr: list[float] = typer.Option([]),  # noqa: B008
        cpu: bool = typer.Option(False, "--cpu"),
        precision: str = "",
        push: str = "",
        report_to: str = "",
    ):
        seen.append([model, data, output, lr, cpu, precision, push, report_to])

    def taken(line):
        app(args=line.split(), standalone_mode=False)
        return seen.pop()

    plain = taken("vit flowers --output out --lr 1e-3")
    assert taken("--model_name_or_path vit --train_dir flowers --output_dir out --learning_rate 1e-3") == plain
    assert taken("--dataset_name=flowers --output_dir=out --model_name_or_path=vit --learning_rate=1e-3") == plain
    flags = "--do_train --do_eval True --ignore_mismatched_sizes --report_to none --bf16 False"
    assert taken(f"vit flowers --output out {flags} --learning_rate 1e-3") == plain
    assert taken("vit flowers --bf16 --use_cpu --push_to_hub --hub_model_id me/site --report_to wandb") == [
        *("vit", "flowers", "", [], True, "bf16", "me/site", "wandb")
    ]
    for line, message in (
        ("vit flowers --push_to_hub", "--hub_model_id OWNER/NAME"),
        ("vit --train_dir flowers", "--model_name_or_path and --train_dir both"),
        ("vit flowers --output_dir", "--output_dir: give it a value"),
    ):
        with pytest.raises(Exception, match=re.escape(message)):
            taken(line)


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["blocks", "resnet5O"], "unknown base 'resnet5O'"),
        (["show", "nowhere"], "'nowhere': it is neither a folder here nor owner/name on the Hub"),
        (["show"], "Missing argument"),
        (["show", "x", "--top", "many"], "Invalid value for '--top'"),
        (["tunee"], "No such command 'tunee'"),
        (["blocks", "x", "--verbose"], "No such option: --verbose"),
        (["tune", "x", "y"], "Missing option '--output'"),
        (["tune", "x", "y", "--output", "z", "--target", "head", "--method", "full"], "give one of them"),
        (["tune", "x", "y", "--output", "z", "--scheduler", "linear"], "--scheduler linear: choose one of constant"),
        (["compare", "x", "y", "--output", "z", "--engine", "spark"], "--engine spark: choose one of local, ray"),
        (["tune", "x", "y", "--output", "z", "--images", "many"], "'many': give a number of images"),
        (["tune", "x", "nowhere", "--output", "z"], "nowhere does not exist"),
        (["compare", "x", "y", "--output", "z", "--seeds", "one"], "Invalid value for '--seeds'"),
    ],
)
def test_what_the_user_can_mend(run, arguments, match):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert match in err
    assert err.startswith("peft-surgical: ")
    assert err.count("\n") == 1


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("blocks", "score", "tune", "compare", "show"))
    code, out, _ = run("show", "--help")
    assert code == 0
    assert "--top" in out
    assert run() == run("--help")


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        *((command, "--optimizer", OPTIMIZERS) for command in ("tune", "compare", "adapt")),
        *((command, "--scheduler", SCHEDULERS) for command in ("tune", "compare")),
        *((command, "--engine", ENGINES) for command in ("tune", "compare")),
        *((command, "--augment", AUGMENTS) for command in ("tune", "compare")),
        *((command, "--norm-stats", get_args(NormPolicy)) for command in ("tune", "compare")),
        ("adapt", "--norm-stats", [name for name in get_args(NormPolicy) if name != "estimated"]),
        *(
            (command, "--delta-dtype", [name for name in DELTA_DTYPES if name != "float32"])
            for command in ("tune", "compare")
        ),
        ("score", "--criterion", CRITERIA),
        ("adapt", "--mode", ("online", "episodic")),
        ("adapt", "--method", ("memo", "tent")),
        *(
            (command, "--batch-size", (*map(str, BATCH_SIZES), f"{STEPS_PER_EPOCH} steps"))
            for command in ("tune", "compare")
        ),
        ("tune", "--target", (*SEARCHES, *SCORED, "each third of the network")),
        ("compare", "--methods", (*SEARCHES, *COMPARED)),
        ("adapt", "--reset-on-collapse", (f"{COLLAPSE_WINDOW} predictions",)),
    ],
)
def test_the_help_names_the_choices_that_the_code_has(command, option, choices):
    parameters = typer.main.get_command(cli.app).commands[command].params
    said = next(f"{one.help} {one.show_default}" for one in parameters if option in one.opts)
    missing = [choice for choice in choices if not re.search(rf"\b{re.escape(choice)}\b", said)]
    assert missing == [], said


def test_the_shared_options_are_the_settings_of_the_functions():
    given = SharedOptions().settings()
    assert RunSettings(**given) == RunSettings()
    assert {field.name for field in dataclasses.fields(RunSettings)} - set(given) == {"transform", "label_names"}
    for name in ("tune", "compare"):
        options = [one.name for one in typer.main.get_command(cli.app).commands[name].params]
        assert set(options) >= {field.name for field in dataclasses.fields(SharedOptions)}


IN_A_PROCESS = """
import sys
import time

from peft_surgical_cli.app import run

for line in sys.argv[2:]:
    if run(line.split()):
        sys.exit(f"{line} fails")
heavy = {"torch", "peft", "transformers", "accelerate", "timm", "datasets", "peft_surgical"} & set(sys.modules)
with open(sys.argv[1], "w") as file:
    file.write(f"{time.process_time()} {' '.join(heavy)}")
"""


def in_a_process(file, *lines):
    """Run command lines in a process of their own: CPU seconds, heavy libraries imported, output."""
    command = [sys.executable, "-c", IN_A_PROCESS, str(file), *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, *heavy = file.read_text().split()
    return float(seconds), heavy, done.stdout


def test_help_version_and_list_import_no_heavy_library(tmp_path):
    commands = [info.name for info in cli.app.registered_commands]
    assert len(commands) == 16
    (tmp_path / "adapters").mkdir()
    adapter(tmp_path / "adapters" / "frost", target="head")
    lines = ["--help", "--version", f"list {tmp_path}", *(f"{command} --help" for command in commands)]
    _, heavy, out = in_a_process(tmp_path / "found", *lines)
    assert heavy == []
    assert importlib.metadata.version("peft-surgical") in out.splitlines()
    assert str(tmp_path / "adapters" / "frost") in out
    assert "--head-lr" in out


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "--version", "list", "tune --help"])
def test_help_version_and_list_take_under_a_second(tmp_path, line):
    assert statistics.median(in_a_process(tmp_path / "found", line)[0] for _ in range(5)) < 1


def test_interrupt_and_faults(run, monkeypatch):
    def raising(error):
        app = typer.Typer()

        @app.command()
        def fail(word: str):
            raise error

        return app

    monkeypatch.setattr(cli, "app", raising(KeyboardInterrupt()))
    assert run("x")[0] == 130
    monkeypatch.setattr(cli, "app", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("x")


def test_warnings_are_one_line(run, monkeypatch):
    app = typer.Typer()

    @app.command()
    def warn(word: str):
        import warnings

        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)

    monkeypatch.setattr(cli, "app", app)
    assert run("x") == (0, "", "peft-surgical: warning: mind the gap\n")


def test_only_the_commands_import_extras_where_they_start():
    folder = Path(peft_surgical.__file__).parent
    for file in folder.glob("*.py"):
        imported = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
        extras = imported & {"timm", "datasets", "PIL", "matplotlib", "torchvision"}
        # `metrics` holds subclasses of evaluate.Metric, so there is no later time: it says what to install
        allowed = {"metrics.py": {"datasets"}}.get(file.name, set())
        assert extras <= allowed, file.name
