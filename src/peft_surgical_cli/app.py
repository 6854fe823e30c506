"""The program: its commands, exit codes and messages. It prints and exits; what a command does is in `peft_surgical`.

A further command is a function in one of the modules beside this one, and one line below.

Exit codes: 0, 2 for what the user can mend (one line on standard error, no traceback), 3 for an adaptation that made
predictions worse, 130 for Ctrl-C.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from .adapt import adapt_command
from .adapters import list_command, merge_command, pull_command, push_command, to_lora_command
from .browser import app_command
from .diagnose import diagnose_command
from .extract import export_command, extract_command
from .inspect import blocks_command, diff_command, score_command, show_command
from .options import ManyValues, NamesOfTransformers
from .terminal import printable_text
from .tune import compare_command, tune_command

app = typer.Typer(
    name="peft-surgical",
    help="Surgical fine-tuning: tune one block of a pretrained vision model, save one small delta file.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("blocks")(blocks_command)
app.command("score")(score_command)
app.command("diagnose")(diagnose_command)
app.command("tune", cls=NamesOfTransformers)(tune_command)
app.command("compare", cls=ManyValues)(compare_command)
app.command("adapt")(adapt_command)
app.command("show")(show_command)
app.command("diff")(diff_command)
app.command("extract")(extract_command)
app.command("merge")(merge_command)
app.command("to-lora")(to_lora_command)
app.command("export")(export_command)
app.command("push", cls=ManyValues)(push_command)
app.command("pull")(pull_command)
app.command("list")(list_command)
app.command("app", cls=ManyValues)(app_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("peft-surgical"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command; each acts in a callback of its own."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    # Without a command there is nothing to mend yet: the help, rather than a complaint.
    arguments = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    command = getattr(typer.main.get_command(app), "commands", {}).get(arguments[0])

    def show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
        # Without the place in the code, which says nothing to whoever typed the command.
        text = printable_text(in_options(str(message), command))
        print(f"peft-surgical: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            code = app(args=arguments, prog_name="peft-surgical", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except Exception as error:
            # A usage error: typer's own copy of click raises it, older typers raise click's.
            if hasattr(error, "format_message"):
                return _complain(error.format_message())
            from peft_surgical.errors import SurgicalError

            if isinstance(error, OSError) and error.errno is not None:  # of the disk, whatever was to be done there
                return _complain(f"{error.filename or 'a file'}: {error.strerror}")
            if not isinstance(error, SurgicalError):
                raise
            return _complain(in_options(str(error), command))
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    print(f"peft-surgical: {printable_text(message)}", file=sys.stderr)
    return 2


# --- Messages of the package in the language of the command line: the arguments that they name become its options. ---


ALIASES = {
    "datasets": ("dataset",),
    "k": ("num_blocks",),
    "num_batches": ("batches",),
    "tuning": ("images",),
}
"""Argument -> the parameter of a command that sets it, where that has another name."""

PYTHON_ONLY = frozenset({"adapter_name", "blocks", "loading", "preprocess", "strict_base", "token", "values_from"})
"""Arguments that can be the way out of an error but have no option: the message says that they are Python's."""


def in_options(message: str, command: Any) -> str:
    """A message with the options of a command in place of Python's arguments.

    Args:
        message: What an exception or a warning says.
        command: The click command that was running, or None.
    """
    from peft_surgical.texts import with_arguments

    options = {parameter.name: parameter for parameter in getattr(command, "params", ())}

    def written(name: str, value: str) -> str | None:
        for own in (name, *ALIASES.get(name, ())):
            if own in options and options[own].param_type_name == "option":
                return _option(options[own], value, options)
        return f"{name}={value} (in Python)" if name in PYTHON_ONLY else None

    return with_arguments(message, written)


def _option(parameter: Any, value: str, options: Mapping[str, Any]) -> str:
    option: str = parameter.opts[0]
    if value == "[]" and f"no_{parameter.name}" in options:
        return str(options[f"no_{parameter.name}"].opts[0])
    if getattr(parameter, "is_flag", False) or not value:
        return option
    return " ".join((option, *(one.strip("\"' ") for one in value.strip("[]").split(","))))
