"""Choosing by scores: gradients on target data -> a score for each block and tensor -> a target."""

from .resolve import resolve_target, score_blocks
from .scores import CRITERIA, BlockScores

__all__ = ["CRITERIA", "BlockScores", "resolve_target", "score_blocks"]
