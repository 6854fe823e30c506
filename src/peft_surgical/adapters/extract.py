"""Any fine-tuned network as a surgical adapter of its base.

The adapter is exact: base + delta gives every tuned value. In float32 a difference does not always round-trip: after
long training, base + (tuned - base) misses some values by their last bit, and for about half of these no other float32
delta does better, because a delta that is larger than the tuned value has coarser steps than it. In float64 it
round-trips, so the deltas are then kept in float64 (``delta_dtype="float64"``), on disk and in memory, whose sum with
the base is rounded to the base's dtype.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..blocks import Anatomy, anatomy_of, parse, resolve
from ..blocks.inventory import Inventory
from ..config import DELTA_DTYPES, SurgicalConfig
from ..errors import AdapterError, AnatomyError, BaseMismatchError
from ..files import shown
from ..fingerprints import fingerprint
from ..keys import join
from ..tuner.attach import bare
from ..tuner.specialise import statistics_of
from .adapter import Adapter


@dataclass(frozen=True)
class BlockDifference:
    """How far a block moved from the base to the tuned network.

    Attributes:
        name: The block.
        tensors: Number of its parameters that differ.
        norm: L2 norm of the difference of its parameters.
        relative: The same over the L2 norm of its base values; None where these are all 0 and it moved.
        share: Its share of the squared norm of the whole difference, in [0, 1]; 0 for a new head, which is not counted.
        statistics: Number of its norm statistics that differ.
        kept: Whether the adapter has it, in part or whole.
    """

    name: str
    tensors: int
    norm: float
    relative: float | None
    share: float
    statistics: int
    kept: bool


@dataclass(frozen=True)
class Extraction:
    """An adapter made of two networks.

    Attributes:
        adapter: It.
        blocks: All blocks of the base; empty where they cannot be told.
        inexact: Parameter -> largest |base + delta - tuned|, of those kept that do not round-trip; mostly empty.
        left_out: Names of the tensors that differ and are not kept.
    """

    adapter: Adapter
    blocks: tuple[BlockDifference, ...]
    inexact: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the base with the adapter is the tuned network, value for value."""
        return not self.inexact and not self.left_out

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        config = self.adapter.config
        names = ("target", "norm_stats", "delta_dtype")
        facts: dict[str, Any] = {name: getattr(config, name) for name in names}
        facts |= {"exact": self.exact, "inexact": dict(self.inexact), "left_out": list(self.left_out)}
        return {**facts, "blocks": [asdict(block) for block in self.blocks]}


