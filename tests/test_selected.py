"""The gain of a choice over the base: its interval by hand, its mean without the optimism, and the evidence for it."""

import math

import numpy as np
import pytest
import torch

from peft_surgical.evaluation.selected import Gain, evidence_of, gain_of_best


def test_the_interval_is_agresti_and_mins_by_hand():
    # 20 images: 8 better, 2 worse, 10 equal. Half an image more in each of the four cells makes 8.5 and 2.5 of 22:
    # sqrt(8.5 + 2.5 - (8.5 - 2.5)^2 / 22) / 22 = sqrt(11 - 36 / 22) / 22 = 0.1391
    right = [True] * 8 + [False] * 2 + [True] * 10
    base = [False] * 8 + [True] * 2 + [True] * 10
    gain = gain_of_best([[0.5] * 20], [right], base)
    assert gain.images == 20
    assert gain.high - gain.mean == pytest.approx(1.96 * math.sqrt(11 - 36 / 22) / 22)
    assert gain.mean - gain.low == pytest.approx(gain.high - gain.mean)
    assert gain.mean == pytest.approx(0.3, abs=0.01)  # one candidate: no choice, and no optimism
    assert gain.is_shown


def test_few_images_that_all_agree_are_not_certain():
    gain = gain_of_best([[0.9] * 4], [[True] * 4], [True] * 4)
    assert gain.mean == 0
    assert gain.high == pytest.approx(1.96 / 6)  # sqrt(0.5 + 0.5) / (4 + 2)
    assert not gain.is_shown


def test_the_best_of_many_equal_candidates_gains_less_than_it_seems():
    generator = np.random.default_rng(0)
    count, images = 60, 40
    right = generator.random((count, images)) < 0.5
    base = generator.random(images) < 0.5
    scores = right + 0.0
    naive = (right[scores.mean(1).argmax()].astype(float) - base).mean()
    fair = (right.astype(float) - base).mean()  # what all of them gain in truth
    gain = gain_of_best(scores.tolist(), right.tolist(), base.tolist())
    assert naive > fair + 0.12
    assert gain.mean < naive - 0.08
    assert abs(gain.mean - fair) < abs(naive - fair)


def test_a_candidate_that_is_better_everywhere_keeps_its_gain():
    right = [[True] * 30, [False] * 30]
    gain = gain_of_best([[0.9] * 30, [0.1] * 30], right, [False] * 30)
    assert gain.mean == 1
    assert gain == gain_of_best([[0.9] * 30, [0.1] * 30], right, [False] * 30)  # drawn with a fixed seed


def test_one_image_leaves_nothing_out():
    assert gain_of_best([[0.9]], [[True]], [False]).mean == 1


@pytest.mark.parametrize(
    ("mean", "low", "images", "needed"),
    [
        (0.1, 0.0, 50, 50),  # the interval ends at zero
        (0.1, -0.1, 50, 200),  # half as wide takes four times the images
        (0.05, -0.10, 40, 360),
        (0.0, -0.1, 50, None),
        (-0.1, -0.2, 50, None),
    ],
)
def test_so_many_images_would_show_the_gain(mean, low, images, needed):
    gain = Gain(mean, low, 2 * mean - low, images)
    assert gain.images_needed == (needed if needed is None else pytest.approx(needed, abs=1))
    assert not gain.is_shown


def test_the_gain_in_words():
    assert str(Gain(0.08, 0.03, 0.13, 60)) == (
        "+8.0 points over the base, 95% interval +3.0 to +13.0, paired on 60 validation images and corrected for the "
        "choice among candidates"
    )
    assert str(Gain(0.04, -0.04, 0.12, 60)).endswith("About 240 validation images would show it")
    assert "not shown to be better than the base. More images to tune on" in str(Gain(-0.04, -0.12, 0.04, 60))
    gain = Gain(0.08, 0.03, 0.13, 60)
    assert Gain(**gain.record()) == gain


def test_evidence_is_the_probability_of_the_right_class():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0], [math.nan, 0.0]])
    found = evidence_of(logits, torch.tensor([1, 1, 1]))
    assert found["scores"] == [0.75, 0.2, 0.0]
    assert found["score"] == pytest.approx(0.95 / 3)
    assert found["right"] == "100"
    assert evidence_of(logits[:2], torch.tensor([1, 1]))["validation_loss"] == pytest.approx(
        -(math.log(0.75) + math.log(0.2)) / 2
    )


def test_an_infinite_logit_loses_and_does_not_spoil_the_rest():
    found = evidence_of(torch.tensor([[math.inf, 0.0], [0.0, 0.0], [-math.inf, 0.0]]), torch.tensor([0, 0, 1]))
    assert (found["scores"], found["right"]) == ([0.0, 0.5, 1.0], "011")
    assert math.isfinite(found["validation_loss"])


def test_evidence_of_a_run_that_diverged():
    found = evidence_of(torch.full((3, 1), math.nan), torch.tensor([0, 1, 2]))
    assert (found["score"], found["scores"], found["right"]) == (0.0, [0.0] * 3, "000")
    assert math.isfinite(found["validation_loss"])


def test_the_gain_is_that_of_the_candidate_that_was_chosen():
    # By another metric the second was chosen, which is right less often.
    right, base = [[True] * 30, [True] * 20 + [False] * 10], [False] * 30
    first = gain_of_best([[0.9] * 30, [0.8] * 30], right, base)
    second = gain_of_best([[0.9] * 30, [0.8] * 30], right, base, chosen=1)
    assert first == gain_of_best([[0.9] * 30, [0.8] * 30], right, base, chosen=0)
    assert (first.mean, second.mean) == (pytest.approx(1), pytest.approx(2 / 3))
    assert second.high - second.low > first.high - first.low
