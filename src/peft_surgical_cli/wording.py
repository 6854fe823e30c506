"""Messages of the package in the language of the command line: the arguments that they name become its options.

Whatever the package raises or warns of speaks Python and writes arguments as ``name=value``, because it is called from
Python too. Only here is it known which options the running command has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ALIASES = {
    "datasets": ("dataset",),
    "k": ("num_blocks",),
    "num_batches": ("batches",),
    "tuning": ("images",),
}
"""Argument -> the parameter of a command that sets it, where that has another name."""

PYTHON_ONLY = frozenset({"adapter_name", "blocks", "loading", "preprocess", "strict_base", "token", "values_from"})
"""Arguments that can be the way out of an error but have no option: the message says that they are Python's."""

_VALUE = r"""\"[^\"]*\"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[\w.+-]*\w|"""
_ARGUMENT = re.compile(rf"(?<![\w./\\-])([a-z_]+)=({_VALUE})")


def in_options(message: str, command: Any) -> str:
    """A message with the options of a command in place of Python's arguments.

    Args:
        message: What an exception or a warning says.
        command: The click command that was running, or None.
    """
    options = {parameter.name: parameter for parameter in getattr(command, "params", ())}

    def written(found: re.Match[str]) -> str:
        name, value = found.groups()
        for own in (name, *ALIASES.get(name, ())):
            if own in options and options[own].param_type_name == "option":
                return _option(options[own], value, options)
        return f"{found.group()} (in Python)" if name in PYTHON_ONLY else found.group()

    return _ARGUMENT.sub(written, message)


def _option(parameter: Any, value: str, options: Mapping[str, Any]) -> str:
    option: str = parameter.opts[0]
    if value == "[]" and f"no_{parameter.name}" in options:
        return str(options[f"no_{parameter.name}"].opts[0])
    if getattr(parameter, "is_flag", False) or not value:
        return option
    return " ".join((option, *(one.strip("\"' ") for one in value.strip("[]").split(","))))
