"""What moves, what puts it back, and what watches: against hand-worked steps and sequences."""

import warnings

import pytest
import torch
from peft import get_peft_model
from tiny import CASES, disturb, same, snapshot

from peft_surgical import SurgicalConfig
from peft_surgical.adaptation.streams import (
    CollapseWarning,
    Record,
    Stream,
    evaluating,
    moving_buffers,
    moving_deltas,
)


def adapted(target="stem", case="conv+BN", **config):
    model = get_peft_model(CASES[case].network(), SurgicalConfig(target=target, **config))
    disturb(model)
    return model


def stream_of(model, window):
    return Stream(model, optimizer="sgd", lr=0.1, collapse_window=window)


def logits(*classes, of=4):
    return torch.eye(of)[list(classes)]


def test_only_trainable_deltas_of_active_adapters_move():
    model = adapted("stem")
    model.add_adapter("other", SurgicalConfig(target="head"))
    assert {name.removeprefix("base_model.model.") for name in moving_deltas(model)} == {
        "conv1.weight (default)",
        "bn1.weight (default)",
        "bn1.bias (default)",
    }
    model.set_adapter("other")
    assert {name.removeprefix("base_model.model.") for name in moving_deltas(model)} == {
        "fc.weight (other)",
        "fc.bias (other)",
    }
    model.base_model.set_adapter(["default", "other"])
    assert len(moving_deltas(model)) == 5


@pytest.mark.parametrize(("policy", "expected"), [("frozen", 0), ("target", 3), ("all", 9)])
def test_statistics_move_with_the_policy(policy, expected):
    assert len(moving_buffers(adapted(norm_stats=policy))) == expected


def test_a_step_by_hand():
    model = adapted("conv1")
    (delta,) = moving_deltas(model).values()
    before, deltas = delta.detach().clone(), Stream(model, optimizer="sgd", lr=0.5, weight_decay=0.1)
    assert deltas.step((delta * 3).sum()) is True
    assert torch.allclose(delta, before - 0.5 * (3 + 0.1 * before))
    deltas.restore()
    assert torch.equal(delta, before)


def test_restoring_forgets_adams_moments():
    model = adapted("conv1")
    (delta,), deltas = moving_deltas(model).values(), Stream(model, optimizer="adam", lr=0.1)
    results = []
    for _ in range(2):
        deltas.step(delta.square().sum())
        deltas.step(-delta.sum())
        results.append(delta.detach().clone())
        deltas.restore()
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "loss",
    [
        lambda d: d.sum() * float("nan"),
        lambda d: d.sum() + float("inf"),
        lambda d: (d * 0).sum().sqrt(),  # 0, with a gradient of 0 / 0
        lambda d: d.sum() * 1e37,  # finite, and so is the gradient, but not the step
        lambda d: (d * 1e25).sum(),  # the gradient's norm is infinite in float32
    ],
    ids=["nan", "inf", "gradient", "step", "norm"],
)
def test_a_step_that_would_not_be_finite_is_not_taken(loss):
    model = adapted("conv1")
    (delta,), deltas = moving_deltas(model).values(), Stream(model, optimizer="sgd", lr=1e10)
    before = snapshot(model)
    assert deltas.step(loss(delta)) is False
    assert same(before, snapshot(model))
    assert deltas.step(delta.sum() * 1e-9) is True


def test_a_tensor_that_the_loss_does_not_reach_stays():
    model = adapted("stem")
    before, found = snapshot(model), moving_deltas(model)
    Stream(model, optimizer="adam", lr=0.1).step(next(iter(found.values())).sum())
    moved = [name for name, value in snapshot(model).items() if not torch.equal(value, before[name])]
    assert [name.split(".surgery")[0] for name in moved] == ["base_model.model.conv1"]


def test_a_watch_by_hand():
    def watch(window):
        stream = stream_of(adapted("conv1"), window)

        def collapsed(found):
            before = stream.record.collapses
            stream.predicted(found)
            return stream.record.collapses != before

        return stream, collapsed

    stream, collapsed = watch(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        assert collapsed(logits(1, 1)) is False
        assert collapsed(logits(1)) is True
        assert collapsed(logits(1, 1)) is False  # it still is
        assert collapsed(logits(2, 1, 1)) is False
        assert collapsed(logits(1, 0)) is True  # also when it is over at the end of the batch
        assert collapsed(torch.full((5, 4), torch.nan)) is False
        assert stream.state_dict()["recent"] == [1, 1, 0]
        assert watch(0)[1](logits(1, 1, 1)) is False
        assert watch(2)[1](torch.zeros(5, 1)) is False  # one class is no collapse where there is one


def test_a_stream_counts_and_starts_again():
    model = adapted("conv1")
    (delta,), before = moving_deltas(model).values(), snapshot(model)
    stream = stream_of(model, 2)
    stream.step(delta.sum())
    stream.step(delta.sum() * float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.predicted(logits(0, 1))
    with pytest.warns(CollapseWarning, match="up to image 2 are all class 1"):
        stream.predicted(logits(1))
    assert stream.record == Record(images=3, steps=1, skipped=1, collapses=(2,))
    other = stream_of(adapted("conv1"), 2)
    other.load_state_dict(stream.state_dict())
    assert (other.record, other.position, other.state_dict()["recent"]) == (stream.record, 3, [1, 1])
    stream.reset()
    assert same(before, snapshot(model))
    assert (stream.record, stream.position, stream.state_dict()["recent"]) == (Record(), 0, [])


def test_modes_come_back_also_those_that_a_norm_hides():
    model = adapted().train()
    model.base_model.model.layer2.eval()
    modes = [vars(module)["training"] for module in model.modules()]
    with evaluating(model):
        assert not any(vars(module)["training"] for module in model.modules())
    assert [vars(module)["training"] for module in model.modules()] == modes
    assert not all(modes)
