"""Metrics, their 95% intervals, and the frozen :class:`Report` that carries them.

Everything here is a pure function of its arguments. Accuracies and errors are fractions in [0, 1]; percent appears only
where text is printed. A number is reported as a :class:`Measurement`, which cannot be built without the rule that
selected the run behind it, the number of test examples, the seeds and an interval: a table made of them cannot hide
that it peeked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import DataError

ORACLE = "oracle"
"""The selection rule of a number whose run was chosen by looking at test data."""

ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error per ImageNet-C corruption, mean over severities (Hendrycks & Dietterich 2019): mCE divides by it."""

SEVERITIES = (1, 2, 3, 4, 5)
"""The severities of ImageNet-C and CIFAR-10-C."""


class Interval(NamedTuple):
    """An estimate between the ends of its confidence interval, all in the unit of the estimate."""

    value: float
    low: float
    high: float


def predict_logits(model: nn.Module, inputs: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (n, classes) on the CPU, computed in ``eval()`` without gradients; the modes are restored after.

    Args:
        model: Maps a batch of inputs to logits (n, classes), or returns them as ``.logits``.
        inputs: (n, ...) on any device; moved to the model's, batch by batch.
        batch_size: Part of the arithmetic: kernels may differ in the last bit between batch sizes, so compare logits
            bit for bit only at the same one.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            outputs = [model(batch.to(device)) for batch in inputs.split(batch_size)]
    finally:
        # Module by module: a single train() would also wake modules that their owner had put into eval.
        for module, training in modes.items():
            module.training = training
    return torch.cat([getattr(output, "logits", output).cpu() for output in outputs])


def predicted_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """The predicted classes (n,), of as many examples as there are labels; none is allowed.

    Args:
        scores: Logits (n, classes), of which the first largest counts, or predicted classes (n,).
        labels: int64 (n,).

    Raises:
        DataError: If the shapes do not fit, a score is NaN, or a predicted class is no whole number.
    """
    predictions = scores.argmax(1) if scores.ndim == 2 and scores.shape[1] else scores
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise DataError(
            f"scores of shape {tuple(scores.shape)} do not fit labels of shape {tuple(labels.shape)}: "
            "pass logits (n, classes) or predictions (n,), and labels (n,)"
        )
    if scores.is_floating_point() and scores.isnan().any():
        raise DataError("the scores hold NaN: the model diverged; lower the learning rate or check the input's scale")
    if predictions.is_floating_point() and (broken := predictions[predictions != predictions.round()]).numel():
        raise DataError(f"{float(broken[0])} is no predicted class: pass logits (n, classes) or whole numbers (n,)")
    return predictions


def _predictions(scores: Tensor, labels: Tensor) -> Tensor:
    predictions = predicted_classes(scores, labels)
    if not len(labels):
        raise DataError("no examples to evaluate on: check the split or the filter that made this set")
    return predictions


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of correct predictions, a fraction.

    Args:
        scores: Logits (n, classes), of which the first largest counts, or predicted classes (n,).
        labels: int64 (n,).

    Raises:
        DataError: If the shapes do not fit, nothing is there, or a score is NaN.
    """
    return int((_predictions(scores, labels) == labels).sum()) / len(labels)


def group_accuracies(
    scores: Tensor, labels: Tensor, groups: Tensor, *, minimum: int = 1, ignore: Collection[int] = ()
) -> dict[int, float]:
    """Accuracy within each group, a fraction, by the group's number.

    Args:
        scores: Logits (n, classes) or predicted classes (n,).
        labels: int64 (n,).
        groups: int64 (n,), for example label x background of Waterbirds.
        minimum: A group with fewer examples is left out.
        ignore: Groups that are left out, such as the region "Other" of WILDS FMoW.

    Raises:
        DataError: If the shapes do not fit, nothing is there or left, or a score is NaN.
    """
    correct = _predictions(scores, labels) == labels
    if groups.shape != labels.shape:
        raise DataError(
            f"groups of shape {tuple(groups.shape)} do not fit labels of shape {tuple(labels.shape)}: one each"
        )
    counts = {int(g): int(n) for g, n in zip(*groups.unique(return_counts=True), strict=True)}
    kept = {g: n for g, n in counts.items() if n >= minimum and g not in ignore}
    if not kept:
        there = ", ".join(f"{g} ({n})" for g, n in counts.items())
        raise DataError(
            f"no group is left with minimum={minimum} and ignore={list(ignore)}: the groups and their examples are "
            f"{there}; ask for fewer examples or ignore fewer groups"
        )
    return {g: int(correct[groups == g].sum()) / n for g, n in kept.items()}


def worst_group_accuracy(
    scores: Tensor, labels: Tensor, groups: Tensor, *, minimum: int = 1, ignore: Collection[int] = ()
) -> float:
    """Accuracy of the worst group, a fraction: what the paper reports for Waterbirds and CelebA (Sec. 3.1).

    A group without examples does not count. Arguments and errors as for :func:`group_accuracies`.
    """
    return min(group_accuracies(scores, labels, groups, minimum=minimum, ignore=ignore).values())


def average_group_accuracy(
    scores: Tensor, labels: Tensor, groups: Tensor, *, minimum: int = 1, ignore: Collection[int] = ()
) -> float:
    """Mean of the accuracies of the groups, a fraction: each group weighs the same, however many examples it has.

    :func:`accuracy` weighs them by their examples. Arguments and errors as for :func:`group_accuracies`.
    """
    return fmean(group_accuracies(scores, labels, groups, minimum=minimum, ignore=ignore).values())


def severity_errors(
    scores: Tensor, labels: Tensor, corruptions: Sequence[str], severities: Tensor
) -> dict[str, dict[int, float]]:
    """Top-1 error, a fraction, by corruption and severity.

    Args:
        scores: Logits (n, classes) or predicted classes (n,).
        labels: int64 (n,).
        corruptions: n names.
        severities: int64 (n,), such as 1 to 5.

    Raises:
        DataError: If the shapes do not fit, nothing is there, or a score is NaN.
    """
    names = sorted(set(corruptions))
    position = {name: number for number, name in enumerate(names)}
    numbers = torch.tensor([position[name] for name in corruptions], dtype=torch.int64, device=labels.device)
    if severities.shape != labels.shape or len(numbers) != len(labels):
        raise DataError(
            f"{len(numbers)} corruptions and severities of shape {tuple(severities.shape)} do not fit labels of shape "
            f"{tuple(labels.shape)}: one each"
        )
    if (severities < 0).any():
        raise DataError(f"severity {int(severities.min())} does not exist: pass numbers such as 1 to 5")
    # One number for each pair, so that it is a grouping like any other.
    steps = int(severities.max()) + 1 if len(severities) else 1
    errors: dict[str, dict[int, float]] = {name: {} for name in names}
    for pair, right in group_accuracies(scores, labels, numbers * steps + severities).items():
        errors[names[pair // steps]][pair % steps] = 1 - right
    return errors


def corruption_error(errors: Sequence[float], baseline_errors: Sequence[float]) -> float:
    """CE of one corruption: error summed over severities, over a baseline's (Hendrycks & Dietterich 2019, Sec. 4).

    Args:
        errors: The model's top-1 errors by severity, fractions.
        baseline_errors: The baseline's, in the same order.

    Raises:
        DataError: If the numbers of severities differ or the baseline makes no error.
    """
    if len(errors) != len(baseline_errors) or not errors:
        raise DataError(
            f"{len(errors)} errors against {len(baseline_errors)} baseline errors: one per severity in both"
        )
    if sum(baseline_errors) <= 0:
        raise DataError(
            "the baseline makes no error, so the corruption error has no meaning: pass errors, not accuracies"
        )
    return sum(errors) / sum(baseline_errors)


def corruption_errors(
    errors: Mapping[str, Mapping[int, float]],
    baseline_errors: Mapping[str, float | Mapping[int, float]] = ALEXNET_ERRORS,
) -> dict[str, float]:
    """:func:`corruption_error` of every corruption, a fraction; mCE is their mean.

    Args:
        errors: The model's top-1 errors by corruption and severity, fractions, as :func:`severity_errors` gives them.
        baseline_errors: The baseline's in the same form; a single number is its mean over severities 1 to 5, as
            published for AlexNet on ImageNet-C.

    Raises:
        DataError: If the baseline lacks a corruption, or its severities are not the model's.
    """
    if missing := sorted(set(errors) - set(baseline_errors)):
        raise DataError(f"no baseline error for {', '.join(missing)}: it has {', '.join(sorted(baseline_errors))}")
    result = {}
    for name, found in errors.items():
        reference = baseline_errors[name]
        expected = dict(reference) if isinstance(reference, Mapping) else dict.fromkeys(SEVERITIES, float(reference))
        if set(found) != set(expected):
            raise DataError(
                f"{name} has errors for the severities {sorted(found)}, its baseline for {sorted(expected)}: evaluate "
                "them all, or pass a baseline with an error for each severity"
            )
        result[name] = corruption_error([found[s] for s in expected], list(expected.values()))
    return result


def mean_corruption_error(errors: Mapping[str, float], baseline_errors: Mapping[str, float] = ALEXNET_ERRORS) -> float:
    """mCE: mean over corruptions of :func:`corruption_error`, a fraction (the literature prints it in percent).

    Args:
        errors: Per corruption, the model's mean top-1 error over severities.
        baseline_errors: The same for the baseline, AlexNet on ImageNet-C by default.

    Raises:
        DataError: If nothing is given or the baseline lacks a corruption.
    """
    if missing := sorted(set(errors) - set(baseline_errors)):
        raise DataError(f"no baseline error for {', '.join(missing)}: it has {', '.join(sorted(baseline_errors))}")
    if not errors:
        raise DataError("no corruption given: pass the error of each corruption by name")
    return fmean(corruption_error([error], [baseline_errors[name]]) for name, error in errors.items())


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for one proportion: for the accuracy of one run on n test examples.

    Unlike the normal approximation it stays in [0, 1] and keeps its coverage near 0 and 1 (Wilson 1927).

    Raises:
        DataError: If ``correct`` is not within 0..n or n is not positive.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise DataError(f"{correct} of {n} correct is not a proportion: pass counts with 0 <= correct <= n and n > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17 and put the value outside its own interval.
    return Interval(share, 0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval, in the unit of the values.

    Over seeds it covers the spread of draws and of training. Where the test sets of the seeds overlap, as with splits
    of one file, it understates the uncertainty about new images.

    Raises:
        DataError: If fewer than two values are given: one run has no spread, its interval is :func:`wilson_interval`.
    """
    if len(values) < 2:
        raise DataError(
            f"{len(values)} value(s) have no spread: run more seeds, or use wilson_interval for a single run"
        )
    mean = fmean(values)
    half = _student_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def _student_quantile(freedom: int, confidence: float) -> float:
    """The t with P(|T| <= t) = confidence, for whole degrees of freedom.

    Abramowitz & Stegun 26.7.3-4, a finite series in the angle atan(t / sqrt(freedom)), bisected: the core has no scipy.
    """

    def within(angle: float) -> float:
        cosine, term, total = math.cos(angle), 1.0, 0.0
        if freedom % 2:
            term = cosine
            for k in range(3, freedom + 1, 2):
                total += term
                term *= cosine * cosine * (k - 1) / k
            return 2 / math.pi * (angle + math.sin(angle) * total)
        for k in range(2, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


@dataclass(frozen=True)
class Measurement:
    """One reported number with everything needed to believe it.

    Attributes:
        name: The metric, such as ``accuracy`` or ``worst_group_accuracy``.
        dataset: What it was measured on, such as ``cifar10c/frost severity 5``.
        value: The number; accuracies and errors as fractions.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        interval: What the interval is: ``wilson`` (one run, over test examples) or ``t`` (over seeds).
        n: Test examples per seed.
        seeds: The seeds behind the number.
        selection: How the run was chosen, in words; :data:`ORACLE` if test data had a say, ``none`` if nothing was.

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
    """A :class:`Measurement` from one proportion per seed: Wilson's interval for one seed, Student's t for more.

    An interval ends at 0 and 1 at the latest.

    Args:
        name: The metric.
        values: One fraction per seed.
        dataset: What it was measured on.
        n: Test examples per seed.
        seeds: As many as values, each once.
        selection: How the runs were chosen, in words.

    Raises:
        DataError: If values and seeds do not pair up, or as :class:`Measurement` says.
    """
    if len(values) != len(seeds) or len(set(seeds)) != len(seeds) or not values:
        raise DataError(
            f"{len(values)} values for the seeds {list(seeds)}: pass one value for each seed, each seed once"
        )
    single = len(values) == 1
    # round: a proportion of n examples times n is a whole number up to rounding.
    value, low, high = wilson_interval(round(values[0] * n), n) if single else mean_interval(values)
    low, high = max(0.0, low), min(1.0, high)  # Student's t knows of no ends
    return Measurement(name, dataset, value, low, high, "wilson" if single else "t", n, tuple(seeds), selection)


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
        lines = [
            "| metric | data | value (%) | 95% interval (%) | n | seeds | selection |",
            "|---|---|---|---|---|---|---|",
        ]
        for m in self.measurements:
            seeds = ", ".join(map(str, m.seeds))
            ends = f"{100 * m.low:.1f} to {100 * m.high:.1f} ({m.interval})"
            lines.append(f"| {m.name} | {m.dataset} | {100 * m.value:.1f} | {ends} | {m.n} | {seeds} | {m.selection} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` turns back into an equal report."""
        try:
            return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"the settings of this report are no plain JSON ({error}): convert them first") from error

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: If the text is no JSON, or a part is missing, unknown or not valid.
        """
        try:
            content = json.loads(text)
            measurements = [{**m, "seeds": tuple(m["seeds"])} for m in content["measurements"]]
            return cls(**{**content, "measurements": tuple(Measurement(**m) for m in measurements)})
        except DataError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            expected = ", ".join(f.name for f in fields(cls))
            raise DataError(
                f"not a report ({error}): expected the JSON of {expected}, as Report.to_json writes it"
            ) from error

    def save(self, file: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(file).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Report:
        """Read a file that :meth:`save` wrote.

        Raises:
            DataError: As :meth:`from_json`, with the file's name.
        """
        try:
            return cls.from_json(Path(file).read_text(encoding="utf-8"))
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
