"""Rates, freezing and penalties through any optimizer, against networks that are frozen and scaled by hand."""

import copy
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import ConvNet
from torch import nn
from torch.utils.data import DataLoader

from accelerate import Accelerator
from peft_surgical import Pace, Penalty, SurgicalConfig, anatomy_of, score_blocks
from peft_surgical.choosing.methods import AutoRGN, AutoSNR, Progress, gradual_unfreezing
from peft_surgical.choosing.models import trained_tensors
from peft_surgical.choosing.penalties import PenaltyKind
from peft_surgical.errors import AdapterError, ConfigError

X, Y = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 5
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "tensor rate": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
}


class Fixed:
    """A schedule of given factors by prefix of the tensor's name."""

    criterion = None

    def __init__(self, **factors):
        self.given = factors

    def factors(self, progress: Progress, scores=None):
        names = [name for name, _ in ConvNet(nn.BatchNorm2d).named_parameters()]
        return {n: f for n in names for prefix, f in self.given.items() if n.startswith(prefix)}


def network():
    torch.manual_seed(0)
    return ConvNet(nn.BatchNorm2d).eval()


def adapted(target="all"):
    return get_peft_model(network(), SurgicalConfig(target=target)).train()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps=4, clip=None, penalty=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        (loss if penalty is None else loss + penalty()).backward()
        if clip:
            nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()


def weights(model):
    return {name: tensor.value.clone() for name, tensor in trained_tensors(model).items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_factor_is_a_parameter_group_with_that_rate(make):
    model, reference = adapted(), adapted()
    optimizer = make(trainable(model))
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    Pace(model, optimizer, Fixed(layer1=0.5, fc=0.1), total_steps=4)
    train(model, optimizer)
    factor = {"layer1": 0.5, "fc": 0.1}
    by_hand = make([{"params": [t.parameter]} for t in trained_tensors(reference).values()])
    for group, name in zip(by_hand.param_groups, trained_tensors(reference), strict=True):
        group["lr"] = group["lr"] * factor.get(name.split(".")[0], 1.0)
    train(reference, by_hand)
    same(weights(model), weights(reference))
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == groups
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(trainable(model))]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_factor_of_zero_is_frozen_in_the_full_sense(make, clip):
    model, reference = adapted(), adapted()
    start = weights(model)
    optimizer = make(trainable(model))
    Pace(model, optimizer, Fixed(layer2=0.0, conv1=0.0), total_steps=4)
    train(model, optimizer, clip=clip)
    expected = trained_tensors(reference)
    for name, tensor in expected.items():
        tensor.parameter.requires_grad_(not name.startswith(("layer2", "conv1")))
    train(reference, make(trainable(reference)), clip=clip)
    found = {n: t.value for n, t in trained_tensors(model).items()}
    assert set(found) == set(start) == set(expected)
    for name, tensor in expected.items():
        if clip is None:
            assert torch.equal(found[name], tensor.value), name
        else:  # the norm is summed over more zeros, in another order
            torch.testing.assert_close(found[name], tensor.value, rtol=1e-5, atol=1e-7)
    frozen = {n: t.parameter for n, t in trained_tensors(model).items() if n.startswith(("layer2", "conv1"))}
    assert all(torch.equal(found[name], start[name]) for name in frozen)
    assert not any(p in optimizer.state for p in frozen.values())
    assert all(p.requires_grad for p in frozen.values())


def test_without_a_schedule_nothing_changes():
    model, reference = adapted(), adapted()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    Pace(model, optimizer, total_steps=4)
    train(model, optimizer)
    train(reference, torch.optim.Adam(trainable(reference), 0.01))
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(reference).values(), strict=True))


def test_gradual_unfreezing_follows_the_steps_and_moments_start_when_a_block_joins():
    model = adapted()
    anatomy = anatomy_of(network())
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    pace = Pace(model, optimizer, gradual_unfreezing(anatomy, "last-to-first"), total_steps=6)
    start, moved = weights(model), []
    for _ in range(6):
        train(model, optimizer, steps=1)
        now = weights(model)
        moved.append({anatomy.block_of(n).name for n in now if not torch.equal(now[n], start[n])})
    assert moved == [{"head"}] * 2 + [{"head", "block2"}] * 2 + [{"head", "block2", "block1"}] * 2
    steps = {n: int(optimizer.state[t.parameter]["step"]) for n, t in pace.tensors.items()}
    assert (steps["fc.weight"], steps["layer2.0.weight"], steps["conv1.weight"]) == (6, 4, 2)


