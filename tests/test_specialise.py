import copy
import inspect
import pickle

import torch
from torch import nn

from peft_surgical.tuner.attach import ReadsDeltas, attach, detach
from peft_surgical.tuner.specialise import HoldsStatistics, Special, base_class, restore, specialise


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
