"""Adapters on the Hub, from one place: push, pull, open, merge, and list what is at hand.

Private and gated repositories, tokens, the cache, offline mode and ``HF_ENDPOINT`` are huggingface_hub's business: log
in with ``hf auth login``, or set ``HF_TOKEN``.
"""

from .caching import Stored, adapters_in, by_base, cached_adapters
from .merged import merge_to
from .opening import Adapted, load_adapted, open_adapted
from .pulling import Pulled, pull
from .pushing import Pushed, push_adapter

__all__ = [
    "Adapted",
    "Pulled",
    "Pushed",
    "Stored",
    "adapters_in",
    "by_base",
    "cached_adapters",
    "load_adapted",
    "merge_to",
    "open_adapted",
    "pull",
    "push_adapter",
]