def test_a_learning_rate_scheduler_is_not_disturbed():
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    Pace(model, optimizer, Fixed(fc=0.1), total_steps=3)
    seen = []
    for _ in range(3):
        train(model, optimizer, steps=1)
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.5, 0.25, 0.125]


def test_a_step_that_raises_leaves_the_groups_as_they_were():
    model = adapted()

    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no power")

    optimizer = Breaks(trainable(model), 0.1)
    pace = Pace(model, optimizer, Fixed(fc=0.1), total_steps=3)
    with pytest.raises(RuntimeError, match="no power"):
        train(model, optimizer, steps=1)
    pace.close()
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, len(trainable(model)))]


def test_a_step_that_raised_once_can_be_repeated():
    def stumbles():
        raise RuntimeError("no power")

    model, reference = adapted(), adapted()
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    pace = Pace(model, optimizer, Fixed(fc=0.5), total_steps=3)
    with pytest.raises(RuntimeError, match="no power"):
        optimizer.step(stumbles)
    train(model, optimizer, steps=2)
    by_hand = torch.optim.SGD(trainable(reference), 0.1)
    Pace(reference, by_hand, Fixed(fc=0.5), total_steps=3)
    train(reference, by_hand, steps=2)
    assert pace.step == 2
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, len(trainable(model)))]
    same(weights(model), weights(reference))


def test_parameters_of_ones_own_beside_the_models_keep_the_full_rate():
    model, own = adapted(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*trainable(model), own], 0.1)
    Pace(model, optimizer, Fixed(**dict.fromkeys(("conv1", "bn1", "layer1", "layer2", "fc"), 0.0)), total_steps=1)
    own.grad = torch.full((3,), 2.0)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(own, torch.full((3,), 0.8))
    assert not any(parameter.any() for parameter in trainable(model))


@pytest.mark.parametrize("kind", PenaltyKind.__args__)
def test_a_penalty_is_the_same_as_its_term_in_the_loss(kind):
    model, reference, penalty = adapted(), adapted(), Penalty(kind, 0.05)
    optimizer = torch.optim.SGD(trainable(model), 0.05)
    Pace(model, optimizer, penalty=penalty, total_steps=4)
    train(model, optimizer)
    train(reference, torch.optim.SGD(trainable(reference), 0.05), penalty=lambda: penalty.loss(reference))
    same(weights(model), weights(reference))
    plain = adapted()
    train(plain, torch.optim.SGD(trainable(plain), 0.05))
    assert not torch.allclose(weights(plain)["fc.weight"], weights(model)["fc.weight"])


