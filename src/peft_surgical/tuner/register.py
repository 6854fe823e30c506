"""Make PEFT know the method. The only code that changes anything of PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ..config import SurgicalConfig, SurgicalType
from .model import PREFIX, SurgicalModel
from .saving import saving_atomically


def register(push_to_hub: Callable[..., Any] | None = None, card: Callable[..., Any] | None = None) -> None:
    """Enter the method into PEFT's mappings and make ``PeftModel.save_pretrained`` atomic for it. Idempotent.

    PEFT's ``register_peft_method`` takes only names from its own enum, so the mappings are written directly. The
    prefix entry is needed by injection from a state dict; its value must be the lower-case type and an underscore,
    from which transformers derives it.

    Args:
        push_to_hub: Wraps ``PeftModel.push_to_hub``, which else pushes a card of its own; see `pushing.redirected`.
        card: Wraps ``PeftModel.create_or_update_model_card``, by which Trainer writes a card before it pushes; see
            `pushing.carded`.
    """
    key = SurgicalType.SURGICAL
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = SurgicalConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = SurgicalModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = PREFIX
    if not hasattr(PeftModel.save_pretrained, "__wrapped__"):
        PeftModel.save_pretrained = saving_atomically(PeftModel.save_pretrained)
    if push_to_hub is not None and not hasattr(PeftModel.push_to_hub, "__wrapped__"):
        PeftModel.push_to_hub = push_to_hub(PeftModel.push_to_hub)
    if card is not None and not hasattr(PeftModel.create_or_update_model_card, "__wrapped__"):
        PeftModel.create_or_update_model_card = card(PeftModel.create_or_update_model_card)
