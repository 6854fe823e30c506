"""The command line: ``peft-surgical COMMAND``. It prints and exits; what a command does is in the package.

A further command is a module in `commands` with one function, and one line below.

Exit codes: 0, 2 for what the user can mend (one line on standard error, no traceback), 3 for an adaptation that made
predictions worse, 130 for Ctrl-C.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import typer

from .commands.adapt import adapt_command
from .commands.adapters import adapters
from .commands.blocks import blocks
from .commands.compare import compare
from .commands.diff import diff
from .commands.lora import to_lora
from .commands.merge import merge
from .commands.options import ManyValues
from .commands.pull import pull
from .commands.push import push
from .commands.score import score
from .commands.show import show
from .commands.tune import tune
from .entry import INTERRUPTED, USER_ERROR
from .errors import SurgicalError

app = typer.Typer(
    name="peft-surgical",
    help="Surgical fine-tuning: tune one block of a pretrained vision model, save one small delta file.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("blocks")(blocks)
app.command("score")(score)
app.command("tune", cls=ManyValues)(tune)
app.command("compare", cls=ManyValues)(compare)
app.command("adapt")(adapt_command)
app.command("show")(show)
app.command("diff")(diff)
app.command("merge")(merge)
app.command("to-lora")(to_lora)
app.command("push", cls=ManyValues)(push)
app.command("pull")(pull)
app.command("list")(adapters)


@app.callback()
def _commands() -> None:
    # Keeps "peft-surgical blocks ..." a command with a name even if it were the only one.
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    # Without a command there is nothing to mend yet: the help, rather than a complaint.
    arguments = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(args=arguments, prog_name="peft-surgical", standalone_mode=False)
        except SurgicalError as error:
            return _complain(str(error))
        except (KeyboardInterrupt, typer.Abort):
            return INTERRUPTED
        except Exception as error:
            # A usage error: typer's own copy of click raises it, older typers raise click's.
            if not hasattr(error, "format_message"):
                raise
            return _complain(error.format_message())
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    print(f"peft-surgical: {message}", file=sys.stderr)
    return USER_ERROR


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # Without the place in the code, which says nothing to whoever typed the command.
    print(f"peft-surgical: warning: {message}", file=sys.stderr)