def test_a_penalty_passes_over_tensors_without_a_gradient():
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    pace = Pace(model, optimizer, penalty=Penalty("l2-sp", 1.0), total_steps=1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.fill_(0.5)
    fc = {name: tensor.parameter for name, tensor in pace.tensors.items() if name.startswith("fc")}
    for parameter in fc.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, tensor in pace.tensors.items():
        assert torch.allclose(tensor.parameter, torch.tensor(0.45 if name in fc else 0.5)), name


def test_penalties_by_hand():
    model = adapted("head")
    parameters = trainable(model)
    with torch.no_grad():
        for p in parameters:
            p.fill_(-0.5)
    count = sum(p.numel() for p in parameters)
    base = network().fc
    assert Penalty("l1-sp", 2.0).loss(model).item() == pytest.approx(count)
    assert Penalty("l2-sp", 2.0).loss(model).item() == pytest.approx(0.25 * count)
    full = sum(((p.detach() - 0.5) ** 2).sum() for p in base.parameters())
    assert Penalty("l2", 2.0).loss(model).item() == pytest.approx(full.item(), rel=1e-6)


def test_a_new_head_has_no_pretrained_value_to_be_pulled_to_and_decays_to_zero_like_the_rest():
    model = get_peft_model(network(), SurgicalConfig(target="block2", modules_to_save=["fc"]))
    tensors = trained_tensors(model)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.parameter.fill_(0.5)
    new = {name for name, tensor in tensors.items() if not tensor.is_delta}
    assert new == {"fc.weight", "fc.bias"}
    deltas = sum(tensor.parameter.numel() for name, tensor in tensors.items() if name not in new)
    assert Penalty("l2-sp", 1.0).loss(model).item() == pytest.approx(0.125 * deltas)
    whole = sum(0.5 * tensor.value.square().sum().item() for tensor in tensors.values())
    assert Penalty("l2", 1.0).loss(model).item() == pytest.approx(whole, rel=1e-6)


def test_penalty_errors():
    with pytest.raises(ConfigError, match="choose one of l1-sp"):
        Penalty("ridge", 1.0)
    with pytest.raises(ConfigError, match="strength=-1"):
        Penalty("l1-sp", -1)
    with pytest.raises(AdapterError, match="target='all'"):
        Penalty("l2-sp", 1.0).loss(network())


def loader():
    return DataLoader(list(zip(X, Y, strict=True)), 5)


def test_auto_rgn_takes_new_scores_every_epoch_and_resumes():
    def run(stop=None, state=None):
        model = adapted()
        optimizer = torch.optim.Adam(trainable(model), 0.01)
        pace = Pace(model, optimizer, AutoRGN(), total_steps=8, num_batches=2)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            pace.load_state_dict(state[2])
        while pace.step < (stop or 8):
            pace.start_epoch(pace.step // 4, loader())
            train(model, optimizer, steps=1)
        return (
            model,
            pace,
            (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), pace.state_dict()),
        )

    model, pace, _ = run()
    assert sorted(pace.record) == [0, 1]
    assert pace.record[0] != pace.record[1]
    assert max(pace.record[1].values()) == 1.0
    again, _, _ = run(state=run(stop=6)[2])  # in the middle of the second epoch
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(again).values(), strict=True))


class ByEpoch:
    """The head is frozen in epoch 0, and block 1 in all others."""

    criterion = None

    def factors(self, progress, scores=None):
        return {"fc.weight": float(progress.epoch > 0), "conv1.weight": float(progress.epoch == 0)}


