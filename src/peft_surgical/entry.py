"""Running a program so that what its user can mend is one line on standard error, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import SurgicalError

USER_ERROR = 2
HARMED = 3
"""The command ended as it should, and what it adapted predicts worse than before."""
INTERRUPTED = 130


def run_in_words(main: Callable[[], Any]) -> int:
    """Run a script's ``main`` and return its exit code: 0, 2 for an error of this package, 130 for Ctrl-C.

    Anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except SurgicalError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; start it again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0
