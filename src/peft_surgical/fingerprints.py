"""Which base an adapter was made on: marks of its tensors, and what to say where two bases differ.

Adding a delta to the wrong base gives silent garbage: same shapes, other values. One mark a tensor (instead of one for
all) lets an error name the tensors that differ. There are two kinds, which may stand together, apart by spaces:

- a hash of all bytes, of the tensors that an adapter tunes (adapters saved by early versions have this alone);
- dtype, shape, and three hashes of a sample of the values: as they are, as bfloat16 and as float16, of every tensor of
  the base. The last two tell the same base in another dtype from another base.

Hashing all bytes of a ViT-L/16 (1.2 GB) takes as long as reading them from a disk's cache, the sample a hundredth
(`benchmarks/fingerprint.py`), and training moves so many values of a tensor that the sample sees it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from .errors import BaseMismatchError
from .files import shown

_DIGITS = 16  # 64 bits a tensor: a guard against the wrong base, not against an attacker who forges one
_SAMPLED = 1024  # evenly spaced values of a tensor; the hash of a smaller one sees all of it
_CASTS = (torch.bfloat16, torch.float16)
UNKNOWN = "-"


class TensorMark(NamedTuple):
    """What is known of a tensor of a base; "-" stands for what is not."""

    dtype: str = UNKNOWN
    shape: str = UNKNOWN
    sample: str = UNKNOWN
    as_bfloat16: str = UNKNOWN
    as_float16: str = UNKNOWN
    all_bytes: str = UNKNOWN

    @classmethod
    def parse(cls, text: str) -> TensorMark:
        """The mark that a config has for a tensor. What it is not is a mark that equals no other."""
        parts = text.split()
        return cls(*parts) if len(parts) in (5, 6) else cls(all_bytes=text)

    def __str__(self) -> str:
        return self.all_bytes if self.shape == UNKNOWN else " ".join(self if self.all_bytes != UNKNOWN else self[:5])

    def differs(self, other: TensorMark) -> bool:
        """Whether the two are marks of different tensors, as far as both are known."""
        return any(a != b for a, b in zip(self, other, strict=True) if UNKNOWN not in (a, b))

    def is_cast_of(self, other: TensorMark) -> bool:
        """Whether the two are one tensor in two dtypes."""
        casts = zip(self[3:5], other[3:5], strict=True)
        return self.dtype != other.dtype and any(a == b != UNKNOWN for a, b in casts)


def fingerprint(base: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Hash each tensor's name, shape, dtype and bytes: name -> 16 hexadecimal digits of SHA-256."""
    return {name: _hash(name, tensor) for name, tensor in base.items()}


def mark_of(name: str, tensor: torch.Tensor, values: bool = True) -> TensorMark:
    """The mark of a tensor, without the hash of all bytes.

    Args:
        name: Its full name.
        tensor: On any device but meta.
        values: Whether to look at the values. Not those of a quantized tensor, which a library packs as it likes.
    """
    dtype, shape = str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)) or "scalar"
    if not values:
        return TensorMark(dtype, shape)
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].cpu()
    casts = [_hash(name, some.to(cast))[: _DIGITS // 2] for cast in _CASTS]
    return TensorMark(dtype, shape, _hash(name, some), *casts)


def with_all_bytes(mark: TensorMark, name: str, tensor: torch.Tensor) -> TensorMark:
    """The mark of a tensor together with the hash of all its bytes."""
    return mark._replace(all_bytes=_hash(name, tensor))


def _hash(name: str, tensor: torch.Tensor) -> str:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = full.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{name}|{tuple(full.shape)}|{full.dtype}|".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The tensors of which both fingerprints have a mark, and different ones."""
    return [
        name for name in one if name in other and TensorMark.parse(one[name]).differs(TensorMark.parse(other[name]))
    ]


def joined(fingerprints: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One fingerprint of what several of the same base know: the longest mark of each tensor, the first of equals."""
    found: dict[str, str] = {}
    for name, mark in itertools.chain.from_iterable(one.items() for one in fingerprints):
        found[name] = max(found.get(name, ""), mark, key=len)
    return found


def check_base(
    expected: Mapping[str, str], tuned: Mapping[str, TensorMark], rest: Mapping[str, TensorMark], base_name: str | None
) -> None:
    """Raise `BaseMismatchError` unless the base at hand is the one with the fingerprint ``expected``.

    Args:
        expected: The fingerprint in an adapter's config, without the tensors that the adapter holds whole.
        tuned: The marks, here, of the tensors that the adapter tunes.
        rest: The marks, here, of all others that it does not hold whole. Where the config has none of them, as in
            adapters saved by early versions, they are not compared.
        base_name: What the adapter's config calls its base, for the message.
    """
    there = {name: TensorMark.parse(text) for name, text in expected.items()}
    here, names, kind = {**rest, **tuned}, list(tuned), "tuned tensors"
    wrong = [name for name in names if name not in there or there[name].differs(tuned[name])]
    if not wrong and any(mark.shape != UNKNOWN for mark in there.values()):
        names, kind = [name for name in {**there, **rest} if name not in tuned], "tensors that it does not tune"
        wrong = [name for name in names if name not in there or name not in rest or there[name].differs(rest[name])]
    if not wrong:
        return
    what = f"({base_name or 'unnamed'}): {len(wrong)} of {len(names)} {kind}"
    both = [name for name in wrong if name in there and name in here]
    was, now = (" and ".join(sorted({marks[name].dtype for name in both})) for marks in (there, here))
    if len(both) == len(wrong) and all(here[name].is_cast_of(there[name]) for name in wrong):
        raise BaseMismatchError(
            f"This adapter was trained on this base in {was}, and the base is here in {now} {what} were cast, first "
            f"{shown(wrong)}. Load the base in {was}; or, to add the deltas to weights that were rounded otherwise, "
            "say strict_base=False."
        )
    dtype = f", in the same dtype (here {now})" if now else ""
    raise BaseMismatchError(
        f"This adapter was trained on another base {what} differ there, first "
        f"{shown([name + _how(there.get(name), here.get(name)) for name in wrong])}. Load that base{dtype} and "
        "revision; or, if you know that the deltas fit this one (it has a new head, say, or other image sizes), say "
        "strict_base=False."
    )


def _how(there: TensorMark | None, here: TensorMark | None) -> str:
    if there is None or here is None:
        return " (only there)" if here is None else " (only here)"
    if UNKNOWN not in (there.shape, here.shape) and there.shape != here.shape:
        return f" ({there.shape} there, {here.shape} here)"
    return ""
