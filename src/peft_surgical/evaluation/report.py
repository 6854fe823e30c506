"""Reported numbers, each with what it takes to believe it, and tables of them, on the terminal and as Markdown.

A number is reported as a `Measurement`, which cannot be built without the rule that selected the run behind it, the
number of test examples, the seeds and an interval: a table made of them cannot hide that a run was chosen on test data.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import DataError
from ..extras import require
from ..files import MAX_BYTES
from ..texts import escaped, markdown_text
from .intervals import interval_of_runs

ORACLE = "oracle"
"""The selection rule of a number whose run was chosen by looking at test data."""
_PATH = re.compile(r"(?<!\S)(?:/|[A-Za-z]:[/\\])[^\s,;]+")
"""A word of a text that is an absolute path."""


@dataclass(frozen=True)
class Measurement:
    """One reported number with everything needed to believe it.

    Attributes:
        name: The metric, such as ``accuracy`` or ``worst_group_accuracy``.
        dataset: What it was measured on, such as ``cifar10c/frost severity 5``.
        value: The number; accuracies and errors as fractions.
        low, high: The ends of its 95% interval.
        interval: What the interval is: ``wilson`` (one run, over test examples) or ``t`` (over seeds).
        n: Test examples per seed.
        seeds: The seeds behind the number.
        selection: How the run was chosen, in words; `ORACLE` if it was chosen on test data, ``none`` if nothing was.

    Raises:
        DataError: If a part is missing, not finite, in percent, or outside its interval.
    """

    name: str
    dataset: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    seeds: tuple[int, ...]
    selection: str

    def __post_init__(self) -> None:
        for part in ("name", "dataset", "interval", "selection", "seeds"):
            if not getattr(self, part):
                raise DataError(f"a measurement needs its {part}: say where {self.name or 'the number'} comes from")
        if self.n <= 0:
            raise DataError(f"{self.name} was measured on {self.n} examples: n must be positive")
        if not all(math.isfinite(v) for v in (self.value, self.low, self.high)):
            raise DataError(
                f"{self.name} is {self.value} in [{self.low}, {self.high}]: only finite numbers are reported"
            )
        if "accuracy" in self.name and not 0 <= self.value <= 1:
            raise DataError(f"{self.name} is {self.value}: accuracies are fractions in [0, 1]; divide percent by 100")
        if not self.low <= self.value <= self.high:
            raise DataError(f"{self.name} = {self.value} lies outside its interval [{self.low}, {self.high}]")

    def __str__(self) -> str:
        """In percent, with the rule behind it."""
        half = (self.high - self.low) / 2
        seeds = "seed" if len(self.seeds) == 1 else "seeds"
        return (
            f"{self.name} on {self.dataset}: {100 * self.value:.1f} ± {100 * half:.1f} % "
            f"({self.interval} 95% interval, n = {self.n}, {len(self.seeds)} {seeds}, selection: {self.selection})"
        )


def measure(
    name: str, values: Sequence[float], *, dataset: str, n: int, seeds: Sequence[int], selection: str
) -> Measurement:
    """A `Measurement` from one proportion per seed: Wilson's interval for one seed, Student's t for more.

    Values are fractions, one for each of the seeds, and the interval is cut at 0 and 1. The other arguments are the
    attributes of `Measurement`.

    Raises:
        DataError: If values and seeds do not pair up, or as `Measurement` says.
    """
    if len(values) != len(seeds) or len(set(seeds)) != len(seeds) or not values:
        raise DataError(
            f"{len(values)} values for the seeds {list(seeds)}: pass one value for each seed, each seed once"
        )
    single = len(values) == 1
    value, low, high = interval_of_runs(values, n)
    low, high = max(0.0, low), min(1.0, high)  # Student's t interval is not bounded by 0 and 1
    return Measurement(name, dataset, value, low, high, "wilson" if single else "t", n, tuple(seeds), selection)


def plus_minus(values: Sequence[float], n: int | None = None, sign: str = "", ratio: float = 0.0) -> str:
    """Mean of fractions in percent ± half its 95% interval, such as ``80.1 ± 1.8``.

    Args:
        values: One fraction for each seed: Student's t over them. A single one has Wilson's interval over ``n`` test
            examples, and without ``n`` none; no value at all is ``-``.
        n: Test examples of one seed.
        sign: ``"+"`` shows the sign of differences.
        ratio: Correction for images that the seeds share, see `mean_interval`.
    """
    if not values:
        return "-"
    if len(values) == 1 and n is None:
        return f"{100 * values[0]:{sign}.1f}"
    value, low, high = interval_of_runs(values, n or 0, ratio)
    return f"{100 * value:{sign}.1f} ± {50 * (high - low):.1f}"


@dataclass(frozen=True)
class TextTable:
    """A table of texts with what has to be said below it.

    Raises:
        DataError: If a row has another number of cells than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise DataError(
                    f"a row of {len(row)} cells under {len(self.header)} columns: {', '.join(row)}; give each row "
                    "a cell for each column, '-' where there is nothing"
                )

    def markdown(self) -> str:
        """A Markdown table, an empty line, and the caption."""
        rows = [[markdown_text(cell) for cell in row] for row in (self.header, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(self.header), *rows[1:])]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])]) + "\n"

    def save(self, file: str | Path) -> None:
        """Write `markdown` to a file."""
        Path(file).write_text(self.markdown(), encoding="utf-8")

    def show(self, **options: Any) -> None:
        """Print it through rich, in 150 columns where the output is no terminal; options are those of rich's table."""
        rich_table, console = require("rich.table", "showing a table"), require("rich.console", "showing a table")
        text = require("rich.text", "showing a table").Text
        table = rich_table.Table(caption=text(self.caption), **options)
        for name in self.header:
            table.add_column(text(name))
        for row in self.rows:
            table.add_row(*(text(escaped(cell)) for cell in row))
        console.Console(width=None if sys.stdout.isatty() else 150).print(table)


