"""What two adapters have in common: distance, angle and signs of their deltas, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..fingerprints import differing
from .adapter import Adapter, AdapterSource, read_adapter
from .combination import check_shapes

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("tuned by", "norm a", "norm b", "distance", "cosine", "signs")
_SETTINGS = ("target", "norm_stats", "scale", "delta_dtype", "modules_to_save", "base_model_name_or_path")


@dataclass(frozen=True)
class TensorDifference:
    """Two deltas of one tensor, each times its adapter's scale. One that an adapter does not tune is zero there.

    Attributes:
        name: The tensor.
        tuned_by: ``"a"``, ``"b"`` or ``"both"``.
        values: Number of values.
        norm_a: L2 norm of the first.
        norm_b: L2 norm of the second.
        distance: L2 norm of their difference.
        cosine: Cosine of the angle between them, in [-1, 1]; None where one of them is zero.
        sign_agreement: Among the values that are zero in neither, the share with equal signs; None if there is none.
    """

    name: str
    tuned_by: str
    values: int
    norm_a: float
    norm_b: float
    distance: float
    cosine: float | None
    sign_agreement: float | None


@dataclass(frozen=True)
class Difference:
    """Two adapters compared; ``print`` shows it as text, ``rich.print`` as a table.

    Attributes:
        a: Name of the first.
        b: Name of the second.
        tensors: Every tensor that one of them tunes.
        overall: All of these taken as one vector.
        values: Statistics and whole modules that are not equal in both: name -> largest difference, or None where
            only one of them carries it.
        settings: What their configs say differently: name -> (a, b).
        other_bases: Common tensors whose base values differ by their fingerprints; their deltas do not compare.
    """

    a: str
    b: str
    tensors: tuple[TensorDifference, ...]
    overall: TensorDifference
    values: Mapping[str, float | None]
    settings: Mapping[str, tuple[Any, Any]]
    other_bases: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both change a base in the same way, value for value."""
        return self.overall.distance == 0 and not self.values and not self.other_bases

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "same": self.same, "settings": {key: list(pair) for key, pair in self.settings.items()}}

    def __str__(self) -> str:
        rows = [("", _COLUMNS), *((row.name, _cells(row)) for row in (*self.tensors, self.overall))]
        width = max(len(name) for name, _ in rows)
        lines = ["  ".join([f"{name:<{width}}", *(f"{cell:>9}" for cell in cells)]) for name, cells in rows]
        return "\n".join([f"{self.a} (a) and {self.b} (b)", *lines])

    def __rich__(self) -> Table:
        """For ``rich.print``; the last row is that of all tensors together."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("tensor", title=escape(f"{self.a} (a) and {self.b} (b)"), title_justify="left", box=None)
        for column in _COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for row in (*self.tensors, self.overall):
            table.add_row(escape(row.name), *_cells(row))
        return table


def _cells(row: TensorDifference) -> tuple[str, ...]:
    numbers = (f"{value:.4g}" for value in (row.norm_a, row.norm_b, row.distance))
    cosine = "-" if row.cosine is None else f"{row.cosine:+.4f}"
    signs = "-" if row.sign_agreement is None else f"{row.sign_agreement:.1%}"
    return (row.tuned_by, *numbers, cosine, signs)


def diff(a: AdapterSource, b: AdapterSource) -> Difference:
    """Compare two adapters from their files; no base is needed.

    ::

        print(diff("site-a", "site-b"))

    Args:
        a: A folder, a Hub id, or a live adapter; see `read_adapter`.
        b: The other.

    Raises:
        AdapterFileError: One of them cannot be read.
        BaseMismatchError: A common tensor has two shapes: the adapters are of different architectures or heads.
    """
    first, second = read_adapter(a), read_adapter(b)
    check_shapes(first, second)
    deltas_a, deltas_b = first.scaled(), second.scaled()
    sums = {name: _sums(deltas_a.get(name), deltas_b.get(name)) for name in {**deltas_a, **deltas_b}}
    tuned_by = {name: "a" if name not in deltas_b else "both" if name in deltas_a else "b" for name in sums}
    tuners = {*tuned_by.values()}
    together = _Sums(*(sum(column) for column in zip(_Sums(), *sums.values(), strict=True)))
    settings = {name: (getattr(first.config, name), getattr(second.config, name)) for name in _SETTINGS}
    marks_a, marks_b = first.config.base_fingerprint or {}, second.config.base_fingerprint or {}
    return Difference(
        first.label,
        second.label,
        tuple(_row(name, tuned_by[name], found) for name, found in sums.items()),
        _row("all", tuners.pop() if len(tuners) == 1 else "both", together),
        _values(first, second),
        {name: pair for name, pair in settings.items() if pair[0] != pair[1]},
        tuple(name for name in differing(marks_a, marks_b) if name in deltas_a and name in deltas_b),
    )


class _Sums(NamedTuple):
    """What adds up over tensors: numbers of values, and inner products of two deltas."""

    values: int = 0
    a_a: float = 0.0
    b_b: float = 0.0
    a_b: float = 0.0
    squared_distance: float = 0.0
    moved: int = 0  # values that are zero in neither
    equal: int = 0  # those of them whose signs are equal


def _sums(a: torch.Tensor | None, b: torch.Tensor | None) -> _Sums:
    known = a if a is not None else b
    assert known is not None
    one, two = (
        torch.zeros(known.numel(), dtype=torch.float64) if delta is None else delta.double().flatten()
        for delta in (a, b)
    )
    moved = (one != 0) & (two != 0)
    equal = moved & ((one > 0) == (two > 0))
    away = one - two
    products = (float(one @ one), float(two @ two), float(one @ two), float(away @ away))
    return _Sums(known.numel(), *products, int(moved.sum()), int(equal.sum()))


def _row(name: str, tuned_by: str, sums: _Sums) -> TensorDifference:
    norm_a, norm_b = sums.a_a**0.5, sums.b_b**0.5
    return TensorDifference(
        name,
        tuned_by,
        sums.values,
        norm_a,
        norm_b,
        sums.squared_distance**0.5,
        max(-1.0, min(1.0, sums.a_b / norm_a / norm_b)) if norm_a and norm_b else None,
        sums.equal / sums.moved if sums.moved else None,
    )


def _values(a: Adapter, b: Adapter) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    ours, theirs = {**a.statistics, **a.whole}, {**b.statistics, **b.whole}
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            found[name] = None
        elif not torch.equal(ours[name], theirs[name]):
            found[name] = float((ours[name].double() - theirs[name].double()).abs().max())
    return found