def extract_adapter(
    base: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    *,
    target: str | Sequence[str] | None = None,
    energy: float | None = None,
    blocks: Mapping[str, str | Sequence[str]] | None = None,
    delta_dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Extraction:
    """Make an adapter of the difference between a base and a network that was fine-tuned from it, by any method.

    ::

        found = extract_adapter(base, tuned, output="site-a")
        assert found.exact
        PeftModel.from_pretrained(base, "site-a")  # computes what `tuned` computes

    Norm statistics that differ are kept as values, under the policy ``norm_stats="target"``. A parameter that is equal
    in both has no delta. A value that is 0 in both may lose its sign.

    Args:
        base: The network before.
        tuned: The network after, or its state dict, of the same architecture. Merge adapters that it has first.
        target: Keep these blocks or tensors only, such as ``"block1 + head"``; None keeps all that differs.
        energy: Instead: keep the fewest blocks that hold this share of the squared norm of the whole difference, in
            (0, 1], and their statistics. A head whose values in the base are all 0 is new: always kept, never counted.
        blocks: The blocks of a network whose own cannot be told; see `anatomy_of`. Saved.
        delta_dtype: Dtype of the deltas; None takes float32, or float64 where that is not exact.
        output: A new folder to save the adapter to.

    Raises:
        BaseMismatchError: The networks are of different architectures or heads. Names the tensors that differ.
        AdapterError: For contradicting or unknown choices, networks that are equal, values that are not finite, and
            what no adapter can hold: differing buffers other than norm statistics.
        UnknownTargetError: The target matches nothing.
    """
    _check_choices(target, energy, delta_dtype)
    with bare(base):
        inventory = Inventory(base)
        values = _aligned(inventory, tuned)
        modules = inventory.modules.items()
        statistics = {join(path, name): path for path, module in modules for name in statistics_of(module)}
        moved = [name for name, value in values.items() if not torch.equal(inventory.tensors[name].cpu(), value)]
        anatomy = _anatomy(base, blocks, needed=target is not None or energy is not None)
        rows, kept = _kept(inventory, values, moved, statistics, anatomy, target, energy)
    if not kept:
        where = "" if target is None else f" in target {target!r}"
        raise AdapterError(f"The two networks are equal{where}: there is nothing to extract.")
    paths = {statistics[name] for name in kept if name in statistics}
    # A norm's statistics belong together: the adapter has all of a module's, also those that are equal in both.
    held = [name for name in values if (statistics[name] in paths if name in statistics else name in kept)]
    parameters = [name for name in held if name not in statistics]
    trained = {name for name, value in inventory.parameters.items() if value.is_floating_point()}
    if wrong := [name for name in parameters if name not in trained]:
        raise AdapterError(
            f"{shown(wrong)} differs, a buffer or an integer that no adapter holds: make it equal in both networks, or "
            "leave it out by target=."
        )
    bases = {name: inventory.tensors[name].detach().cpu() for name in parameters}
    dtype, deltas, inexact = _deltas(bases, values, delta_dtype)
    names = [row.name for row in rows if row.kept]
    together = "all" if rows and len(names) == len(rows) else " + ".join(names) or None
    config = SurgicalConfig(
        target=together if target is None else target if isinstance(target, str) else list(target),
        norm_stats="target" if paths else "frozen",
        delta_dtype=dtype,
        blocks=None if blocks is None else {k: [v] if isinstance(v, str) else list(v) for k, v in blocks.items()},
        selection={"extracted": {"energy": energy, "blocks": {row.name: row.share for row in rows}}},
        tensor_names=held,
        base_fingerprint=fingerprint(bases),
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        inference_mode=True,
    )
    own = {name: values[name] for name in held if name in statistics}
    adapter = Adapter(os.fspath(output or "extracted"), config, deltas, own, {})
    if output is not None:
        adapter.save(output)
    left = tuple(name for name in moved if name not in held)
    return Extraction(adapter, tuple(rows), inexact, left)


def _check_choices(target: Any, energy: float | None, delta_dtype: str | None) -> None:
    if target is not None and energy is not None:
        raise AdapterError(f"target={target!r} and energy={energy} both say what to keep: give one of them.")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"energy={energy}: give a share of the squared norm in (0, 1].")
    if delta_dtype is not None and delta_dtype not in DELTA_DTYPES:
        raise AdapterError(f"delta_dtype={delta_dtype!r}: choose one of {', '.join(DELTA_DTYPES)}, or leave it out.")


