"""Pretrained networks: opened by name or from a folder, with their transforms, and saved as plain checkpoints."""

from .libraries import save_checkpoint
from .load import Base, load_base, load_model

__all__ = ["Base", "load_base", "load_model", "save_checkpoint"]
