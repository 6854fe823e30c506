"""What an experiment works on: one base and one data set, each opened once, and the methods that fit this network.

A head for new classes is trained alone at first and then together with the target, and saved whole with the adapter: a
head whose values are a random draw has nothing to be a delta of, and its first gradients would disturb what was
pretrained (Kumar et al. 2022). `with_new_head` turns any method into one that does so.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..bases.load import Base, load_base
from ..blocks import DATA_TARGETS, Anatomy, anatomy_of, parse, resolve
from ..choosing.methods import METHODS, HeadFirst, Method, Progress, Schedule, method_of
from ..choosing.scores import BlockScores
from ..data.labelled import Data, items, read_data
from ..errors import ConfigError, UnknownTargetError
from ..training.search import NONE

KEPT_OR_NEW = ("auto", "keep", "new")
SEARCHES = ("auto", "race", "cross-val", "greedy")
"""What can be asked for beside a target or a method: training candidates, see `choosing`."""
LABELLED = "tuning and validation"
"""All images that may be tuned on once everything is chosen."""
SHARE = 1 / 3
"""Share of a run during which a new head trains alone."""
_KEPT_BYTES = 2**30  # transformed images of one part that are kept in memory rather than decoded in every epoch


class Rows(Dataset):
    """A part of the data with its labels at hand, and its images in memory once they have been read, if they fit.

    Args:
        part: As for `items`.
        transform: As for `items`.
        keep: Whether an image may be kept in memory once it has been transformed.
        outputs: As for `items`.
    """

    def __init__(
        self, part: Any, transform: Callable[[Any], Tensor], keep: bool, outputs: Sequence[int] | None = None
    ) -> None:
        labels: list[int] = list(part.select_columns(["label"])["label"][:])
        self.labels = labels if outputs is None else [outputs[label] for label in labels]
        grouped = "group" in part.column_names
        self.groups = torch.tensor(part.select_columns(["group"])["group"][:]) if grouped else None
        self.items = items(part, transform, outputs)
        self.keep = keep
        self.kept: dict[int, dict[str, Any]] = {}

    @property
    def label_tensor(self) -> Tensor:
        """int64 (n,)."""
        return torch.tensor(self.labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.kept:
            return self.kept[index]
        row: dict[str, Any] = self.items[index]
        if self.keep and row["pixel_values"].nbytes * len(self) <= _KEPT_BYTES:
            self.kept[index] = row
        return row


@dataclass(eq=False)
class Subject:
    """One base and one data set.

    Attributes:
        model: As for `load_base`.
        source: As for `read_data`; or a function from a seed to `Data`, or to an object with the same attributes,
            which then decides everything about the images.
        lrs: Learning rates to try.
        head_lrs: Learning rates to try where the head alone is tuned.
        reading: Further arguments of `read_data`: sizes and columns.
        augment: As for `load_base`.
        image_size: As for `load_base`.
        weights: As for `load_base`.
        head: As for `load_base`: ``auto``, ``keep`` or ``new``.
        seed: The seed whose data stands for that of all seeds in the keys of runs.
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
        """The images of a seed, which differ between seeds only where a part is drawn."""
        first = self._read(self.seed)
        return self._read(seed) if self.draws else first

    @property
    def draws(self) -> bool:
        """Whether a seed changes which images are tuned on, validated on and tested on."""
        return any("seed" in how for how in self._read(self.seed).origin.values())

    def _read(self, seed: int) -> Data:
        if seed not in self._data:
            given = callable(self.source)
            self._data[seed] = self.source(seed) if given else read_data(self.source, seed=seed, **self.reading)
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

    def rows(self, part: str, seed: int) -> Rows:
        """One part of the data, as the network takes it; ``LABELLED`` for the images to tune and to validate on."""
        data = self.data(seed)
        if data is not self._rows.get("data"):
            self._rows = {"data": data}
        if part not in self._rows:
            train, evaluation = self._transforms
            augmented = part in ("tuning", LABELLED) and self.augment != "none"
            transform = train if augmented else evaluation
            labelled = [data.parts[name] for name in ("tuning", "validation")]
            images = concatenate_datasets(labelled) if part == LABELLED else data.parts[part]
            self._rows[part] = Rows(images, transform, not augmented, self.outputs)
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
        if name == NONE or self.method(name).solved:
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


# --- a new head ---


@dataclass(frozen=True)
class NewHeadFirst:
    """The head alone, then the head at the full rate and all other tensors by a schedule of their own.

    That schedule sees the rest of the run as if it were the whole, and scores without the head's: the large gradients
    of a random head say nothing about the data.

    Attributes:
        others: All tensors but the head's.
        inner: Their schedule after the first ``share`` of the run; None trains them at the full rate.
        share: Share of the run for the head alone. A schedule that data drives begins with the next whole epoch.
    """

    others: tuple[str, ...]
    inner: Schedule | None = None
    share: float = SHARE

    @property
    def criterion(self) -> str | None:
        """See `Schedule`."""
        return None if self.inner is None else self.inner.criterion

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> Mapping[str, float]:
        """See `Schedule`."""
        if progress.share < self.share:
            return dict.fromkeys(self.others, 0.0)
        if self.inner is None:
            return {}
        begun = math.ceil(self.share * progress.total_steps)
        rest = Progress(progress.step - begun, progress.total_steps - begun, progress.epoch)
        others = set(self.others)
        if scores is not None:
            own = {name: score for name, score in scores.tensor_scores.items() if name in others}
            scores = replace(scores, tensor_scores=own)
        return {name: factor for name, factor in self.inner.factors(rest, scores).items() if name in others}


def with_new_head(row: Method) -> Method:
    """The method with the head trained first. LP-FT trains it first anyway and stays as it is."""
    schedule = row.schedule

    def first(anatomy: Anatomy, options: dict[str, Any]) -> Schedule:
        inner = None if schedule is None else schedule(anatomy, options)
        if isinstance(inner, HeadFirst):
            return inner
        head = set(anatomy["head"].tensors)
        return NewHeadFirst(tuple(name for name in anatomy.tensors if name not in head), inner)

    return replace(row, schedule=first)


def modules_of_head(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The names in ``modules_to_save`` by which exactly the head is saved whole; empty where there are none.

    PEFT takes every module whose path *ends* in such a name, and no tensors beside modules.
    """
    head = anatomy["head"]
    inside = all(any(name.startswith(f"{path}.") for path in head.modules) for name in head.tensors)
    ends = tuple(head.modules)
    meant = {path for path, _ in model.named_modules() if path and path.endswith(ends)}
    return list(head.modules) if inside and meant == set(ends) else []
