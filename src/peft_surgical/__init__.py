"""Surgical fine-tuning (Lee et al., ICLR 2023) as a PEFT method.

Importing this package registers the method; then PEFT's own front door works with it:

    >>> import torch
    >>> from peft import get_peft_model
    >>> from peft_surgical import SurgicalConfig
    >>> network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> blocks = {"block1": ["0"], "head": ["2"]}
    >>> model = get_peft_model(network, SurgicalConfig(target="block1", blocks=blocks))
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)[0]
    'base_model.model.0.surgery.surgical_delta.default.bias'

Only what registering needs is imported here. The other names are imported from their modules when they are first used.
"""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# Before anything below looks for something that another PEFT does not have.
from .peft_api import check_peft

check_peft()

from .blocks import Anatomy, anatomy_of
from .config import SurgicalConfig
from .errors import SurgicalError
from .tuner import register as _register
from .tuner.loading import set_scale

if TYPE_CHECKING:
    from .adapters.adapter import read_adapter
    from .adapters.combination import combine_adapters
    from .adapters.difference import diff
    from .adapters.extract import extract_adapter
    from .adapters.lora import to_lora
    from .adapters.pool import AdapterPool
    from .choosing.callback import SurgicalCallback
    from .choosing.models import with_base_names
    from .choosing.pace import Pace
    from .choosing.penalties import Penalty
    from .choosing.resolve import resolve_target, score_blocks
    from .choosing.scores import BlockScores
    from .experiment.api import compare, tune
    from .hub.pulling import load_adapted, pull
    from .hub.pushing import push_adapter
    from .prefix.cached import CachedPrefix

__all__ = [
    "AdapterPool",
    "Anatomy",
    "BlockScores",
    "CachedPrefix",
    "Pace",
    "Penalty",
    "SurgicalCallback",
    "SurgicalConfig",
    "SurgicalError",
    "anatomy_of",
    "combine_adapters",
    "compare",
    "diff",
    "extract_adapter",
    "load_adapted",
    "pull",
    "push_adapter",
    "read_adapter",
    "resolve_target",
    "score_blocks",
    "set_scale",
    "to_lora",
    "tune",
    "with_base_names",
]

# Name -> the module that it is imported from when it is first used.
_MODULES = {
    "AdapterPool": "adapters.pool",
    "BlockScores": "choosing.scores",
    "CachedPrefix": "prefix.cached",
    "Pace": "choosing.pace",
    "Penalty": "choosing.penalties",
    "SurgicalCallback": "choosing.callback",
    "combine_adapters": "adapters.combination",
    "compare": "experiment.api",
    "diff": "adapters.difference",
    "extract_adapter": "adapters.extract",
    "load_adapted": "hub.pulling",
    "pull": "hub.pulling",
    "push_adapter": "hub.pushing",
    "read_adapter": "adapters.adapter",
    "resolve_target": "choosing.resolve",
    "score_blocks": "choosing.resolve",
    "to_lora": "adapters.lora",
    "tune": "experiment.api",
    "with_base_names": "choosing.models",
}


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _when_used(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    # A function of `hub.pushing`, which is imported when something is pushed, in place of a method.
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(".hub.pushing", __name__), name)(original, *args, **kwargs)

    return method


_register(
    push_to_hub=functools.partial(_when_used, "redirected"),
    create_or_update_model_card=functools.partial(_when_used, "carded"),
)
