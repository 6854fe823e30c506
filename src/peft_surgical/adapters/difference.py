"""What two adapters have in common: distance, angle and signs of their deltas, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BaseMismatchError
from .adapter import Adapter, AdapterSource, read_adapter

if TYPE_CHECKING:
    from rich.table import Table

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
        cosine: Of the angle between them, in [-1, 1]; None where one of them is zero.
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
        width = max(len(row.name) for row in (*self.tensors, self.overall))
        lines = [f"{row.name:<{width}}  " + "  ".join(f"{cell:>9}" for cell in _cells(row)) for row in self._rows()]
        return "\n".join([f"{self.a} (a) and {self.b} (b)", " " * width + "  " + _HEADER, *lines])

    def __rich__(self) -> Table:
        """For ``rich.print``; the last row is that of all tensors together."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("tensor", title=escape(f"{self.a} (a) and {self.b} (b)"), title_justify="left", box=None)
        for column in _COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self._rows():
            table.add_row(escape(row.name), *_cells(row))
        return table

    def _rows(self) -> tuple[TensorDifference, ...]:
        return (*self.tensors, self.overall)


_COLUMNS = ("tuned by", "norm a", "norm b", "distance", "cosine", "signs")
_HEADER = "  ".join(f"{column:>9}" for column in _COLUMNS)


def _cells(row: TensorDifference) -> list[str]:
    numbers = [f"{value:.4g}" for value in (row.norm_a, row.norm_b, row.distance)]
    cosine = "-" if row.cosine is None else f"{row.cosine:+.4f}"
    signs = "-" if row.sign_agreement is None else f"{row.sign_agreement:.1%}"
    return [row.tuned_by, *numbers, cosine, signs]


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
    deltas_a, deltas_b = first.scaled(), second.scaled()
    rows, products = [], 0.0
    for name in dict.fromkeys((*deltas_a, *deltas_b)):
        one, two = deltas_a.get(name), deltas_b.get(name)
        if one is not None and two is not None and one.shape != two.shape:
            raise BaseMismatchError(
                f"{name} has the shape {tuple(one.shape)} in {first.label} and {tuple(two.shape)} in {second.label}: "
                "they belong to other architectures or heads and cannot be compared."
            )
        row, product = _compare(name, one, two)
        rows.append(row)
        products += product
    return Difference(
        first.label,
        second.label,
        tuple(rows),
        _overall(rows, products, deltas_a, deltas_b),
        _values(first, second),
        _settings(first, second),
        _other_bases(first, second),
    )


def _compare(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> tuple[TensorDifference, float]:
    """The row of one tensor, and the deltas' inner product."""
    known = a if a is not None else b
    assert known is not None
    one = torch.zeros(known.numel(), dtype=torch.float64) if a is None else a.double().flatten()
    two = torch.zeros(known.numel(), dtype=torch.float64) if b is None else b.double().flatten()
    product = float(one @ two)
    row = TensorDifference(
        name,
        "both" if a is not None and b is not None else "b" if a is None else "a",
        known.numel(),
        float(one.norm()),
        float(two.norm()),
        float((one - two).norm()),
        _cosine(product, float(one.norm()), float(two.norm())),
        _agreement(*_signs(one, two)),
    )
    return row, product


def _signs(one: torch.Tensor, two: torch.Tensor) -> tuple[int, int]:
    """How many values are zero in neither, and in how many of these the signs are equal."""
    moved = (one != 0) & (two != 0)
    return int(moved.sum()), int((moved & ((one > 0) == (two > 0))).sum())


def _agreement(moved: int, equal: int) -> float | None:
    return equal / moved if moved else None


def _cosine(product: float, norm_a: float, norm_b: float) -> float | None:
    if norm_a == 0 or norm_b == 0:
        return None
    return max(-1.0, min(1.0, product / norm_a / norm_b))


def _overall(
    rows: Sequence[TensorDifference],
    products: float,
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
) -> TensorDifference:
    norm_a, norm_b, distance = (
        math.sqrt(sum(getattr(row, field) ** 2 for row in rows)) for field in ("norm_a", "norm_b", "distance")
    )
    counts = [_signs(a[name].flatten(), b[name].flatten()) for name in a if name in b]
    agreement = _agreement(sum(moved for moved, _ in counts), sum(equal for _, equal in counts))
    tuned_by = {row.tuned_by for row in rows}
    return TensorDifference(
        "all",
        tuned_by.pop() if len(tuned_by) == 1 else "both",
        sum(row.values for row in rows),
        norm_a,
        norm_b,
        distance,
        _cosine(products, norm_a, norm_b),
        agreement,
    )


def _values(a: Adapter, b: Adapter) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    ours, theirs = {**a.statistics, **a.whole}, {**b.statistics, **b.whole}
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            found[name] = None
        elif not torch.equal(ours[name], theirs[name]):
            found[name] = float((ours[name].double() - theirs[name].double()).abs().max())
    return found


def _settings(a: Adapter, b: Adapter) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(a.config, name), getattr(b.config, name)) for name in _SETTINGS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _other_bases(a: Adapter, b: Adapter) -> tuple[str, ...]:
    ours, theirs = a.config.base_fingerprint or {}, b.config.base_fingerprint or {}
    return tuple(name for name in ours if name in theirs and ours[name] != theirs[name])
