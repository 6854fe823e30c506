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

from .adapters import read_adapter
from .anatomy import Anatomy, Block, anatomy_of
from .callback import SurgicalCallback
from .combination import combine_adapters
from .config import SurgicalConfig
from .difference import diff
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
from .layer import SurgicalLayer
from .lora import to_lora
from .model import SurgicalModel, set_scale
from .pace import Pace
from .penalties import Penalty
from .pool import AdapterPool
from .pushing import redirected
from .register import register
from .scores import BlockScores
from .selection import resolve_target, score_blocks
from .targets import TargetSpec, parse, resolve

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
