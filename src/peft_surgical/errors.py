"""The exceptions of this package. Each is also a builtin, so that ``except ValueError`` keeps meaning what it says.

::

    SurgicalError
    ├── AnatomyError        (ValueError)  a network that cannot be cut into blocks, or a spec that does not cover it
    ├── TargetError         (ValueError)  a target that does not parse
    │   ├── UnknownTargetError  (KeyError)    a term that matches nothing in this model
    │   └── UnresolvedTargetError             a target that needs data (auto-*, race) before it names tensors
    ├── ConfigError         (ValueError)  a SurgicalConfig that contradicts itself
    ├── UnsupportedModelError (TypeError) a base that cannot be tuned this way: quantized, offloaded, parametrized
    ├── AdapterError        (ValueError)  an adapter that cannot be attached, saved, combined or run as asked
    │   ├── AdapterFileError              a file that is truncated, altered, or does not hold what its config says
    │   └── BaseMismatchError             the base is not the one that the adapter was trained on
    ├── DataError           (ValueError)  data on disk that is not in the layout that the reader expects
    └── RowsFailedError     (RuntimeError) rows of a comparison that failed, while others are done

`run_in_words` turns them into a script's exit code. A PEFT that this package does not work with is an
``ImportError``, raised by `peft_api` before there is anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft.utils.error import NoMatchingPeftModuleError

from .texts import escaped


class SurgicalError(Exception):
    """Root of every exception that this package raises on purpose."""


class AnatomyError(SurgicalError, ValueError):
    """A network that cannot be cut into blocks, or a ``blocks=`` spec that is not total and disjoint."""


class TargetError(SurgicalError, ValueError):
    """A target that does not parse."""


class UnknownTargetError(TargetError, NoMatchingPeftModuleError, KeyError):
    """A term of a target that matches nothing in this model; PEFT's own error for that case, too."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would turn a readable message into an escaped one.
        return str(self.args[0]) if self.args else ""


class UnresolvedTargetError(TargetError):
    """A target such as ``auto-rgn`` that needs data before it names tensors."""


class ConfigError(SurgicalError, ValueError):
    """A ``SurgicalConfig`` that contradicts itself."""


class UnsupportedModelError(SurgicalError, TypeError):
    """A base that cannot be tuned this way: quantized, offloaded, or holding its tensors where no delta reaches."""


class AdapterError(SurgicalError, ValueError):
    """An adapter that cannot be attached, saved, combined or run as asked."""


class AdapterFileError(AdapterError):
    """An adapter file that is truncated, altered, or does not hold what its config says."""


class BaseMismatchError(AdapterError):
    """The base model is not the one that the adapter was trained on."""


class DataError(SurgicalError, ValueError):
    """Data on disk that is not in the layout that the reader expects."""


class RowsFailedError(SurgicalError, RuntimeError):
    """Rows of a comparison that failed, while others are done.

    Args:
        done: Row -> its runs, of the rows that are done.
        failed: Row -> what went wrong.
    """

    def __init__(self, done: Mapping[str, Any], failed: Mapping[str, Exception]) -> None:
        self.done, self.failed = dict(done), dict(failed)
        reasons = "; ".join(f"{name}: {reason_of(error)}" for name, error in failed.items())
        super().__init__(f"{len(failed)} of {len(done) + len(failed)} rows failed: {reasons}")


def reason_of(error: Exception) -> str:
    """The message of an error, after the name of its class where the class is not of this package."""
    text = str(error)
    return text if isinstance(error, SurgicalError) else f"{type(error).__name__}: {text}"


USER_ERROR = 2
HARMED = 3
"""The command did what it should, and the model predicts worse after its adaptation than before."""
INTERRUPTED = 130


def run_in_words(main: Callable[[], Any]) -> int:
    """Run a script's ``main`` and return its exit code: 0, 2 for an error of this package, 130 for Ctrl-C.

    Those end in one line on standard error; anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except SurgicalError as error:
        print(f"{Path(sys.argv[0]).name}: {escaped(str(error))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; start it again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0
