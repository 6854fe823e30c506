"""``python -m peft_surgical`` and the ``peft-surgical`` script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, or say what to install for it."""
    try:
        from .cli import main as run
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f'peft-surgical: the command line needs {error.name}: pip install "peft-surgical[cli]"', file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
