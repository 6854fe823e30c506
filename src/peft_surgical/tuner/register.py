"""Make PEFT know the method. The only code that changes anything of PEFT's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from ..config import SurgicalConfig, SurgicalType
from ..errors import SurgicalError
from .model import PREFIX, SurgicalModel
from .saving import saving_atomically

# Method of BaseTuner -> parameters that the tuner relies on. A PEFT whose hooks differ is refused at import, rather
# than saving or loading something else in silence.
_HOOKS = {
    "inject_adapter": ("model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"),
    "_get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
    "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
    "_remove_adapter_name_from_key": ("key", "adapter_name"),
    "_unload_and_optionally_merge": ("self", "merge", "progressbar", "safe_merge", "adapter_names"),
}


def register(push_to_hub: Callable[..., Any] | None = None, card: Callable[..., Any] | None = None) -> None:
    """Enter the method into PEFT's mappings and make ``PeftModel.save_pretrained`` atomic for it. Idempotent.

    PEFT's ``register_peft_method`` takes only names from its own enum, so the mappings are written directly. The
    prefix entry is needed by injection from a state dict; its value must be the lower-case type and an underscore,
    from which transformers derives it.

    Args:
        push_to_hub: Wraps ``PeftModel.push_to_hub``, which else pushes a card of its own; see `pushing.redirected`.
        card: Wraps ``PeftModel.create_or_update_model_card``, by which Trainer writes a card before it pushes; see
            `pushing.carded`.

    Raises:
        SurgicalError: PEFT's internal hooks differ from those that this version was written for.
    """
    for name, wanted in _HOOKS.items():
        hook = getattr(BaseTuner, name, None)
        found = tuple(inspect.signature(hook).parameters) if hook is not None else ()
        if any(parameter not in found for parameter in wanted if parameter != "self"):
            raise SurgicalError(
                f"peft {peft.__version__} is not supported: BaseTuner.{name} has the parameters {found}, expected "
                f"{wanted}. Install a version within peft-surgical's bounds: pip install 'peft>=0.21.1,<0.22'."
            )
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
