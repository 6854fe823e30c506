"""Test-time adaptation without labels: MEMO and TENT on exactly the tensors of an adapter, by images or by batches."""

from .batchnorm import batch_statistics
from .objectives import Memo, Tent, norm_target
from .streams import CollapseWarning, Record
from .views import AugMix

__all__ = ["AugMix", "CollapseWarning", "Memo", "Record", "Tent", "batch_statistics", "norm_target"]
