"""Adapter operations in any order, against plain copies: what the model reads is base + the sum of scale * delta.

The reference is a dict of tensors for each adapter, and a copy of the network that never sees an adapter.
"""

import copy
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from tiny import bits, same, snapshot, used_batchnorm

from peft_surgical import SurgicalConfig, set_scale

TARGETS = st.sampled_from(("head", "block1", "all", "conv1 + head", "*.bias"))
SCALES = st.sampled_from((0.0, 0.5, 1.0, 2.0))  # products with powers of two are exact, however they are computed
WEIGHTS = st.sampled_from((-1.0, 0.5, 1.0, 2.0))
SEEDS = st.integers(0, 2**16)
INPUTS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BASE = used_batchnorm().requires_grad_(False).eval()


class Operations(RuleBasedStateMachine):
    """What is done to a model, and what it should have become."""

    @initialize(what=TARGETS, seed=SEEDS)
    def begin(self, what, seed):
        self.count, self.merged, self.scales = 0, [], {"a0": 1.0}
        self.model = get_peft_model(copy.deepcopy(BASE), SurgicalConfig(target=what), adapter_name="a0").eval()
        self.active, self.deltas = ["a0"], {"a0": {}}
        self.move("a0", seed)

    # --- the reference ---

    def live(self, name):
        """The adapter's deltas in the model, by the base's names."""
        mark = f"surgery.surgical_delta.{name}."
        found = self.model.base_model.model.named_parameters()
        return {key.replace(mark, ""): value for key, value in found if mark in key}

    def plain(self, adapters):
        """A copy of the base that has the sum of these adapters in its own tensors."""
        network = copy.deepcopy(BASE)
        tensors = dict(network.named_parameters())
        for name in adapters:
            for key, delta in self.deltas[name].items():
                tensors[key].data = tensors[key].data + self.scales[name] * delta
        return network

    def chosen(self, data):
        return data.draw(st.sampled_from(sorted(self.deltas)))

    # --- the operations ---

    def move(self, name, seed):
        generator = torch.Generator().manual_seed(seed)
        for key, delta in self.live(name).items():
            delta.data = 0.05 * torch.randn(delta.shape, generator=generator)
            self.deltas[name][key] = delta.data.clone()

    @rule(what=TARGETS, seed=SEEDS)
    def add(self, what, seed):
        self.count += 1
        name = f"a{self.count}"
        self.model.add_adapter(name, SurgicalConfig(target=what))
        self.deltas[name], self.scales[name] = {}, 1.0
        self.move(name, seed)

    @precondition(lambda self: not self.merged and any(self.scales[name] for name in self.active))
    @rule()
    def train(self):
        plain = self.plain(self.active)
        for parameter in plain.parameters():
            parameter.requires_grad_(True)
        for network in (self.model, plain):
            network(INPUTS).square().mean().backward()
        wanted = dict(plain.named_parameters())
        for name in self.active:
            for key, delta in self.live(name).items():
                if delta.grad is None:  # with a scale of zero it is not read at all
                    assert self.scales[name] == 0.0
                    continue
                assert torch.allclose(delta.grad, self.scales[name] * wanted[key].grad, atol=1e-6)
                delta.data -= 0.1 * delta.grad
                delta.grad = None
                self.deltas[name][key] = delta.data.clone()

    @rule(data=st.data())
    def switch(self, data):
        name = self.chosen(data)
        self.model.set_adapter(name)
        self.active, self.merged = [name], []  # a switch takes out what was merged, as PEFT's does

    @rule(data=st.data())
    def activate_several(self, data):
        self.active = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=1, max_size=3, unique=True))
        self.model.base_model.set_adapter(self.active)
        self.merged = []

    @rule()
    def disable(self):
        with self.model.disable_adapter(), torch.no_grad():
            assert torch.equal(bits(self.model(INPUTS)), bits(BASE(INPUTS)))
        self.merged = []  # showing the base takes out what was merged

    @rule()
    def merge(self):
        self.model.merge_adapter()
        self.merged += [name for name in self.active if name not in self.merged]

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @precondition(lambda self: not self.merged and len(self.deltas) > 1)
    @rule(data=st.data())
    def delete(self, data):
        name = self.chosen(data)
        if len(self.active) > 1 and name == self.model.active_adapter:
            return  # where several are active, PeftModel itself goes on asking for the one that it activated
        self.model.delete_adapter(name)
        del self.deltas[name], self.scales[name]
        assert not self.live(name)
        self.active = list(self.model.active_adapters)
        assert {*self.active} <= {*self.deltas}

    @rule(data=st.data(), scale=SCALES)
    def scale(self, data, scale):
        name = self.chosen(data)
        if name not in self.merged:
            set_scale(self.model, name, scale)
            self.model.peft_config[name].scale = scale
            self.scales[name] = scale

    @precondition(lambda self: len(self.deltas) > 1)
    @rule(data=st.data(), weights=st.tuples(WEIGHTS, WEIGHTS))
    def combine(self, data, weights):
        pair = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=2, max_size=2, unique=True))
        self.count += 1
        new = f"a{self.count}"
        self.model.add_weighted_adapter(pair, list(weights), new, "linear")
        self.deltas[new], self.scales[new] = {}, 1.0
        for name, weight in zip(pair, weights, strict=True):
            for key, delta in self.deltas[name].items():
                self.deltas[new][key] = self.deltas[new].get(key, 0.0) + weight * self.scales[name] * delta

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def mix(self, data):
        names = data.draw(st.lists(st.sampled_from(["__base__", *sorted(self.deltas)]), min_size=3, max_size=3))
        with torch.no_grad():
            mixed = self.model(INPUTS, adapter_names=names)
            for i, name in enumerate(names):
                alone = self.plain([] if name == "__base__" else [name])(INPUTS)
                assert torch.allclose(mixed[i], alone[i], rtol=1e-4, atol=1e-5)

    @rule()
    def restart(self):
        """All is saved, and goes on in another process."""
        first, *others = sorted(self.deltas)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            again = copy.deepcopy(BASE)
            self.model = PeftModel.from_pretrained(again, Path(folder, first), adapter_name=first, is_trainable=True)
            for name in others:
                self.model.load_adapter(Path(folder, name), name, is_trainable=True)
        self.model.eval()
        self.active, self.merged = [first], []

    @rule(data=st.data())
    def save_and_load(self, data):
        name = self.chosen(data)
        self.count += 1
        new = f"a{self.count}"
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            self.model.load_adapter(Path(folder, name), new, is_trainable=True)
            alone = PeftModel.from_pretrained(copy.deepcopy(BASE), Path(folder, name))
        self.deltas[new] = {key: delta.clone() for key, delta in self.deltas[name].items()}
        self.scales[new] = self.scales[name]
        with torch.no_grad():
            assert torch.equal(bits(alone(INPUTS)), bits(self.plain([name])(INPUTS)))

    # --- what always holds ---

    @invariant()
    def reads_base_and_deltas(self):
        with torch.no_grad():
            assert torch.equal(bits(self.model(INPUTS)), bits(self.plain(self.merged or self.active)(INPUTS)))

    @invariant()
    def keeps_every_delta(self):
        for name, deltas in self.deltas.items():
            live = self.live(name)
            assert live.keys() == deltas.keys()
            assert all(torch.equal(live[key], delta) for key, delta in deltas.items())

    def teardown(self):
        if hasattr(self, "model"):
            assert same(snapshot(self.model.unload()), snapshot(BASE))


