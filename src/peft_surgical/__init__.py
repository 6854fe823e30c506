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
"""

# Before anything below looks for something that another PEFT does not have.
from .peft_api import check_peft

check_peft()

from .adapters.adapter import read_adapter
from .adapters.combination import combine_adapters
from .adapters.difference import diff
from .adapters.lora import to_lora
from .adapters.pool import AdapterPool
from .anatomy import Anatomy, Block, anatomy_of
from .config import SurgicalConfig
from .errors import (
    AdapterError,
    AdapterFileError,
    AnatomyError,
    BaseMismatchError,
    ConfigError,
    DataError,
    SurgicalError,
    TargetError,
    UnknownTargetError,
    UnresolvedTargetError,
    UnsupportedModelError,
)
from .hub import load_adapted, open_adapted, pull, push_adapter
from .hub.pushing import redirected
from .selection.resolve import resolve_target, score_blocks
from .selection.scores import BlockScores
from .targets import TargetSpec, parse, resolve
from .training.callback import SurgicalCallback
from .training.pace import Pace
from .training.penalties import Penalty
from .tuner.layer import SurgicalLayer
from .tuner.model import SurgicalModel, set_scale
from .tuner.register import register

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterPool",
    "Anatomy",
    "AnatomyError",
    "BaseMismatchError",
    "Block",
    "BlockScores",
    "ConfigError",
    "DataError",
    "Pace",
    "Penalty",
    "SurgicalCallback",
    "SurgicalConfig",
    "SurgicalError",
    "SurgicalLayer",
    "SurgicalModel",
    "TargetError",
    "TargetSpec",
    "UnknownTargetError",
    "UnresolvedTargetError",
    "UnsupportedModelError",
    "anatomy_of",
    "combine_adapters",
    "diff",
    "load_adapted",
    "open_adapted",
    "parse",
    "pull",
    "push_adapter",
    "read_adapter",
    "register",
    "resolve",
    "resolve_target",
    "score_blocks",
    "set_scale",
    "to_lora",
]

register(redirected)
