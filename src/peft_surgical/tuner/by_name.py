"""What optimizers read of an adapted network that group parameters by name, as timm's do with layer decay.

timm asks the model for a ``group_matcher`` and for ``no_weight_decay``, and compares what these give with the names of
the parameters. An adapter's have names of their own, so that the delta of ``cls_token`` would get the head's rate, and
weight decay. PEFT passes such questions on to the tuner, which answers here in these names.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..keys import PEFT_PREFIX, tensor_name

_PREFIXES = ("", "model.", PEFT_PREFIX)
"""What stands before the name of a network's own parameter, from the network, the tuner and PEFT's model."""


class KnownByName:
    """The tuner's answers; a network without these methods has none."""

    model: Any

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """Timm's ``group_matcher``: the group of a delta is that of its tensor."""
        original = self.model.group_matcher

        def matcher(coarse: bool = False) -> Callable[[str], int]:
            from timm.models import group_parameters  # timm is an extra; whoever asks has it

            names = _base_names(self.model)
            own = SimpleNamespace(named_parameters=lambda: dict.fromkeys(dict.fromkeys(names.values())).items())
            groups = group_parameters(own, original(coarse=coarse), reverse=True)
            found = {prefix + name: groups[base] for name, base in names.items() for prefix in _PREFIXES}
            return found.__getitem__

        return matcher

    @property
    def no_weight_decay(self) -> Callable[[], set[str]]:
        """Timm's ``no_weight_decay``: no weight decay for the delta of a tensor that has none."""
        original = self.model.no_weight_decay

        def listed() -> set[str]:
            spared = {*original()}
            names = {name for name, base in _base_names(self.model).items() if base in spared}
            return spared | {prefix + name for name in names for prefix in _PREFIXES}

        return listed


def _base_names(network: nn.Module) -> dict[str, str]:
    """Each parameter of an adapted network -> the name that its tensor has in the network itself."""
    found: dict[str, str] = {}
    for name, _ in network.named_parameters():
        base = tensor_name(name) or name.replace(".original_module.", ".")
        path, whole, rest = base.partition(".modules_to_save.")
        found[name] = f"{path}.{rest.partition('.')[2]}" if whole else base
    return found