@dataclass(frozen=True)
class Report:
    """What was evaluated, and the numbers: the content of a model card's results, and of a recipe's report file.

    Attributes:
        model: The base model.
        target: The tuned target as the user wrote it, ``none`` for the base itself.
        measurements: The numbers, in the order in which to show them.
        settings: Everything else needed to run it again: plain JSON values.
    """

    model: str
    target: str
    measurements: tuple[Measurement, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def find(self, name: str, dataset: str | None = None) -> Measurement:
        """The first measurement of this metric, on this dataset if one is given.

        Raises:
            DataError: If there is none; the message lists what there is.
        """
        for m in self.measurements:
            if m.name == name and dataset in (None, m.dataset):
                return m
        there = "; ".join(f"{m.name} on {m.dataset}" for m in self.measurements) or "nothing"
        raise DataError(f"no {name!r}{f' on {dataset!r}' if dataset else ''} in this report: it holds {there}")

    def to_markdown(self) -> str:
        """A table in percent, each row with its interval, n, seeds and selection rule."""
        header = ["metric", "data", "value (%)", "95% interval (%)", "n", "seeds", "selection"]
        rows = []
        for m in self.measurements:
            ends = f"{100 * m.low:.1f} to {100 * m.high:.1f} ({m.interval})"
            seeds = ", ".join(map(str, m.seeds))
            rows.append([m.name, m.dataset, f"{100 * m.value:.1f}", ends, str(m.n), seeds, m.selection])
        return TextTable(header, rows).markdown()

    def to_json(self) -> str:
        """JSON text that `from_json` turns back into an equal report."""
        try:
            return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"the settings of this report are no plain JSON ({error}): convert them first") from error

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            DataError: If the text is no JSON, or a part is missing, unknown or not valid.
        """
        try:
            content = json.loads(text)
            measurements = [{**m, "seeds": tuple(m["seeds"])} for m in content["measurements"]]
            found = cls(**{**content, "measurements": tuple(Measurement(**m) for m in measurements)})
            _check_types(found)
            for one in found.measurements:
                _check_types(one)
            return found
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            expected = ", ".join(f.name for f in fields(cls))
            reason = escaped(str(error))[:200]
            raise DataError(
                f"not a report ({reason}): expected the JSON of {expected}, as Report.to_json writes it"
            ) from error

    def save(self, file: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(file).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Report:
        """Read a file that `save` wrote; errors are those of `from_json` and name the file."""
        try:
            if (size := Path(file).stat().st_size) > MAX_BYTES:
                raise DataError(f"not a report, which has at most {MAX_BYTES:,} bytes, but {size:,} bytes")
            return cls.from_json(Path(file).read_text(encoding="utf-8"))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: {error}") from error
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): name the report.json of a run") from error

    def without_paths(self, base: str | None = None) -> Report:
        """The same without absolute paths of this machine; the base's, where it is one, becomes ``base``."""
        places = [self.model, *(self.settings.get(name) for name in ("model", "data_from", "source_from"))]
        names = {text: PureWindowsPath(text).name for text in places if isinstance(text, str) and _is_absolute(text)}
        if base is not None and self.model in names:
            names[self.model] = base
        return Report.from_json(json.dumps(scrubbed(json.loads(self.to_json()), names)))


_TYPES: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("model", "target", "name", "dataset", "interval", "selection"), (str, "a text")),
    **dict.fromkeys(("value", "low", "high"), ((int, float), "a number")),
    "n": (int, "a number of examples"),
    "settings": (Mapping, "a mapping"),
}


def _check_types(found: Report | Measurement) -> None:
    for name, value in vars(found).items():
        kind, what = _TYPES.get(name, (object, ""))
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is no {what.removeprefix('a ')}")
        if name == "seeds" and not all(isinstance(seed, int) for seed in value):
            raise TypeError("seeds are no whole numbers")


def scrubbed(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """Plain JSON values without absolute paths: the last part of each path stays.

    Args:
        value: Strings are searched for paths at any depth.
        names: Path -> what to write for it, wherever it occurs. None takes a string that begins with a path for one
            path, blanks included.
    """
    if isinstance(value, Mapping):
        return {scrubbed(key, names): scrubbed(part, names) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(part, names) for part in value]
    if not isinstance(value, str):
        return value
    if names is None and _is_absolute(value):
        return PureWindowsPath(value).name  # it knows both separators
    for path in sorted(names or (), key=len, reverse=True):
        value = value.replace(path, (names or {})[path])
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)


def _is_absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
