"""Libraries that only some installations have: imported when used, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import DataError


def require(module: str, purpose: str, extra: str = "recipes") -> Any:
    """The module of this name. Importing the package must work without it, so it is imported where it is used.

    Args:
        module: Its full name, such as ``"timm.data"``.
        purpose: What needs it, the beginning of the message: ``"reading images"``.
        extra: The extra of this package that brings it.

    Raises:
        DataError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f'{purpose} needs {module}: pip install "peft-surgical[{extra}]"') from error
