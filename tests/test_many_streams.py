"""Many streams at once against `Memo` along each of them, one after the other."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import ConvNet
from torch import nn

from paper.many_streams import ManyMemo, Plan, ViewsOfMany, adapt_many, collapses
from peft_surgical import SurgicalConfig
from peft_surgical.adaptation import Memo
from peft_surgical.adaptation.streams import moving_deltas
from peft_surgical.adaptation.views import AugMix
from peft_surgical.errors import TargetError

pytest.importorskip("torchvision")


def network():
    torch.manual_seed(0)
    return ConvNet(lambda channels: nn.GroupNorm(2, channels)).eval().double()


def normalise(images):
    return (images - 0.5) / 0.5


def compared(target, **how):
    """Along three streams: logits, steps and skipped of `Memo`, and of all at once."""
    torch.manual_seed(1)
    pixels = [torch.rand(5, 3, 8, 8).double() for _ in range(2)]
    plans = [Plan(pixels[0], 0, 0.3), Plan(pixels[0], 0, 0.02), Plan(pixels[1], 3, 0.3)]
    one, names = [], []
    for plan in plans:
        model = get_peft_model(network(), SurgicalConfig(target=target))
        names = [name.rpartition(" ")[0].removeprefix("base_model.model.") for name in moving_deltas(model)]
        memo = Memo(model, lr=plan.lr, views=3, seed=plan.seed, preprocess=normalise, **how)
        one.append((memo(plan.images), memo.record.steps, memo.record.skipped))
    many = ManyMemo(network(), names, 2 if how.get("episodic") else 3, preprocess=normalise, **how)
    views = ViewsOfMany(AugMix(3), how.get("steps", 1), room=1e9)
    found = adapt_many(many, plans, views)
    many.reset()
    again = adapt_many(many, plans, views)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(found, again, strict=True))
    return one, found


@pytest.mark.parametrize("target", ["all", "stem", "conv1 + layer2.0", "layer1", "fc.bias", "head"])
@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "adamw", "episodic": True},
        {"optimizer": "adamw", "steps": 2, "weight_decay": 0.1},
    ],
    ids=["online", "episodic", "two steps"],
)
def test_many_streams_are_those_of_memo(target, how):
    one, found = compared(target, **how)
    for (logits, steps, skipped), outcome in zip(one, found, strict=True):
        assert torch.allclose(logits, outcome.logits, atol=1e-9)
        assert (outcome.steps, outcome.skipped) == (steps, skipped) == (5 * how.get("steps", 1), 0)
    assert not torch.allclose(found[0].logits, found[1].logits, atol=1e-3)


def test_a_stream_that_breaks_leaves_the_others_alone():
    torch.manual_seed(1)
    pixels = torch.rand(4, 3, 8, 8).double()
    broken = pixels.clone()
    broken[1] = torch.nan
    names = ["conv1.weight"]
    how = {"optimizer": "sgd", "preprocess": normalise}
    views = ViewsOfMany(AugMix(3))
    alone = adapt_many(ManyMemo(network(), names, 1, **how), [Plan(pixels, 0, 0.1)], views)[0]
    plans = [Plan(broken, 0, 0.1), Plan(pixels, 0, 0.1)]
    found = adapt_many(ManyMemo(network(), names, 2, **how), plans, views)
    assert torch.allclose(found[1].logits, alone.logits, atol=1e-9)
    assert [(one.steps, one.skipped) for one in found] == [(3, 1), (4, 0)]
    assert torch.isfinite(found[0].logits).all(1).tolist() == [True, False, True, True]
    memo = Memo(get_peft_model(network(), SurgicalConfig(target="conv1.weight")), lr=0.1, views=3, preprocess=normalise)
    expected = memo(broken)
    assert torch.allclose(found[0].logits, expected, atol=1e-9, equal_nan=True)
    assert memo.record.skipped == 1


def test_other_modules_are_refused():
    odd = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(TargetError, match=r"0.weight belongs to BatchNorm2d.*one stream after the other"):
        ManyMemo(odd, ["0.weight"], 2, optimizer="sgd", preprocess=normalise)


@pytest.mark.filterwarnings("ignore::peft_surgical.adaptation.streams.CollapseWarning")
def test_collapses_are_counted_as_a_stream_counts_them():
    model = get_peft_model(copy.deepcopy(network()), SurgicalConfig(target="head"))
    generator = torch.Generator().manual_seed(0)
    classes = torch.cat([torch.randint(5, (20,), generator=generator), torch.full((9,), 2), torch.tensor([1])])
    logits = nn.functional.one_hot(torch.cat([classes, classes]), 5).float()
    logits[25] = torch.nan
    memo = Memo(model, lr=0.1, collapse_window=4)
    for row in logits:
        memo.predicted(row[None])
    assert collapses(logits, 4) == list(memo.record.collapses)
    assert len(collapses(logits, 4)) == 2
