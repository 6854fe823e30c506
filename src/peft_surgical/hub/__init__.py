"""Adapters on the Hub, from one place: push, pull, open and merge.

Private and gated repositories, tokens, the cache, offline mode and ``HF_ENDPOINT`` are huggingface_hub's business: log
in with ``hf auth login``, or set ``HF_TOKEN``.
"""

from .merged import merge_to
from .opening import Adapted, load_adapted, open_adapted
from .pulling import Pulled, pull
from .pushing import Pushed, push_adapter

__all__ = [
    "Adapted",
    "Pulled",
    "Pushed",
    "load_adapted",
    "merge_to",
    "open_adapted",
    "pull",
    "push_adapter",
]