@pytest.mark.filterwarnings("ignore")  # PEFT says what is already merged, or not
@pytest.mark.parametrize(
    ("examples", "steps"), [(4, 10), pytest.param(150, 30, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_any_order_of_operations(examples, steps):
    how = {"deadline": None, "derandomize": True, "suppress_health_check": [*HealthCheck]}
    run_state_machine_as_test(Operations, settings=settings(max_examples=examples, stateful_step_count=steps, **how))


@pytest.mark.filterwarnings("ignore")  # PEFT says which adapter each module would choose
def test_after_the_active_adapter_is_deleted_one_other_is_active_everywhere():
    model = get_peft_model(copy.deepcopy(BASE), SurgicalConfig(target="head"), adapter_name="a").eval()
    model.add_adapter("b", SurgicalConfig(target="block1"))
    model.add_adapter("c", SurgicalConfig(target="head"))
    for name, delta in model.named_parameters():
        if ".surgical_delta.c." in name:
            delta.data += 0.1
    model.delete_adapter("a")  # of the head's adapters c is left, of block1's b
    assert model.active_adapters == ["b"]
    with torch.no_grad():
        assert torch.equal(bits(model(INPUTS)), bits(BASE(INPUTS)))  # b is new
    model.delete_adapter("b")
    model.delete_adapter("c")
    assert model.active_adapters == []


@pytest.mark.filterwarnings("ignore")
def test_where_the_first_module_has_no_adapter_left_the_active_one_is_still_known():
    model = get_peft_model(copy.deepcopy(BASE), SurgicalConfig(target="head"), adapter_name="a").eval()
    model.add_adapter("b", SurgicalConfig(target="block1"))
    model.delete_adapter("b")
    model.add_adapter("c", SurgicalConfig(target="head"))
    model.delete_adapter("a")
    assert (model.active_adapter, model.active_adapters) == ("c", ["c"])
    model(INPUTS)
