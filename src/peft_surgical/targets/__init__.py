"""The target language: ``parse(text)`` gives a plan, ``resolve(plan, anatomy)`` its tensors in one network.

Its grammar stands in `peft_surgical.targets.parsing`.
"""

from .parsing import DATA_TARGETS, Count, FromData, Name, Pattern, Range, Step, TargetSpec, parse
from .resolving import paths_matched, resolve

__all__ = [
    "DATA_TARGETS",
    "Count",
    "FromData",
    "Name",
    "Pattern",
    "Range",
    "Step",
    "TargetSpec",
    "parse",
    "paths_matched",
    "resolve",
]
