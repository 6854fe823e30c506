"""The command line: what it prints, its exit codes, and one clean line for what the user can mend."""

import ast
import json
from pathlib import Path

import pytest
import torch
import typer

timm = pytest.importorskip("timm")

import tiny  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from peft_surgical import SurgicalConfig, cli  # noqa: E402
from peft_surgical.errors import AdapterFileError  # noqa: E402
from peft_surgical.hub.contents import contents_of  # noqa: E402
from peft_surgical.selection import BlockScores  # noqa: E402


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
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


# Contents of a folder


def test_contents_by_hand(tmp_path):
    found = contents_of(adapter(tmp_path, target="head", scale=0.5))
    assert (found.target, found.norm_stats, found.scale, found.dtypes) == ("head", "frozen", 0.5, ("float32",))
    assert [(part.name, part.parameters) for part in found.parts] == [("head", 45)]
    assert found.parts_are == "block"
    assert [(d.name, d.parameters) for d in found.deltas] == [("fc.weight", 40), ("fc.bias", 5)]
    assert found.deltas[0].norm == pytest.approx(2 * 40**0.5)
    assert found.parts[0].norm == pytest.approx(2 * 45**0.5)
    files = [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]
    assert found.bytes == sum(file.stat().st_size for file in files)


def test_contents_by_module_where_only_the_base_knows_the_blocks(tmp_path):
    found = contents_of(adapter(tmp_path, target="block1 + head"))
    assert found.parts_are == "module"
    assert [part.name for part in found.parts] == ["conv1", "bn1", "layer1", "fc"]


def test_modules_are_named_as_deep_as_it_takes_to_tell_them_apart(tmp_path):
    found = contents_of(adapter(tmp_path, target_modules=["layer1.0", "layer1.1"]))
    assert [part.name for part in found.parts] == ["layer1.0", "layer1.1"]


def test_contents_by_the_blocks_of_the_config(tmp_path):
    blocks = {"block1": ["conv1", "bn1", "layer1"], "block2": ["layer2"], "head": ["fc"]}
    found = contents_of(adapter(tmp_path, target="all", blocks=blocks))
    assert [part.name for part in found.parts] == ["block1", "block2", "head"]


def test_contents_with_statistics_and_modules_saved_whole(tmp_path):
    found = contents_of(adapter(tmp_path, target="block1", norm_stats="target", modules_to_save=["fc"]))
    assert found.statistics == 6
    assert found.modules_to_save == ("fc",)
    assert len(found.deltas) == 7


def test_contents_of_root_parameters_and_half_precision(tmp_path):
    found = contents_of(adapter(tmp_path, tiny.RootTokens(), target=["cls_token", "pos_embed"], delta_dtype="bfloat16"))
    assert [part.name for part in found.parts] == ["cls_token", "pos_embed"]
    assert found.dtypes == ("bfloat16",)


def test_folders_that_are_no_adapter(tmp_path):
    with pytest.raises(AdapterFileError, match=r"nowhere is no folder: pass a folder that save_pretrained wrote"):
        contents_of(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        contents_of(tmp_path)
    get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="is a LORA adapter: only surgical ones"):
        contents_of(tmp_path)
    adapter(tmp_path / "a", target="head")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json cannot be read"):
        contents_of(tmp_path / "a")


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
    assert (code, err.count("\n")) == (0, 2)  # a line for each of the two rates
    assert "validation" in out
    assert "learning rate and epoch by validation accuracy on these images" in out
    assert "load_base(report.model, **report.settings" in out
    assert "The head is new" in out
    assert contents_of(tmp_path / "a").target == "head"
    code, out, err = run(
        "compare", "test_resnet", data, "--methods", "none", "head", "--seeds", 0, 1, "--output", tmp_path / "b",
        "--head-lr", "1e-2", *how,
    )  # fmt: skip
    assert (code, err.count("\n")) == (0, 4)
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[1:3]] == ["none", "head"]
    assert "over the seeds 0, 1" in out
    assert (tmp_path / "b" / "table.md").is_file()


def test_ctrl_c_says_how_to_go_on(run, data, tmp_path, monkeypatch):
    def stopped(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_surgical.experiments.experiment.fit", stopped)
    line = ("tune", "test_resnet", data, "--output", tmp_path / "a", "--target", "block1", "--random", "--epochs", 1)
    assert run(*line) == (130, "", "stopped; the same command goes on from here\n")


def test_several_values_of_one_option():
    from peft_surgical.commands.options import ManyValues

    app, seen = typer.Typer(), []

    @app.command(cls=ManyValues)
    def take(place: str, lr: list[float] = typer.Option([]), name: str = "", flag: bool = False):  # noqa: B008
        seen.append((place, lr, name, flag))

    for line, found in (
        ("here --lr 1 2e-1", ("here", [1.0, 0.2], "", False)),
        ("here --lr 1 --lr -2 3 --flag", ("here", [1.0, -2.0, 3.0], "", True)),
        ("--lr 1 2 --name x here", ("here", [1.0, 2.0], "x", False)),
        ("here --lr=1 --name --lr", ("here", [1.0], "--lr", False)),
    ):
        app(args=line.split(), standalone_mode=False)
        assert seen.pop() == found, line


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
        (["tune", "x", "y", "--output", "z", "--scheduler", "linear"], "choose one of constant, cosine"),
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
    folder = Path(cli.__file__).parent
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
