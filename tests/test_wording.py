"""Messages in the language of the command line, and no argument in a message that this does not know."""

import ast
import re
from pathlib import Path

import pytest

typer = pytest.importorskip("typer")


import peft_surgical  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402
from peft_surgical_cli.app import ALIASES, PYTHON_ONLY, in_options  # noqa: E402

SOURCE = Path(peft_surgical.__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands
OPTIONS = {p.name for command in COMMANDS.values() for p in command.params if p.param_type_name == "option"}
# Arguments of functions and classes that commands leave as they are, or that PEFT and timm pass: no command can get one
# of them wrong, and none is a way out of what goes wrong in a command.
# fmt: off
UNREACHED = {
    "accumulation", "arguments", "average", "batch_first", "budget_bytes", "chains", "collapse_window", "components",
    "depth", "epsilon", "exclude_modules", "is_trainable", "keep", "label_names", "loss_fn", "majority_sign", "metrics",
    "mixed_precision", "modules_to_save", "name", "order", "peft_type", "pretrained", "ratio", "rungs",
    "safe_serialization", "save_embedding_layers", "scale", "severity", "share", "split", "stop_epoch", "strength",
    "target_modules", "threshold", "total_steps", "transform", "weights",
}
# fmt: on
CALLS = {
    # Nobody but Python has these networks, data and models, in files that are not what a command reads.
    "AutoImageProcessor.from_pretrained",
    "PeftModel.from_pretrained",
    "load_dataset",
    "astype",
    "save_pretrained",
    "to_parquet",
    "get_peft_model",
    "SurgicalConfig",
    "SurgicalCallback",
    "model.unmerge_adapter",
    "model.eval",
    "pace.start_epoch",
    "start_epoch",
    "torch.inference_mode",
    "peft_surgical.resolve_target",
    "to_lora",
    # What a base is opened with, in what is said about an adapter that Python loads.
    "load_base",
    "timm.create_model",
    "group_matcher",
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "python", "shell"),
    [
        ("tune", 'x.png is broken; on_broken="skip" leaves it out', "x.png is broken; --on-broken skip leaves it out"),
        ("tune", "head='keep': no. Or say head=\"new\"", "--head keep: no. Or say --head new"),
        ("tune", "tuning=5: too few", "--images 5: too few"),
        ("tune", "say which holds the labels by label_column=", "say which holds the labels by --label-column"),
        ("compare", "seeds=[0, 0]: give each once", "--seeds 0 0: give each once"),
        ("adapt", "or pass reset_on_collapse=True", "or pass --reset-on-collapse"),
        ("tune", "lr=-0.5, epochs=3: all", "--lr -0.5, --epochs 3: all"),
        ("tune", "k=3 and budget=0.1: give one of them.", "--num-blocks 3 and --budget 0.1: give one of them."),
        ("show", 'head="keep"', 'head="keep"'),
        ("merge", "say strict_base=False.", "say strict_base=False (in Python)."),
        ("tune", "there is no runs/lr=0.1/x.png, nor x=y", "there is no runs/lr=0.1/x.png, nor x=y"),
        (None, "seed=3", "seed=3"),
        ("push", 'datasets=["a/b"] or datasets=[], license="mit"', "--dataset a/b or --no-dataset, --license mit"),
        ("blocks", "name all blocks with blocks={...}:", "name all blocks with blocks={...} (in Python):"),
    ],
)
def test_arguments_become_options(command, python, shell):
    assert in_options(python, COMMANDS.get(command)) == shell


def texts():
    """Every text of the package beside docstrings: its place, and the text with {} for what is filled in."""
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            place = f"{file.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if id(node) in statements | parts:
                continue
            if isinstance(node, ast.JoinedStr):
                yield place, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield place, node.value


def test_every_argument_in_a_message_has_an_option_or_is_said_to_be_pythons():
    # Sentences only: code that is printed, such as how to load an adapter, is Python everywhere.
    named = {
        (place, name)
        for place, text in texts()
        if " " in text and "\n" not in text
        for name in re.findall(r"(?<![\w./{(-])([a-z][a-z_]*)=(?!=)", text)
    }
    assert len(named) > 50
    known = OPTIONS | set(ALIASES) | PYTHON_ONLY | UNREACHED
    assert sorted((place, name) for place, name in named if name not in known) == []
    assert {name for _, name in named} >= PYTHON_ONLY | UNREACHED  # no more than there are
    assert {p for names in ALIASES.values() for p in names} <= OPTIONS
    assert not OPTIONS & PYTHON_ONLY


def test_every_call_in_a_message_is_one_that_a_shell_does_not_need():
    called = {
        (place, name)
        for place, text in texts()
        if " " in text and "\n" not in text
        for name in re.findall(r"\b([A-Za-z_][\w.]*[a-z])\((?!s\)|es\)|ies\))", text)
    }
    assert sorted((place, name) for place, name in called if name not in CALLS) == []
    assert {name for _, name in called} >= CALLS


@pytest.mark.filterwarnings("always")
def test_errors_and_warnings_of_a_command_speak_of_its_options(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("datasets")
    pytest.importorskip("timm")
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for i in range(6):
            image.new("RGB", (8, 8), (40 * i, 90 * number, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "ant" / "0.png").write_bytes(b"broken")
    line = ["score", "test_resnet", str(tmp_path), "--random", "--batch-size", "4", "--cpu"]
    assert cli.run(line) == 2
    assert "; --on-broken skip leaves such images out\n" in capsys.readouterr().err
    assert cli.run([*line, "--on-broken", "skip", "--images", "50"]) == 0
    assert "warning: --images 50: there are 9, and all of them are taken\n" in capsys.readouterr().err
    assert cli.run([*line, "--on-broken", "skip", "--head", "old"]) == 2
    assert "peft-surgical: --head old: choose one of" in capsys.readouterr().err
