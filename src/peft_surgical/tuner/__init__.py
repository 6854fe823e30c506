"""Live deltas. `register` makes PEFT know the method, and is the only code that changes anything of PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ..config import SurgicalConfig, SurgicalType
from ..keys import PREFIX
from .model import SurgicalModel
from .saving import saving_atomically
from .switch import disabling_layers, loading_alone

_MARK = "_peft_surgical"


def register(**wrappers: Callable[..., Any]) -> None:
    """Enter the method into PEFT's mappings and wrap the methods of PeftModel that it needs otherwise. Idempotent.

    PEFT's ``register_peft_method`` takes only names from its own enum, so the mappings are written directly. The
    prefix entry is needed by injection from a state dict; its value must be the lower-case type and an underscore,
    from which transformers derives it.

    Args:
        **wrappers: Name of another method of PeftModel -> what wraps it: the Hub's are given by the package, since
            the tuner does not import `hub`.
    """
    key = SurgicalType.SURGICAL
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = SurgicalConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = SurgicalModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = PREFIX
    own = {"save_pretrained": saving_atomically, "load_adapter": loading_alone, "disable_adapter": disabling_layers}
    for name, wrap in {**own, **wrappers}.items():
        original = getattr(PeftModel, name)
        if not hasattr(original, _MARK):
            setattr(PeftModel, name, wrap(original))
            setattr(getattr(PeftModel, name), _MARK, True)
