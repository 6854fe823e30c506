"""The ordered blocks of any network, and where that knowledge comes from: a spec, timm, transformers, known layouts."""

from .blocks import Anatomy, Block, anatomy_of

__all__ = ["Anatomy", "Block", "anatomy_of"]
