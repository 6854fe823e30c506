"""Names in files: the files of an adapter's folder, and the keys of its tensors. Knows nothing of PEFT or torch.

A tensor of the network has a full name, such as ``layer1.0.conv1.weight``. PEFT writes its delta under the key
``base_model.model.layer1.0.conv1.surgery.surgical_delta.weight``; in a live model the adapter's name stands before the
last part.
"""

from __future__ import annotations

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
"""PEFT's other file of weights, which this package neither reads nor writes."""
CONFIG = "adapter_config.json"
CARD = "README.md"
RECORD_FILE = "base.json"
"""What is known of the base, beside an adapter on the Hub."""
REPORT = "report.json"
FIGURE = "figure.png"
PROCESSOR = "preprocessor_config.json"
"""How transformers prepares images for the network, where its base is one of transformers'."""
SCRATCH = ".peft-surgical-"
"""What the name of everything begins with that is not complete yet."""
PRIVATE = ".peft-surgical"
"""Folder of what an experiment needs until it is over, in the folder of its results, and of the record of these."""

HOLDER = "surgery"
"""Name of the child module that holds a module's deltas, and so a part of the keys in an adapter file. It must not
contain the prefix "surgical_": PEFT's ``delete_adapter`` skips modules whose path does."""
PREFIX = "surgical_"
DELTA, STATISTIC = f"{PREFIX}delta", f"{PREFIX}stats"
"""What a `HOLDER` keeps: deltas of parameters, and norm statistics, which are values."""
BASE_MARKS = "surgery_base"
"""Attribute of an adapted network: the marks of the base's tensors as they were at first."""
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every key of an adapter file."""


def join(path: str, name: str) -> str:
    """The full name of a tensor: ``path.name``, or ``name`` on the root."""
    return f"{path}.{name}" if path else name


def file_key(name: str) -> str:
    """The key in an adapter file of the tensor ``name``, without what tells deltas from statistics.

    Example:
        >>> file_key("layer1.0.conv1.weight"), file_key("cls_token")
        ('layer1.0.conv1.surgery.weight', 'surgery.cls_token')
    """
    path, _, leaf = name.rpartition(".")
    return join(path, f"{HOLDER}.{leaf}")


def neutral_key(key: str) -> str | None:
    """The `file_key` of a key as PEFT writes it; None for a key that belongs to no delta and no statistic."""
    path, holder, rest = key.removeprefix(PEFT_PREFIX).rpartition(f"{HOLDER}.")
    kind, _, leaf = rest.partition(".")
    return f"{path}{holder}{leaf}" if holder and kind in (DELTA, STATISTIC) and leaf else None


def saved_key(name: str, kind: str) -> str:
    """The key, as PEFT writes it, of the delta or statistic of the tensor ``name``; ``kind`` is `DELTA` or `STATISTIC`.

    Example:
        >>> saved_key("conv1.weight", DELTA)
        'base_model.model.conv1.surgery.surgical_delta.weight'
    """
    path, _, leaf = name.rpartition(".")
    return PEFT_PREFIX + join(path, f"{HOLDER}.{kind}.{leaf}")


def split_key(key: str) -> tuple[str | None, str]:
    """Kind and full name of the tensor with this key in a file, see `saved_key`; other tensors have the kind None."""
    plain = key.removeprefix(PEFT_PREFIX)
    path, mark, rest = plain.rpartition(f"{HOLDER}.{PREFIX}")
    kind, _, leaf = rest.partition(".")
    return (PREFIX + kind, path + leaf) if mark else (None, plain)


def tensor_name(key: str) -> str | None:
    """The full name of the tensor whose delta or statistic has this key in a file or state dict; None for others."""
    plain = key.removeprefix(PEFT_PREFIX).removeprefix("_orig_mod.")
    path, mark, rest = plain.rpartition(f"{HOLDER}.{PREFIX}")
    return join(path.removesuffix("."), rest.rpartition(".")[2]) if mark else None
