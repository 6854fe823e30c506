"""Adapters on the Hub, from one place: push, pull, open and merge.

huggingface_hub handles private and gated repositories, tokens, the cache, offline mode and ``HF_ENDPOINT``: log in with
``hf auth login``, or set ``HF_TOKEN``.
"""

from ..adapters.remote import Pushed
from .pulling import AdaptedNetwork, load_adapted, merge_to, open_adapted, pull
from .pushing import push_adapter

__all__ = ["AdaptedNetwork", "Pushed", "load_adapted", "merge_to", "open_adapted", "pull", "push_adapter"]