def test_a_schedule_may_follow_the_epochs_also_where_one_ends_without_a_step():
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    pace = Pace(model, optimizer, ByEpoch(), total_steps=8)
    for epoch, frozen, free in ((0, "fc.weight", "conv1.weight"), (1, "conv1.weight", "fc.weight")):
        pace.start_epoch(epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()  # such as the rest of an accumulation that is never stepped
        assert not pace.tensors[frozen].parameter.grad.any()
        assert pace.tensors[free].parameter.grad.any()
        assert (pace.factors[frozen], pace.factors[free], pace.factors["layer2.0.weight"]) == (0.0, 1.0, 1.0)


def test_what_is_loaded_says_the_same_at_once():
    model = adapted()
    pace = Pace(model, torch.optim.SGD(trainable(model), 0.1), AutoRGN(), total_steps=8)
    for epoch in (0, 1):
        pace.start_epoch(epoch, loader())
        train(model, pace.optimizer, steps=2)
    again = adapted()
    resumed = Pace(again, torch.optim.SGD(trainable(again), 0.1), AutoRGN(), total_steps=8)
    resumed.load_state_dict(json.loads(json.dumps(pace.state_dict())))
    assert (resumed.step, resumed.epoch) == (4, 1)
    assert resumed.factors == pace.factors != pace.record[0]


def test_moments_that_a_resumed_epoch_has_begun_to_gather_are_kept():
    def run(stop, state=None):
        model = adapted()
        optimizer = torch.optim.Adam(trainable(model), 0.01)
        pace = Pace(model, optimizer, total_steps=6, reset_moments=True)
        for part, held in zip((model, optimizer, pace), state or (), strict=False):
            part.load_state_dict(held)
        while pace.step < stop:
            pace.start_epoch(pace.step // 3)
            train(model, optimizer, steps=1)
        return model, [copy.deepcopy(part.state_dict()) for part in (model, optimizer, pace)]

    model, state = run(6)
    assert {int(found["step"]) for found in state[1]["state"].values()} == {3}
    for stop in (3, 4):  # at the end of an epoch, and after the first step of the next
        again, _ = run(6, run(stop)[1])
        same(weights(model), weights(again))


class Notes(AutoRGN):
    """Auto-RGN that keeps where it was asked."""

    def factors(self, progress, scores):
        self.__dict__.setdefault("asked", []).append((progress, scores))
        return super().factors(progress, scores)


def test_scores_are_taken_as_the_pace_was_told():
    def loss(logits, labels):
        return logits.square().mean()

    model, schedule = adapted(), Notes()
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    blocks = {"block1": ["conv1", "bn1"], "block2": ["layer1", "layer2"], "head": "fc"}
    how = {"loss_fn": loss, "autocast": torch.bfloat16, "num_batches": 2, "blocks": blocks}
    pace = Pace(model, optimizer, schedule, total_steps=8, **how)
    pace.start_epoch(0, loader())
    train(model, optimizer, steps=3)
    expected = score_blocks(model, loader(), "rgn", **how)
    pace.start_epoch(1, loader())
    assert [progress for progress, _ in schedule.asked] == [Progress(0, 8, 0), Progress(3, 8, 1)]
    assert schedule.asked[1][1] == expected
    for name in how:  # each of them matters
        others = {key: value for key, value in how.items() if key != name}
        assert score_blocks(model, loader(), "rgn", **others) != expected


def test_scores_are_not_touched_by_the_gates_of_what_is_frozen():
    model = adapted()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    pace = Pace(model, optimizer, AutoSNR(1.0), total_steps=8)  # all but the largest frozen
    pace.start_epoch(0, loader())
    assert sorted(pace.record[0].values())[-2:] == [0.0, 1.0]
    train(model, optimizer, steps=1)
    fresh = adapted()
    fresh.load_state_dict(model.state_dict())
    expected = Pace(fresh, torch.optim.Adam(trainable(fresh), 0.01), AutoSNR(1.0), total_steps=8)
    expected.start_epoch(1, loader())
    pace.start_epoch(1, loader())
    assert pace.record[1] == expected.record[1]


def test_reset_moments_forgets_the_optimizer_state():
    model = adapted()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    pace = Pace(model, optimizer, total_steps=4, reset_moments=True)
    pace.start_epoch(0)
    train(model, optimizer, steps=2)
    pace.record[0] = {}
    pace.start_epoch(1)
    assert not optimizer.state


def test_under_accelerate_with_accumulation():
    model, reference = adapted(), adapted()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    prepared, wrapped, data = accelerator.prepare(model, optimizer, loader())
    pace = Pace(prepared, wrapped, Fixed(fc=0.0), total_steps=2)
    for x, y in data:
        with accelerator.accumulate(prepared):
            accelerator.backward(F.cross_entropy(prepared(x), y))
            wrapped.step()
            wrapped.zero_grad()
    assert pace.step == 2
    for name, tensor in trained_tensors(reference).items():
        tensor.parameter.requires_grad_(not name.startswith("fc"))
    by_hand = torch.optim.Adam(trainable(reference), 0.01)
    for pair in (slice(0, 10), slice(10, 20)):
        sum(
            F.cross_entropy(reference(x), y) / 2 for x, y in zip(X[pair].split(5), Y[pair].split(5), strict=True)
        ).backward()
        by_hand.step()
        by_hand.zero_grad()
    found = weights(model)
    for name, tensor in trained_tensors(reference).items():
        torch.testing.assert_close(found[name], tensor.value, rtol=1e-5, atol=1e-7)


def test_errors():
    model = adapted()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    with pytest.raises(ConfigError, match="total_steps=0"):
        Pace(model, optimizer, total_steps=0)
    with pytest.raises(AdapterError, match="holds none"):
        Pace(model, torch.optim.Adam(network().parameters(), 0.01), total_steps=1)
    with pytest.raises(AdapterError, match="no torch optimizer"):
        Pace(model, object(), total_steps=1)
    with pytest.raises(ConfigError, match="LBFGS"):
        Pace(model, torch.optim.LBFGS(trainable(model)), total_steps=1)
    pace = Pace(model, optimizer, AutoRGN(), total_steps=1)
    with pytest.raises(ConfigError, match=r"pace.start_epoch\(epoch, dataloader\)"):
        train(model, optimizer, steps=1)
    with pytest.raises(ConfigError, match="needs data"):
        pace.start_epoch(0)


def test_the_plot_shows_the_mean_factor_of_each_block():
    model = adapted()
    pace = Pace(model, torch.optim.SGD(trainable(model)), total_steps=1)
    pace.record = {
        0: {"conv1.weight": 1.0, "bn1.weight": 0.5, "fc.weight": 0.25},
        1: {"conv1.weight": 0.5, "bn1.weight": 0.5, "fc.weight": 1.0},
    }
    assert {line.get_label(): list(line.get_ydata()) for line in pace.plot().lines} == {
        "block1": [0.75, 0.5],
        "head": [0.25, 1.0],
    }


class CountsInGroup(torch.optim.Optimizer):
    """SGD that keeps what it has counted in its parameter groups, as schedule-free optimizers do."""

    def __init__(self, parameters, lr=0.1, per_group=1):
        super().__init__(parameters, {"lr": lr, "k": 0, "per_group": per_group})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += group["per_group"] or len(group["params"])
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["k"] * p.grad


def test_what_an_optimizer_keeps_in_its_groups_is_kept():
    model, reference = adapted(), adapted()
    optimizer = CountsInGroup(trainable(model))
    Pace(model, optimizer, Fixed(fc=0.5, conv1=0.0), total_steps=4)
    train(model, optimizer)
    assert [group["k"] for group in optimizer.param_groups] == [4]
    names = list(trained_tensors(reference))
    groups = [{"params": [t.parameter]} for t in trained_tensors(reference).values()]
    by_hand = CountsInGroup(groups)
    for group, name in zip(by_hand.param_groups, names, strict=True):
        group["lr"] *= 0.5 if name.startswith("fc") else 0.0 if name.startswith("conv1") else 1.0
    train(reference, by_hand)
    same(weights(model), weights(reference))


def test_an_optimizer_whose_groups_would_disagree_is_refused():
    model = adapted()
    optimizer = CountsInGroup(trainable(model), per_group=0)  # counts tensors, so each rate would count its own
    Pace(model, optimizer, Fixed(fc=0.5), total_steps=4)
    with pytest.raises(ConfigError, match="CountsInGroup keeps 'k' in its parameter groups"):
        train(model, optimizer, steps=1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(trainable(model))]


def test_a_new_pace_takes_the_place_of_one_that_was_left_behind():
    model, reference = adapted(), adapted()
    Pace(model, torch.optim.Adam(trainable(model), 0.01), Fixed(fc=0.0), total_steps=4)  # a run that was interrupted
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    Pace(model, optimizer, total_steps=4)
    train(model, optimizer)
    train(reference, torch.optim.Adam(trainable(reference), 0.01))
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(reference).values(), strict=True))


def test_a_pace_that_is_never_closed_does_not_keep_its_model():
    model = adapted()
    optimizer = torch.optim.Adam(trainable(model), 0.01)
    pace = Pace(model, optimizer, Fixed(fc=0.0), total_steps=4)
    gone = weakref.ref(model)
    del model, optimizer, pace
    gc.collect()
    assert gone() is None


def test_an_optimizer_whose_step_calls_its_parents_steps_once():
    """torch calls the hooks of both: the penalty must not count twice, nor the step."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.0)
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)  # only now does torch hook the parent's step
    optimizer = Own(parameters, lr=1.0)
    pace = Pace(model, optimizer, penalty=Penalty("l2-sp", 0.1), total_steps=10)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert pace.step == 1
    for parameter in parameters:
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9))
    optimizer.step()  # the same gradients again, as after an accumulation: with a penalty of their own
    assert pace.step == 2
    for parameter in parameters:
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9 - 0.1 - 0.09))
