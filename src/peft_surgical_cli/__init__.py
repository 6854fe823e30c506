"""The command line, ``peft-surgical COMMAND``: a module for each command, which reads arguments, calls, and prints.

It stands beside `peft_surgical`, not in it, because importing that package imports PEFT and torch, which takes seconds.
A command's module therefore imports what it calls inside its functions, when the command runs: the help of every
command, ``--version`` and ``list`` need neither.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, or say what to install for it."""
    try:
        from .app import run
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f'peft-surgical: the command line needs {error.name}: pip install "peft-surgical[cli]"', file=sys.stderr)
        return 2
    return run()
