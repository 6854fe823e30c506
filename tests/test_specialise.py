import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn

from peft_surgical.tuner.attach import ReadsDeltas, attach, detach
from peft_surgical.tuner.specialise import (
    HoldsStatistics,
    Special,
    base_class,
    has_statistics,
    hold_buffers,
    moving_statistics,
    restore,
    specialise,
    statistics_of,
)


def test_a_special_module_is_still_what_it_was():
    module = nn.Linear(2, 3)
    identity, handle = id(module), module.register_forward_hook(lambda *_: None)
    attach(module, "default", {"weight": [(module, "weight")]}, (), 1.0)
    assert id(module) == identity
    assert isinstance(module, nn.Linear)
    assert isinstance(module, Special)
    assert type(module).__name__ == "Linear"
    assert type(module).__module__ == nn.Linear.__module__
    assert inspect.signature(module.forward) == inspect.signature(nn.Linear(1, 1).forward)
    assert module._forward_hooks[handle.id] is not None
    assert [name for name, _ in module.named_parameters()][:2] == ["weight", "bias"]
    detach(module)
    assert type(module) is nn.Linear
    assert "surgery_links" not in vars(module)


def test_classes_that_nobody_uses_any_more_go():
    class Local(nn.Linear):
        pass

    module = Local(2, 3)
    specialise(module, HoldsStatistics)
    special, base = weakref.ref(type(module)), weakref.ref(Local)
    del module, Local
    gc.collect()
    assert (special(), base()) == (None, None)


def test_the_same_request_gives_the_same_class_and_traits_add_up():
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    specialise(first, HoldsStatistics)
    specialise(first, ReadsDeltas, ("weight",))
    specialise(second, ReadsDeltas, ("weight",))
    specialise(second, HoldsStatistics)
    assert type(first) is type(second)
    specialise(first, ReadsDeltas, ("bias",))
    assert type(first).special_tensors == ("bias", "weight")
    assert base_class(first) is nn.BatchNorm1d
    restore(first)
    assert type(first) is nn.BatchNorm1d


def test_copies_read_their_own_deltas():
    module = nn.Linear(2, 2)
    attach(module, "default", {"weight": [(module, "weight")]}, (), 1.0).set_adapter("default")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.surgery.delta("default", "weight").data.fill_(1.0)
        assert torch.equal(twin.weight, twin._parameters["weight"] + 1)
        assert twin.surgery.get_base_layer() is twin
    assert torch.equal(module.weight, module._parameters["weight"])


def test_tracing_treats_a_tuned_module_as_the_leaf_that_it_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    attach(model[0], "default", {"weight": [(model[0], "weight")]}, (), 1.0).set_adapter("default")
    model[0].surgery.delta("default", "weight").data.fill_(1.0)
    x = torch.randn(3, 2)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_replica_of_data_parallel_reads_its_own_deltas():
    """What nn.DataParallel does to a module, without the devices: plain tensors, no parameters, new children."""
    module = nn.Linear(2, 2)
    attach(module, "default", {"weight": [(module, "weight")]}, (), 1.0).set_adapter("default")

    def replicate(original):
        replica = original._replicate_for_data_parallel()
        for name, child in original._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in original._parameters.items():
            setattr(replica, name, parameter.detach() + 1)
        return replica

    replica = replicate(module)
    assert torch.equal(replica.weight, module._parameters["weight"] + 1 + 1)
    assert torch.equal(module.weight, module._parameters["weight"])


def test_the_annotations_of_traits_can_be_evaluated():
    # transformers does so for every subclass of PreTrainedModel, a special one included
    import typing

    from peft_surgical.tuner.attach import ReadsDeltas, ReadsRecurrentDeltas
    from peft_surgical.tuner.specialise import HoldsStatistics

    for trait in (ReadsDeltas, ReadsRecurrentDeltas, HoldsStatistics):
        typing.get_type_hints(trait)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.InstanceNorm2d(2, track_running_stats=True), True),
        (nn.InstanceNorm2d(2), False),
        (nn.BatchNorm1d(2, track_running_stats=False), False),
        (nn.GroupNorm(1, 2), False),
        (nn.LayerNorm(2), False),
    ],
    ids=str,
)
def test_which_modules_keep_statistics(module, expected):
    assert has_statistics(module) is expected
    assert bool(statistics_of(module)) is expected


def test_policies():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    modules = list(model.named_modules())
    first = ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    second = [name.replace("0.", "2.", 1) for name in first]
    assert moving_statistics("frozen", modules, {"0"}) == []
    assert moving_statistics("target", modules, {"0", "1"}) == first
    assert moving_statistics("all", modules, {"1"}) == first + second


def test_held_statistics_ignore_the_mode_and_come_back():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    plain_class = type(model[0])
    hold_buffers(model)
    x = torch.randn(4, 2)
    for again in (model, pickle.loads(pickle.dumps(model))):
        again.train()
        assert again[0].training is False
        assert again[1].training is True
        assert torch.equal(again[0](x), x / (1 + 1e-5) ** 0.5)
        assert again[0].num_batches_tracked == 0
        assert isinstance(again[0], nn.BatchNorm1d)
    restore(model[0])
    assert type(model[0]) is plain_class
    assert model[0].training is True  # what the user asked for last


def test_children_of_a_held_module_follow_the_mode():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d(2, act_layer=nn.Dropout)
    hold_buffers(norm)
    norm.train()
    assert norm.training is False
    assert norm.act.training is True
