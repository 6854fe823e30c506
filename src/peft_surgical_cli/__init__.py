"""The command line, ``peft-surgical COMMAND``: a module for each command, which reads arguments, calls, and prints.

It stands beside `peft_surgical`, not in it, because importing that package imports PEFT and torch, which takes seconds.
A command's module therefore imports what it calls inside its functions, when the command runs: the help of every
command, ``--version`` and ``list`` need neither.
"""

from __future__ import annotations


def main() -> int:
    """Run the command line and return its exit code."""
    from .app import run

    return run()
