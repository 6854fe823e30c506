"""Messages in the language of the command line, and no argument in a message that this does not know."""

import ast
import re
from pathlib import Path

import pytest

typer = pytest.importorskip("typer")

from peft_surgical import cli  # noqa: E402
from peft_surgical.commands.wording import ALIASES, PYTHON_ONLY, in_options  # noqa: E402

SOURCE = Path(cli.__file__).parent
COMMANDS = typer.main.get_command(cli.app).commands
OPTIONS = {p.name for command in COMMANDS.values() for p in command.params if p.param_type_name == "option"}
# These never run below a command: what recipes read and report, and metrics that users load themselves.
ELSEWHERE = {"shifts", "studies"}


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
        ("merge", "say strict_base=False.", "say strict_base=False (an argument in Python)."),
        ("tune", "there is no runs/lr=0.1/x.png, nor x=y", "there is no runs/lr=0.1/x.png, nor x=y"),
        (None, "seed=3", "seed=3"),
    ],
)
def test_arguments_become_options(command, python, shell):
    assert in_options(python, COMMANDS.get(command)) == shell


def texts():
    """Every text of the package beside docstrings: its place, and the text with {} for what is filled in."""
    for file in sorted(SOURCE.rglob("*.py")):
        if file.relative_to(SOURCE).parts[0] in ELSEWHERE:
            continue
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
    unknown = sorted((place, name) for place, name in named if name not in OPTIONS | set(ALIASES) | PYTHON_ONLY)
    assert unknown == []
    assert {p for names in ALIASES.values() for p in names} <= OPTIONS
    assert not OPTIONS & PYTHON_ONLY