def _aligned(inventory: Inventory, tuned: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tuned value of every tensor of the base, by the base's names and in its dtypes, on the CPU."""
    if isinstance(tuned, PeftModel):
        raise AdapterError("The tuned network carries an adapter: merge it, and pass the plain network.")
    given = {**tuned.state_dict()} if isinstance(tuned, nn.Module) else dict(tuned)
    aliases: dict[str, list[str]] = {}
    for alias, name in inventory.aliases.items():
        aliases.setdefault(name, []).append(alias)
    found: dict[str, Tensor] = {}
    missing, shapes = [], []
    for name, own in inventory.tensors.items():
        places = [given.pop(place) for place in (name, *aliases.get(name, ())) if place in given]
        if not places:
            missing.append(name)
        elif places[0].shape != own.shape:
            shapes.append(f"{name} {tuple(own.shape)} in the base, {tuple(places[0].shape)} in the tuned network")
        elif not all(torch.equal(places[0], place) for place in places[1:]):
            raise BaseMismatchError(
                f"{name} and {', '.join(aliases[name])} are one tensor in the base and differ in the tuned network: "
                "open a base that does not tie them."
            )
        else:
            found[name] = places[0].detach().cpu()
    # Buffers that are not saved are in no state dict here, and may be in an older one.
    hidden = {join(path, name) for path, module in inventory.modules.items() for name in module._buffers}
    surplus = [name for name in given if name not in hidden]
    if missing or surplus or shapes:
        lacks = [f"the tuned network lacks {shown(missing)}"] * bool(missing)
        has = [f"it has besides {shown(surplus)}"] * bool(surplus)
        raise BaseMismatchError(
            f"The networks differ in more than values: {'; '.join([*lacks, *has, *shapes[:3]])}"
            f"{f' and {len(shapes) - 3} more' if len(shapes) > 3 else ''}. Take the base that it was tuned from; for "
            'another number of classes open that with a head of zeros, load_base(name, num_classes=..., head="zero").'
        )
    return {name: _in_dtype(name, value, inventory.tensors[name].dtype) for name, value in found.items()}


def _in_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise AdapterError(f"{name} of the tuned network holds NaN or Inf: the run diverged, or the file is damaged.")
    if value.dtype != dtype and not torch.equal(cast.to(value.dtype), value):
        raise BaseMismatchError(
            f"{name} is {value.dtype} in the tuned network, and would be rounded to the base's {dtype}: open both in "
            "the dtype of the tuned one."
        )
    return cast


def _anatomy(base: nn.Module, blocks: Any, needed: bool) -> Anatomy | None:
    try:
        return anatomy_of(base, blocks)
    except AnatomyError:
        if needed or blocks is not None:
            raise
        return None


def _kept(
    inventory: Inventory,
    values: Mapping[str, Tensor],
    moved: Sequence[str],
    statistics: Mapping[str, str],
    anatomy: Anatomy | None,
    target: Any,
    energy: float | None,
) -> tuple[list[BlockDifference], set[str]]:
    """A row for each block, and the tensors to keep among those that moved."""
    if anatomy is None:
        return [], set(moved)
    differs = set(moved)
    sizes, own = {}, {}
    for block in anatomy:
        names = [n for n in block.tensors if n in inventory.parameters and values[n].is_floating_point()]
        bases = [inventory.tensors[name].detach().cpu().double() for name in names]
        away = [values[name].double() - was for name, was in zip(names, bases, strict=True)]
        sizes[block.name] = sum(float(one.square().sum()) for one in away)
        own[block.name] = sum(float(one.square().sum()) for one in bases)
    news = {name for name in sizes if own[name] == 0 and sizes[name] > 0}
    total = sum(size for name, size in sizes.items() if name not in news)
    share = {name: 0.0 if name in news or not total else size / total for name, size in sizes.items()}
    if energy is None:
        kept = differs if target is None else differs & set(resolve(parse(target), anatomy))
    else:
        chosen, held = set(news), 0.0
        for name in sorted(share, key=lambda one: -share[one]):
            if held >= energy - 1e-12 or not share[name]:
                break
            chosen.add(name)
            held += share[name]
        kept = {name for block in anatomy if block.name in chosen for name in block.tensors} & differs
    rows = []
    for block in anatomy:
        names = [name for name in block.tensors if name in differs]
        counted = sum(name in statistics for name in names)
        size, before = sizes[block.name] ** 0.5, own[block.name] ** 0.5
        relative = size / before if before else None if size else 0.0
        is_kept = not kept.isdisjoint(names)
        counts = (len(names) - counted, size, relative, share[block.name], counted, is_kept)
        rows.append(BlockDifference(block.name, *counts))
    return rows, kept


def _deltas(
    bases: Mapping[str, Tensor], values: Mapping[str, Tensor], dtype: str | None
) -> tuple[str | None, dict[str, Tensor], dict[str, float]]:
    """The dtype for the config; name -> delta; name -> largest error of what does not round-trip."""
    for tried in (None, "float64") if dtype is None else (dtype,):
        deltas, inexact = {}, {}
        for name, base in bases.items():
            wide = torch.promote_types(base.dtype, torch.float32)
            tuned = values[name]
            away = tuned.double() - base.double()
            # -0.0 where nothing moved: base + -0.0 is the base, bit for bit, also where that is -0.0.
            delta = torch.where(tuned == base, -0.0, away).to(wide if tried is None else getattr(torch, tried))
            reached = base + delta.to(wide) if tried in ("bfloat16", "float16") else base + delta
            lost = (reached.to(base.dtype).double() - tuned.double()).abs()
            deltas[name] = delta
            if bool((lost > 0).any()):
                inexact[name] = float(lost.max())
        if not inexact:
            break
    return tried, deltas, inexact
