"""What the best of several candidates gains over a base, without the optimism of having been the best.

The accuracy of the candidate that was chosen on some images is too high on the same images, the more so the fewer they
are and the more candidates there were. Bootstrap bias correction (Tsamardinos, Greasidou and Borboudakis 2018) repeats
the choice on resampled images and measures it on those that were left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Gain:
    """Accuracy of a choice minus that of the base, in fractions, paired by image.

    Attributes:
        mean: The difference.
        low: Lower end of its 95% interval over images.
        high: Upper end.
        images: Number of images.
    """

    mean: float
    low: float
    high: float
    images: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0

    @property
    def images_needed(self) -> int | None:
        """About how many such images would show the gain, if it stays as it is; None if there is none."""
        if self.mean <= 0:
            return None
        return int(np.ceil(self.images * ((self.mean - self.low) / self.mean) ** 2))

    def record(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        words = (
            f"{100 * self.mean:+.1f} points over the base, 95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        )
        words += f", paired on {self.images} validation images and corrected for the choice among candidates"
        if self.is_shown:
            return words
        if self.images_needed is None:
            return (
                f"{words}: not shown to be better than the base. More images to tune on, or another network, may help"
            )
        return (
            f"{words}: not shown to be better than the base. About {self.images_needed} validation images would show it"
        )


def evidence_of(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """What candidates are compared by, as plain JSON.

    The mean probability of the right class says more about few images than the share that is right, and unlike the
    cross entropy it is not ruled by one image that is confidently wrong.

    Args:
        logits: (images, classes); a row with NaN, or with an infinity that leaves no probabilities, is wrong.
        labels: int64 (images,).

    Returns:
        ``scores``, the probability of the right class for each image; their mean ``score``; ``right``, a 1 or 0 for
        each image; and ``validation_loss``, the mean cross entropy.
    """
    shares = logits.double().softmax(1)
    broken = shares.isnan().any(1)
    if broken.all():
        chances = torch.zeros(len(labels), dtype=torch.float64)
    else:
        chances = shares.gather(1, labels[:, None])[:, 0].masked_fill(broken, 0.0)
    right = (logits.argmax(1) == labels) & ~broken
    loss = float(-chances.clamp(min=sys.float_info.min).log().mean())
    scores = [round(chance, 4) for chance in chances.tolist()]
    marks = "".join("1" if one else "0" for one in right.tolist())
    return {"score": float(chances.mean()), "scores": scores, "right": marks, "validation_loss": loss}


def gain_of_best(
    scores: Sequence[Sequence[float]],
    right: Sequence[Sequence[bool]],
    base: Sequence[bool],
    chosen: int | None = None,
) -> Gain:
    """What the best of several candidates gains over the base.

    Args:
        scores: A score for each candidate and image, (candidates, images).
        right: Whether each candidate is right about each image, in the same shape.
        base: Whether the base is, (images,).
        chosen: The candidate that was chosen, where not by the mean score alone; None is the one with the highest.

    Returns:
        The mean, over resamples of the images, of the difference on the images left out, where each resample chooses
        by the mean score; and its interval, from the spread over images of the difference of the chosen candidate.
        Where the choice went by another metric, the correction is that of a choice by the score, an approximation.
    """
    values, gains = np.asarray(scores, float), np.asarray(right, float) - np.asarray(base, float)
    count = values.shape[1]
    generator = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(count, size=count)
        out = np.setdiff1d(np.arange(count), drawn)
        if len(out):
            found.append(gains[values[:, drawn].mean(1).argmax(), out].mean())
    best = int(values.mean(1).argmax())
    own = gains[best if chosen is None else chosen]
    optimism = gains[best].mean() - np.mean(found) if found else 0.0  # of the choice, on the images that it saw
    mean = float(own.mean() - optimism)
    # Half an image is added to each of the four outcomes (Agresti and Min 2005), or few images would look certain.
    better, worse = float((own > 0).sum()) + 0.5, float((own < 0).sum()) + 0.5
    error = np.sqrt(better + worse - (better - worse) ** 2 / (count + 2)) / (count + 2)
    return Gain(mean, mean - 1.96 * float(error), mean + 1.96 * float(error), count)
