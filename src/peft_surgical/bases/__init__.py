"""Pretrained networks: opened by name or from a folder, with their transforms, and saved as plain checkpoints."""

from .load import Base, load_base, load_model
from .plain import save_checkpoint

__all__ = ["Base", "load_base", "load_model", "save_checkpoint"]
