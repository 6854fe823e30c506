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
from .layer import SurgicalLayer
from .model import SurgicalModel, set_scale
from .register import register
from .targets import TargetSpec, parse, resolve

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "Anatomy",
    "AnatomyError",
    "BaseMismatchError",
    "Block",
    "ConfigError",
    "DataError",
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
    "parse",
    "register",
    "resolve",
    "set_scale",
]

register()
