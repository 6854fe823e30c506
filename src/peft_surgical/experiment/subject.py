"""What an experiment works on: one base and one data set, each opened once, and the methods that fit this network."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from torch import Tensor

from ..bases.load import Base, load_base
from ..blocks import DATA_TARGETS, Anatomy, anatomy_of, parse, resolve
from ..choosing.methods import METHODS, Method, method_of
from ..data.labelled import Data, read_data
from ..errors import ConfigError, UnknownTargetError
from ..training.search import NONE
from .newhead import modules_of_head, with_new_head
from .rows import Rows

KEPT_OR_NEW = ("auto", "keep", "new")
SEARCHES = ("auto", "race", "cross-val", "greedy")
"""What can be asked for beside a target or a method: training candidates, see `choosing`."""


@dataclass(eq=False)
class Subject:
    """One base and one data set.

    Attributes:
        model: As for `load_base`.
        source: As for `read_data`; or a function from a seed to `Data`, or to an object with the same attributes,
            which then decides everything about the images.
        lrs: Learning rates to try.
        head_lrs: The same where the head alone is tuned.
        reading: Further arguments of `read_data`: sizes and columns.
        augment: As for `load_base`.
        image_size: As for `load_base`.
        weights: As for `load_base`.
        head: As for `load_base`: ``auto``, ``keep`` or ``new``.
        seed: The seed whose data stands for all in the keys of runs.
        opener: Opens the base, called as `load_base` is.
        seeded_base: Whether the seed that the opener gets decides about the base even where its head is kept.
    """

    model: str
    source: Any
    _: KW_ONLY
    lrs: tuple[float, ...] = (1e-3, 1e-4)
    head_lrs: tuple[float, ...] = (1e-2, 1e-3)
    reading: Mapping[str, Any] = field(default_factory=dict)
    augment: str = "none"
    image_size: int | None = None
    weights: str = "pretrained"
    head: str = "auto"
    seed: int = 0
    opener: Callable[..., Base] = load_base
    seeded_base: bool = False

    def __post_init__(self) -> None:
        if self.head not in KEPT_OR_NEW:
            raise ConfigError(f"head={self.head!r}: choose one of {', '.join(KEPT_OR_NEW)}")
        self._data: dict[int, Data] = {}
        self._bases: dict[tuple[int, bool], Base] = {}
        self._rows: dict[str, Any] = {}

    def data(self, seed: int) -> Data:
        """The images of a seed: others only where a part is drawn."""
        first = self._read(self.seed)
        return self._read(seed) if self.draws else first

    @property
    def draws(self) -> bool:
        """Whether seeds change who tunes, validates and tests."""
        return any("seed" in how for how in self._read(self.seed).origin.values())

    def _read(self, seed: int) -> Data:
        if seed not in self._data:
            read = self.source if callable(self.source) else functools.partial(_read_data, self.source, self.reading)
            self._data[seed] = read(seed)
        return self._data[seed]

    def opening(self, seed: int, zero: bool = False) -> dict[str, Any]:
        """The arguments of `load_base`, beside the name, that open the base of a run."""
        names = list(self.data(self.seed).label_names)
        head = "zero" if zero else self.head
        found = {"label_names": names, "head": head, "weights": self.weights, "seed": seed}
        return found if self.image_size is None else {**found, "image_size": self.image_size}

    def base(self, seed: int, zero: bool = False) -> Base:
        """The base of a run, not to be changed; ``zero`` for one whose new head is all zeros."""
        if seed != self.seed and not (self.seeded_base or self.head_is_new):
            seed = self.seed  # nothing is drawn
        if (seed, zero) not in self._bases:
            if len(self._bases) > 1:  # a whole network each
                self._bases.clear()
            with warnings.catch_warnings():
                # `rows` numbers labels as the head that was kept does, and `plan` says so: no news for the user.
                warnings.filterwarnings("ignore", "The head is kept")
                self._bases[seed, zero] = self.opener(self.model, **self.opening(seed, zero), augment=self.augment)
        return self._bases[seed, zero]

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The blocks of the base."""
        return anatomy_of(self.base(self.seed).model)

    @functools.cached_property
    def head_is_new(self) -> bool:
        """Whether the head has to be trained whatever the target is."""
        return self.base(self.seed).head_is_new

    @property
    def outputs(self) -> tuple[int, ...] | None:
        """For each class of the data the output that stands for it; see `Base`."""
        return self.base(self.seed).outputs

    def plan(self) -> str:
        """What the runs are going to see: the parts of the data, how each came about, and what becomes of the head."""
        data = self.data(self.seed)
        lines = [f"{part}: {len(images)} images, {data.origin[part]}" for part, images in data.parts.items()]
        return "\n".join([*lines, f"head: {self.base(self.seed).head_note}"])

    def rows(self, part: str, seed: int) -> Rows:
        """One part of the data, as the network takes it."""
        train, evaluation = self._transforms
        data = self.data(seed)
        if data is not self._rows.get("data"):
            self._rows = {"data": data}
        if part not in self._rows:
            augmented = part == "tuning" and self.augment != "none"
            transform = train if augmented else evaluation
            self._rows[part] = Rows(data.parts[part], transform, not augmented, self.outputs)
        return self._rows[part]

    @functools.cached_property
    def _transforms(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
        base = self.base(self.seed)
        return base.transform_train, base.transform_eval

    @functools.cached_property
    def _whole_head(self) -> list[str]:
        return modules_of_head(self.base(self.seed).model, self.anatomy)

    # --- methods ---

    def method(self, name: str) -> Method:
        """A row of `METHODS` or a target of this network.

        Raises:
            ConfigError: It is neither.
        """
        others = f"Methods: {', '.join(METHODS)}. Searches: {', '.join(SEARCHES)}."
        if name in SEARCHES or (name not in METHODS and name in DATA_TARGETS):
            raise ConfigError(f"{name!r} names nothing to train by itself. {others}")
        row = method_of(name)
        try:
            resolve(parse(row.target), self.anatomy)
        except UnknownTargetError as error:
            raise ConfigError(f"{error} {others}") from error
        return row

    def head_only(self, name: str) -> bool:
        """Whether a method tunes the head and nothing else."""
        head = self.anatomy["head"].tensors if "head" in self.anatomy else ()
        return set(resolve(parse(self.method(name).target), self.anatomy)) <= set(head)

    def rates(self, name: str) -> tuple[float | None, ...]:
        """The learning rates to try for a method."""
        if name == NONE:
            return (None,)
        return self.head_lrs if self.head_only(name) else self.lrs

    def prepared(self, name: str) -> tuple[Method, bool, dict[str, Any]]:
        """A method as it is run here: the method, whether its base has a head of zeros, and fields of the config."""
        row = self.method(name)
        if not self.head_is_new:
            return row, False, {}
        if self.head_only(name):
            return row, True, {}
        if self._whole_head:
            return with_new_head(row), False, {"modules_to_save": self._whole_head}
        return with_new_head(replace(row, target=f"{row.target} + head")), True, {}


def _read_data(source: Any, reading: Mapping[str, Any], seed: int) -> Data:
    return read_data(source, seed=seed, **reading)
