"""PEFT's front door, transformers' own, and what they are used with."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file
from tiny import (
    CASES,
    ConvNet,
    Tied,
    bits,
    disturb,
    images,
    llama,
    native_adapters,
    outputs,
    same,
    snapshot,
    train,
    vit,
)
from torch import nn
from transformers import DynamicCache

from peft_surgical import SurgicalConfig
from peft_surgical.errors import (
    AdapterError,
    ConfigError,
    UnknownTargetError,
    UnresolvedTargetError,
    UnsupportedModelError,
)
from peft_surgical.tuner.layer import SurgicalLayer
from peft_surgical.tuner.mixed import _routed, _Routing

INPUTS = {"pixel_values": images()}
TOKENS = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


def adapted(target="block1", seed=3, **kwargs):
    torch.manual_seed(0)
    base = vit().eval()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, **kwargs))
    disturb(model, seed=seed)
    return base, model


def close(first, second):
    return torch.allclose(first, second, atol=1e-6)


# --- PEFT ---


def test_several_active_adapters_add_up():
    base, model = adapted()
    model.add_adapter("other", SurgicalConfig(target="block1 + head"))
    disturb(model)
    parts = {n: p for n, p in model.named_parameters() if ".surgical_delta." in n}
    model.base_model.set_adapter(["default", "other"])
    plain = copy.deepcopy(base).requires_grad_(False)
    tensors = dict(plain.named_parameters())
    for name, delta in parts.items():  # default's come first in every module, as in the list
        path, _, rest = name.removeprefix("base_model.model.").partition("surgery.surgical_delta.")
        tensors[path + rest.partition(".")[2]].data += delta.data
    assert torch.equal(outputs(plain, INPUTS), outputs(model, INPUTS))


def test_switching_deleting_and_status():
    _, model = adapted()
    one = outputs(model, INPUTS)
    model.add_adapter("other", SurgicalConfig(target="head"))
    assert torch.equal(outputs(model, INPUTS), one)  # added, not activated
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".other." in n} == set()
    disturb(model)
    model.set_adapter("other")
    assert all(".other." in n for n, p in model.named_parameters() if p.requires_grad)
    two = outputs(model, INPUTS)
    status = get_model_status(model)
    assert status.peft_types == {"default": "SURGICAL", "other": "SURGICAL"}
    assert status.active_adapters == ["other"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {layer.module_type for layer in get_layer_status(model)} == {"SurgicalLayer"}
    model.delete_adapter("default")
    assert torch.equal(outputs(model, INPUTS), two)
    assert not any(".default." in name for name in model.state_dict())


def test_unload_gives_the_base_back():
    base, model = adapted("all")
    network = model.unload()
    assert same(snapshot(network), snapshot(base))
    assert [type(m) for m in network.modules()] == [type(m) for m in base.modules()]
    assert not hasattr(network, "peft_config")
    train_flags = get_peft_model(network, SurgicalConfig(target="head"))  # and it can be adapted again
    assert outputs(train_flags, INPUTS).shape == (6, 5)


def test_merging_with_nan_is_refused_before_anything_changes():
    _, model = adapted("all")
    [p for n, p in model.named_parameters() if ".surgical_delta." in n][-1].data[0] = float("nan")
    before = snapshot(model)
    with pytest.raises(AdapterError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert same(snapshot(model), before)


def test_merging_swaps_parameters_and_keeps_the_old_ones():
    base, model = adapted()
    module = model.get_base_model().vit.layers[0].mlp.fc1
    old = module._parameters["weight"]
    model.merge_adapter()
    assert module._parameters["weight"] is not old
    assert torch.equal(old, base.vit.layers[0].mlp.fc1.weight)
    with pytest.warns(UserWarning, match="already merged|Already"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert module._parameters["weight"] is old


def test_scale_is_wise_ft_and_exact_at_both_ends(tmp_path):
    base, model = adapted("block1 + head")
    full, none = outputs(model, INPUTS), outputs(base, INPUTS)
    model.set_scale("default", 0.0)
    assert torch.equal(bits(outputs(model, INPUTS)), bits(none))
    model.set_scale("default", 0.5)
    half = outputs(model, INPUTS)
    plain = copy.deepcopy(base).requires_grad_(False)
    for name, parameter in plain.named_parameters():
        path, _, leaf = name.rpartition(".")
        delta = model.state_dict().get(f"base_model.model.{path}.surgery.surgical_delta.default.{leaf}")
        if delta is not None:
            parameter.data.add_(delta, alpha=0.5)
    assert torch.equal(half, outputs(plain, INPUTS))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), INPUTS), half)
    model.merge_adapter()
    assert torch.equal(outputs(model, INPUTS), half)
    with pytest.raises(AdapterError, match="is merged"):
        model.set_scale("default", 1.0)
    model.unmerge_adapter()
    model.set_scale("default", 1.0)
    assert torch.equal(bits(outputs(model, INPUTS)), bits(full))
    with pytest.raises(AdapterError, match="No adapter 'x'"):
        model.set_scale("x", 1.0)
    with pytest.raises(AdapterError, match="not a finite number"):
        model.set_scale("default", float("nan"))


def test_scaled_statistics_lie_between_source_and_adapter():
    network = CASES["conv+BN"].network()
    source = network.bn1.running_mean.clone()
    model = get_peft_model(network, SurgicalConfig(target="bn1", norm_stats="target"))
    train(model, images())
    own = model.get_base_model().bn1.running_mean.clone()
    assert not torch.equal(own, source)
    model.set_scale("default", 0.25)
    assert torch.equal(network.bn1.running_mean, torch.lerp(source, own, 0.25))
    model.set_scale("default", 0.0)
    assert torch.equal(network.bn1.running_mean, source)


def test_two_adapters_with_statistics_cannot_both_be_active():
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target="bn1", norm_stats="target"))
    model.add_adapter("other", SurgicalConfig(target="bn1", norm_stats="target"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="statistics do not add up"):
        model(images())


def test_modules_to_save_and_a_target_together(tmp_path):
    base, model = adapted("all", modules_to_save=["classifier"])
    assert not any("classifier" in name for name in model.peft_config["default"].tensor_names)
    train(model, INPUTS)
    tuned = outputs(model, INPUTS)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), INPUTS), tuned)
    assert torch.equal(outputs(model.merge_and_unload(), INPUTS), tuned)
    with pytest.raises(UnknownTargetError, match=r"modules_to_save=.'classifier'."):
        adapted("head", modules_to_save=["classifier"])


def test_a_new_head_for_new_classes(tmp_path):
    torch.manual_seed(0)
    base = vit().eval()
    base.classifier = nn.Linear(16, 3)
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", modules_to_save=["classifier"]))
    train(model, INPUTS)
    model.save_pretrained(tmp_path)
    fresh = copy.deepcopy(base)
    nn.init.normal_(fresh.classifier.weight)  # the head of a base never fits; it is in the adapter
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(outputs(again, INPUTS), outputs(model, INPUTS))


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_weighted_adapters_are_task_arithmetic(kind):
    from peft.utils import merge_utils

    _, model = adapted("block1")
    model.add_adapter("other", SurgicalConfig(target="block1 + head"))
    disturb(model)
    model.set_scale("other", 2.0)
    torch.manual_seed(5)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "new", kind, density=0.5)
    layers = dict(model.get_base_model().named_modules())
    assert set(model.peft_config["new"].tensor_names) == set(model.peft_config["other"].tensor_names)
    head = layers["classifier"].surgery
    fc = layers["vit.layers.0.mlp.fc1"].surgery
    pair = [fc.delta("default", "weight"), 2 * fc.delta("other", "weight")]
    if kind == "linear":
        assert torch.allclose(fc.delta("new", "weight"), 0.7 * pair[0] - 0.3 * pair[1])
        assert torch.allclose(head.delta("new", "weight"), -0.6 * head.delta("other", "weight"))
    elif kind == "ties":
        wanted = merge_utils.ties(
            [pair[0], -pair[1]], torch.tensor([0.7, 0.3]), 0.5
        )  # -0.3 of it is 0.3 of its negation
        assert torch.allclose(fc.delta("new", "weight"), wanted)
    else:
        assert 0 < (fc.delta("new", "weight") == 0).float().mean() < 1
    model.set_adapter("new")
    assert torch.isfinite(outputs(model, INPUTS)).all()


def test_weighted_adapters_refuse_what_does_not_add_up():
    _, model = adapted()
    for arguments, match in (
        ((["default", "x"], [1.0, 1.0], "new"), "No adapter x"),
        ((["default"], [1.0, 2.0], "new"), "1 adapters but 2 weights"),
        ((["default"], [1.0], "default"), "exists already"),
        ((["default"], [1.0], "new", "svd"), "No method 'svd'"),
        ((["default"], [1.0], "new", "ties"), "needs a density"),
    ):
        with pytest.raises(AdapterError, match=match):
            model.add_weighted_adapter(*arguments)


def test_mixed_batches_equal_one_adapter_at_a_time():
    _, model = adapted("embedding + block1")
    model.add_adapter("other", SurgicalConfig(target="block1 + head"))
    disturb(model)
    model.eval()
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = outputs(model, INPUTS)
    with model.disable_adapter():
        alone["__base__"] = outputs(model, INPUTS)
    names = ["other", "__base__", "default", "default", "other", "__base__"]
    mixed = outputs(model, {**INPUTS, "adapter_names": names})
    for row, name in enumerate(names):
        assert close(mixed[row], alone[name][row])
    assert torch.equal(outputs(model, INPUTS), alone["other"])  # and nothing stays behind
    with pytest.raises(AdapterError, match="non-existing adapter"):
        outputs(model, {**INPUTS, "adapter_names": ["x"] * 6})
    with pytest.raises(AdapterError, match="Length of `adapter_names`"):
        outputs(model, {**INPUTS, "adapter_names": ["other"]})
    model.train()
    with pytest.raises(AdapterError, match="training mode"):
        model(**INPUTS, adapter_names=names)


def test_mixed_batches_serve_each_sample_its_own_head():
    _, model = adapted("block1", modules_to_save=["classifier"])
    model.add_adapter("other", SurgicalConfig(target="block2", modules_to_save=["classifier"]))
    disturb(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save.other" in name:
            parameter.data += 1
    model.eval()
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = outputs(model, INPUTS)
    names = ["default", "other"] * 3
    mixed = outputs(model, {**INPUTS, "adapter_names": names})
    for row, name in enumerate(names):
        assert close(mixed[row], alone[name][row])


def test_mixed_batches_where_one_adapter_saves_the_head_whole_and_one_has_the_bases():
    base, model = adapted("block1", modules_to_save=["classifier"])
    model.add_adapter("other", SurgicalConfig(target="block2"))
    disturb(model)
    model.eval()
    alone = {"__base__": outputs(base, INPUTS)}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = outputs(model, INPUTS)
    names = ["default", "other", "__base__"] * 2
    mixed = outputs(model, {**INPUTS, "adapter_names": names})
    for row, name in enumerate(names):
        assert close(mixed[row], alone[name][row])


def test_mixed_batches_with_raw_parameters_and_root_tensors():
    case = CASES["root tokens"]
    model = get_peft_model(case.network(), SurgicalConfig(target="all", blocks=case.blocks))
    model.add_adapter("other", SurgicalConfig(target="cls_token + *.gamma", blocks=case.blocks))
    disturb(model)
    model.eval()
    model.set_adapter("other")
    other = outputs(model, images())
    with torch.no_grad():
        mixed = model(images(), adapter_names=["__base__"] * 3 + ["other"] * 3)
    assert close(mixed[3:], other[3:])


def test_mixed_batches_split_samples_and_never_time_or_a_mask():
    class Sequences(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, **kwargs)

        def forward(self, x, mask=None):
            if not self.attention.batch_first:
                x = x.transpose(0, 1)
            y = self.attention(x, x, x, attn_mask=mask)[0]
            return y if self.attention.batch_first else y.transpose(0, 1)

    names = ["default", "__base__", "default"]
    x, mask = torch.randn(3, 3, 4), torch.eye(3) - 1.0  # as many samples as queries
    for kwargs in ({}, {"batch_first": True}):
        model = get_peft_model(Sequences(**kwargs), SurgicalConfig(target=["all"])).eval()
        disturb(model, 0.5)
        with torch.no_grad():
            mixed, tuned = model(x, adapter_names=names), model(x)
            with model.disable_adapter():
                base = model(x)
            assert close(mixed[0], tuned[0])
            assert close(mixed[1], base[1])
            assert not close(tuned[1], base[1])
            layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
            routed = _routed(model.get_base_model().attention, lambda *a, **k: a[0], layers, _Routing(names, 1))
            if not kwargs:
                with pytest.raises(AdapterError, match="time first"):
                    routed(x, x, x)
            else:  # inside generate(), where modules split by themselves
                assert torch.equal(routed(x, x, x, attn_mask=mask), x)


def test_mixed_batches_generate_as_one_adapter_at_a_time():
    # generate() asks a forward's signature what it takes, and counts positions without the mask otherwise
    model = get_peft_model(llama().eval(), SurgicalConfig(target="block1 + embedding"))
    model.add_adapter("other", SurgicalConfig(target="block2"))
    disturb(model, 0.5)
    model.eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    tokens, alone = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), {}
    settings["attention_mask"] = torch.tensor([[1, 0, 1]] * 3)
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=tokens, **settings)
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=tokens, **settings)
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=tokens, adapter_names=names, **settings)
    assert all(torch.equal(mixed.sequences[row], alone[name].sequences[row]) for row, name in enumerate(names))
    for step, logits in enumerate(mixed.logits):
        assert all(close(logits[row], alone[name].logits[step][row]) for row, name in enumerate(names))
    assert len({tuple(found.sequences[0].tolist()) for found in alone.values()}) == 3  # or this test could not fail


@pytest.mark.parametrize("passed", ["under another name", "by position", "inside a container"])
def test_mixed_batches_share_one_cache_however_it_is_passed(passed):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.project, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, tokens, memory=None, extras=()):
            cache = extras[0]["memory"] if memory is None else memory
            states = self.project(self.embed(tokens))[:, None]
            return self.head(cache.update(states, states, 0)[0].sum((1, 2)))

    def twice(**keywords):  # two steps of a generation: the second one reads what the first has left
        cache = DynamicCache()
        given = {
            "under another name": ((), {"memory": cache}),
            "by position": ((cache,), {}),
            "inside a container": ((), {"extras": ({"memory": cache},)}),
        }
        arguments, named = given[passed]
        with torch.no_grad():
            return [model(tokens, *arguments, **named, **keywords) for tokens in (torch.arange(6).view(3, 2), first)]

    first = torch.tensor([[1], [2], [3]])
    model = get_peft_model(Remembers(), SurgicalConfig(target=["project"])).eval()
    model.add_adapter("other", SurgicalConfig(target=["embed", "head"]))
    disturb(model, 0.5)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = twice()
    with model.disable_adapter():
        alone["__base__"] = twice()
    names = ["other", "__base__", "default"]
    for step, mixed in enumerate(twice(adapter_names=names)):
        assert all(close(mixed[row], alone[name][step][row]) for row, name in enumerate(names))
    assert not close(alone["default"][1], alone["__base__"][1])


@pytest.mark.parametrize("target", ["re:.*self_attn.*", "re:.*out_proj.*", "re:.*linear1.*", "all"])
def test_mixed_batches_through_the_fast_path_of_torchs_encoder(target):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = get_peft_model(nn.Sequential(layer), SurgicalConfig(target=target)).eval()
    disturb(model, 0.5)
    x = torch.randn(4, 3, 4)
    with torch.no_grad():
        mixed, tuned = model(x, adapter_names=["default", "__base__"] * 2), model(x)
        with model.disable_adapter():
            base = model(x)
    assert not close(tuned, base)
    assert close(mixed[::2], tuned[::2])
    assert close(mixed[1::2], base[1::2])


def test_one_match_among_target_modules_is_enough_and_the_others_are_named():
    with pytest.warns(UserWarning, match=r"not in the base model: nothing matches 'blok1', 'out'\. Its modules"):
        _, model = adapted(None, target_modules=["blok1", "q_proj", "out"])
    _, plain = adapted(None, target_modules=["q_proj"])
    assert model.peft_config["default"].tensor_names == plain.peft_config["default"].tensor_names


@pytest.mark.parametrize("nothing", [{}, {"target_modules": []}, {"modules_to_save": ["classifier"]}])
def test_a_config_that_does_not_say_what_to_tune_is_refused_by_the_model(nothing):
    network = vit()
    before = snapshot(network)
    for inject in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        with pytest.raises(ConfigError, match=r"Please specify `target_modules`, or a target such as target='block1'"):
            inject(network, SurgicalConfig(**nothing))
    assert same(snapshot(network), before)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_pefts_conversion_for_changed_architectures_sees_the_config(monkeypatch):
    def renamed(config, model, conversions):  # as PEFT does for LoRA on models that transformers 5 laid out anew
        config.target_modules = ["q_proj" if name == "query" else name for name in config.target_modules]

    monkeypatch.setattr("peft_surgical.tuner.model.convert_peft_config_for_transformers", renamed)
    _, model = adapted(None, target_modules=["query"])
    names = model.peft_config["default"].tensor_names
    assert names
    assert all(".q_proj." in name for name in names)


def test_injection_without_a_peft_model():
    base = vit().eval()
    network = copy.deepcopy(base)
    inject_adapter_in_model(SurgicalConfig(target="block2"), network)
    disturb(network)
    state = get_peft_model_state_dict(network)
    for low in (False, True):
        again = copy.deepcopy(base)
        inject_adapter_in_model(SurgicalConfig(target="block2"), again, low_cpu_mem_usage=low)
        assert not set_peft_model_state_dict(again, state, low_cpu_mem_usage=low).unexpected_keys
        assert torch.equal(outputs(again, INPUTS), outputs(network, INPUTS))
    again = copy.deepcopy(base)
    inject_adapter_in_model(SurgicalConfig(target="block2"), again, state_dict=state)
    set_peft_model_state_dict(again, state)
    assert torch.equal(outputs(again, INPUTS), outputs(network, INPUTS))
    with pytest.warns(RuntimeWarning, match="state_dict decides"):
        inject_adapter_in_model(SurgicalConfig(target="block1"), copy.deepcopy(base), state_dict=state)


def test_the_base_keeps_its_keys():
    base, model = adapted("all")
    assert same(get_base_model_state_dict(model), snapshot(base))
    other = {key: value + 1 for key, value in snapshot(base).items()}
    set_base_model_state_dict(model, other)
    assert same(get_base_model_state_dict(model), other)


def test_copies_and_pickles_are_independent():
    _, model = adapted("all")
    before = outputs(model, INPUTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, INPUTS), before)
        disturb(twin, 1.0)
        assert not torch.equal(outputs(twin, INPUTS), before)
        twin.merge_adapter()
        twin.unload()
    assert torch.equal(outputs(model, INPUTS), before)


def test_a_model_that_is_deleted_is_freed_at_once():
    import gc
    import weakref

    _, model = adapted("all")
    reference = weakref.ref(model.get_base_model().vit.layers[0])
    gc.disable()
    try:
        del model
        assert reference() is None, "a cycle keeps the model until the garbage collector comes"
    finally:
        gc.enable()


def test_the_same_config_serves_two_networks():
    config = SurgicalConfig(target="block1")
    first = get_peft_model(vit(), config)
    second = get_peft_model(CASES["conv+BN"].network(), config)
    assert first.peft_config["default"] is config
    assert "layer1.0.weight" in second.peft_config["default"].tensor_names


def test_target_modules_peft_way():
    _, model = adapted(
        None, target_modules=["q_proj", "layers.1.mlp.fc2"], exclude_modules=["layers.0.attention.q_proj"]
    )
    assert {n.rpartition(".")[0] for n in model.peft_config["default"].tensor_names} == {
        "vit.layers.1.attention.q_proj",
        "vit.layers.1.mlp.fc2",
    }
    _, model = adapted(None, target_modules=r".*layers\.1\..*fc\d")
    assert {n.rpartition(".")[0] for n in model.peft_config["default"].tensor_names} == {
        "vit.layers.1.mlp.fc1",
        "vit.layers.1.mlp.fc2",
    }
    _, model = adapted(None, target_modules="all-linear")
    assert len(model.peft_config["default"].tensor_names) > 10
    with pytest.raises(UnknownTargetError, match="nothing matches 'blok1', 'blok2'"):
        adapted(None, target_modules=["blok1", "blok2"])
    with pytest.raises(UnknownTargetError, match=r"nothing matches 'blok\\\\d'"):
        adapted(None, target_modules=r"blok\d")
    with pytest.warns(UserWarning, match="no modules were excluded"):
        adapted(None, target_modules=["q_proj"], exclude_modules=["nope"])


def test_names_that_peft_would_lose_tensors_over():
    for name in ("0", "fc1", "vit", "model", "weight", "surgery", "a.b"):
        with pytest.raises(AdapterError, match="adapter"):
            get_peft_model(vit(), SurgicalConfig(target="block1"), adapter_name=name)
    _, model = adapted("head")
    with pytest.raises(AdapterError, match="'classifier' is also a part"):
        model.add_adapter("classifier", SurgicalConfig(target="block1"))
    assert list(model.peft_config) == ["default"]


def test_an_unresolved_target_says_which_call_resolves_it():
    with pytest.raises(UnresolvedTargetError, match=r"resolve_target\(config, model, dataloader\)"):
        adapted("auto-rgn")


def test_bases_that_cannot_be_tuned_say_why():
    network = vit()
    lora = get_peft_model(network, LoraConfig(target_modules=["q_proj"]))
    del lora.base_model.model.peft_config  # or PEFT would warn before we refuse
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.raises(AdapterError, match="already carries another PEFT method"),
    ):
        get_peft_model(lora.base_model.model, SurgicalConfig(target="block1"))

    offloaded = CASES["conv+BN"].network()
    offloaded.fc.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"fc .Linear..weight is offloaded"):
        get_peft_model(offloaded, SurgicalConfig(target="head"))
    get_peft_model(offloaded, SurgicalConfig(target="block1"))

    quantized = CASES["conv+BN"].network()
    quantized.fc.weight.quant_state = object()  # what bitsandbytes leaves on its parameters
    with pytest.raises(UnsupportedModelError, match=r"fc .Linear..weight is quantized"):
        get_peft_model(quantized, SurgicalConfig(target="head"))

    class Raw(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2))
            self.bias = nn.Parameter(torch.zeros(2))

    with pytest.raises(UnsupportedModelError, match="keeps tensors of its own beside the modules"):
        get_peft_model(nn.Sequential(Raw()), SurgicalConfig(target=["0.bias"]))

    class Hoarder(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.kept = [self.weight]

    with pytest.raises(UnsupportedModelError, match="in its attribute 'kept'"):
        get_peft_model(nn.Sequential(Hoarder()), SurgicalConfig(target=["0"]))

    with pytest.raises(UnknownTargetError, match="names only buffers"):
        get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target=["bn1.running_mean"]))


def test_integer_parameters_are_left_alone():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.table = nn.Parameter(torch.arange(2), requires_grad=False)

        def forward(self, x):
            return self.lin(x)[:, self.table]

    model = get_peft_model(Table(), SurgicalConfig(target=["all"]))
    assert model.peft_config["default"].tensor_names == ["lin.weight", "lin.bias"]


# --- tied tensors ---


@pytest.mark.parametrize("target", ["embed", "head", "head.weight"])
def test_a_tied_tensor_has_one_delta_and_stays_tied(target, tmp_path):
    base = CASES["tied"].network()
    tokens = torch.arange(6).view(2, 3)
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target))
    assert model.peft_config["default"].tensor_names == ["embed.weight"]
    disturb(model)
    network = model.get_base_model()
    assert torch.equal(network.embed.weight, network.head.weight)
    tuned = outputs(model, tokens)
    plain = copy.deepcopy(base).requires_grad_(False)
    plain.embed.weight += network.embed.surgery.delta("default", "weight").detach()
    assert torch.equal(outputs(plain, tokens), tuned)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(again, tokens), tuned)
    merged = again.merge_and_unload()
    assert merged.head.weight is merged.embed.weight
    assert torch.equal(outputs(merged, tokens), tuned)


def test_merging_leaves_a_partner_outside_the_model_alone():
    base = CASES["tied"].network()
    partner = base.embed.weight
    before = partner.detach().clone()
    model = get_peft_model(base, SurgicalConfig(target="embed"))
    disturb(model)
    model.merge_adapter()
    assert torch.equal(partner, before)


def test_a_module_that_is_used_twice():
    shared = nn.Linear(4, 4)
    model = get_peft_model(nn.Sequential(shared, nn.Tanh(), shared), SurgicalConfig(target=["0"]))
    disturb(model)
    assert model.peft_config["default"].tensor_names == ["0.weight", "0.bias"]
    x = torch.randn(2, 4)
    plain = nn.Linear(4, 4)
    plain.load_state_dict({"weight": shared.weight.detach(), "bias": shared.bias.detach()})
    assert close(outputs(model, x), plain(torch.tanh(plain(x))).detach())


def test_transformers_tied_embeddings(tmp_path):
    base = llama().eval()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="embedding"))
    disturb(model)
    tuned = outputs(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert torch.equal(outputs(merged, TOKENS), tuned)


@native_adapters
def test_transformers_own_loading_keeps_embeddings_tied(tmp_path):
    base = llama().eval()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="embedding"))
    disturb(model)
    model.save_pretrained(tmp_path)
    native = copy.deepcopy(base)
    native.load_adapter(str(tmp_path))
    assert torch.equal(outputs(native, TOKENS), outputs(model, TOKENS))
    assert native.lm_head._parameters["weight"] is native.model.embed_tokens._parameters["weight"]


# --- other modules that read their tensors in their own way ---


def test_recurrent_weights_are_read_through_deltas():
    network = nn.Sequential(nn.LSTM(4, 4, 2, bidirectional=True))
    plain = copy.deepcopy(network).requires_grad_(False)
    model = get_peft_model(network, SurgicalConfig(target=["all"]))
    disturb(model)
    for name, parameter in plain[0].named_parameters():
        parameter += network[0].surgery.delta("default", name).detach()
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        assert torch.equal(model(x)[0], plain(x)[0])
    copy.deepcopy(model)
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(merged(x)[0], plain(x)[0])
    assert type(merged[0]) is nn.LSTM
    assert merged[0]._flat_weights[0] is merged[0].weight_ih_l0


def test_a_read_that_fails_does_not_fall_back_to_the_base_in_silence():
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target="head"))
    del model.get_base_model().fc.surgery.scaling
    with pytest.raises(RuntimeError, match="reading the tuned tensor 'weight' failed"):
        model(images())


# --- transformers and Trainer ---


@native_adapters
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter default was active")  # PEFT's
def test_transformers_own_adapters(tmp_path):
    torch.manual_seed(0)
    base = vit().eval()
    network = copy.deepcopy(base)
    network.add_adapter(SurgicalConfig(target="embedding"))
    assert torch.equal(outputs(network, INPUTS), outputs(base, INPUTS))
    disturb(network)
    tuned = outputs(network, INPUTS)
    network.save_pretrained(tmp_path)
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path))
    assert torch.equal(outputs(again, INPUTS), tuned)
    now = {key: value for key, value in snapshot(again).items() if "surgery" not in key}
    assert same(now, snapshot(base))  # not re-initialised either
    again.disable_adapters()
    assert torch.equal(outputs(again, INPUTS), outputs(base, INPUTS))
    again.enable_adapters()
    disturb(again)
    other = outputs(again, INPUTS)
    again.load_adapter(str(tmp_path), adapter_name="other")
    again.set_adapter("other")
    assert torch.equal(outputs(again, INPUTS), tuned)
    again.set_adapter("default")
    assert torch.equal(outputs(again, INPUTS), other)
    again.delete_adapter("default")
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), INPUTS), tuned)


@native_adapters
def test_the_norm_policy_holds_without_a_tuner():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=5
    )
    network = transformers.ResNetForImageClassification(config)
    network.add_adapter(SurgicalConfig(target="head"))
    before = snapshot(network)
    network.train()
    network(pixel_values=torch.randn(4, 3, 32, 32))
    assert same(snapshot(network), before)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"pixel_values": images(8)[row], "labels": row % 5}


def trainer(model, folder, **kwargs):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        label_names=["labels"],
        dataloader_pin_memory=False,
        **kwargs,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_trainer_trains_saves_resumes_and_loads_the_best(tmp_path):
    _, model = adapted("block1 + head")
    one = trainer(model, tmp_path / "one", load_best_model_at_end=True, metric_for_best_model="loss")
    one.train()
    assert one.state.best_model_checkpoint is not None
    held = load_file(f"{one.state.best_model_checkpoint}/adapter_model.safetensors")
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(held[key], now[key]) for key in held)
    assert len(held) == len(model.peft_config["default"].tensor_names)

    _, straight = adapted("block1 + head")
    trainer(straight, tmp_path / "straight").train()
    _, resumed = adapted("block1 + head", seed=9)  # its deltas come from the checkpoint
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-4"))
    first, second = get_peft_model_state_dict(straight), get_peft_model_state_dict(resumed)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_gradient_checkpointing_gives_the_same_gradients():
    _, model = adapted("embedding + block1")
    network = model.get_base_model()
    found = []
    for switch in (network.gradient_checkpointing_enable, network.gradient_checkpointing_disable):
        switch()
        model.train()
        model.zero_grad()
        model(**INPUTS).logits.pow(2).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(found[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_torch_compile_sees_deltas_switches_and_gradients():
    torch._dynamo.reset()
    _, model = adapted("embedding + block1")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(compiled(**INPUTS).logits, model(**INPUTS).logits)
    compiled(**INPUTS).logits.sum().backward()
    first = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(**INPUTS).logits.sum().backward()
    second = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first, second, strict=True))
    with model.disable_adapter():
        assert close(compiled(**INPUTS).logits, model(**INPUTS).logits)
    model.set_scale("default", 0.5)
    assert close(compiled(**INPUTS).logits, model(**INPUTS).logits)


# --- among many ---


def visits(model, monkeypatch, work):
    """How often any module is asked for its children or parameters while ``work`` runs."""
    counted = 0

    def counting(original):
        def method(self, *args, **kwargs):
            nonlocal counted
            counted += 1
            return original(self, *args, **kwargs)

        return method

    with monkeypatch.context() as patches:
        for name in ("named_modules", "_named_members", "_save_to_state_dict", "_load_from_state_dict", "train"):
            patches.setattr(nn.Module, name, counting(getattr(nn.Module, name)))
        work()
    return counted


def test_switching_scaling_disabling_and_loading_do_not_visit_the_other_adapters(monkeypatch, tmp_path):
    _, model = adapted("block1")
    disturb(model)
    model.save_pretrained(tmp_path)

    def disable():
        with model.disable_adapter():
            pass

    works = {
        "set_adapter": lambda: model.set_adapter("default"),
        "set_scale": lambda: model.set_scale("default", 1.0),
        "disable_adapter": disable,
        "load_adapter": lambda: model.load_adapter(tmp_path, "further"),
    }
    few = {name: visits(model, monkeypatch, work) for name, work in works.items()}
    for i in range(7):
        model.load_adapter(tmp_path, f"other{i}")
    model.delete_adapter("further")
    many = {name: visits(model, monkeypatch, work) for name, work in works.items()}
    assert many == few
    assert [few[name] for name in ("set_adapter", "set_scale", "disable_adapter")] == [0, 0, 0]
    # What was hidden while another was loaded is there again, and in its order.
    layer = next(module for module in model.modules() if isinstance(module, SurgicalLayer))
    assert list(layer.surgical_delta) == ["default", *(f"other{i}" for i in range(7)), "further"]


def test_an_adapter_that_is_loaded_leaves_the_others_as_they_were(tmp_path):
    _, model = adapted("block1 + head")
    disturb(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.set_requires_grad("default", False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = outputs(model, INPUTS)
    model.load_adapter(tmp_path, "third")
    assert {name: p.requires_grad for name, p in model.named_parameters() if ".third." not in name} == flags
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".third." in name)
    assert torch.equal(outputs(model, INPUTS), before)
    with pytest.raises(AdapterError, match="is also a part of a tensor's path"):
        model.load_adapter(tmp_path, "weight")
    assert list(model.peft_config) == ["default", "second", "third"]
    assert torch.equal(outputs(model, INPUTS), before)
    for name in ("third", "second", "default"):
        model.set_adapter(name)
        trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {name}
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_disabling_what_is_disabled_in_part_warns_as_ever():
    _, model = adapted("block1")
    layer = next(module for module in model.modules() if isinstance(module, SurgicalLayer))
    layer._disable_adapters = True
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), model.disable_adapter():
        pass
    assert not layer._disable_adapters
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert layer._disable_adapters  # it was before


@pytest.mark.parametrize("mode", [False, True])
def test_torch_compile_reads_the_mode_of_held_statistics(mode):
    """Before 2.12 torch.compile took the mode that a norm stores for the property that reads it, without end."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(ConvNet(nn.BatchNorm2d), SurgicalConfig(target="block1")).train(mode)
    images = torch.randn(2, 3, 8, 8)
    assert close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


def test_an_adapter_of_a_compiled_network_is_the_networks(tmp_path):
    base = vit().eval()
    model = get_peft_model(torch.compile(copy.deepcopy(base), backend="eager"), SurgicalConfig(target="block1"))
    disturb(model)
    tuned = outputs(model, INPUTS)
    assert not any("_orig_mod" in name for name in model.peft_config["default"].tensor_names)
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert close(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), INPUTS), tuned)
    again = torch.compile(copy.deepcopy(base), backend="eager")
    assert close(outputs(PeftModel.from_pretrained(again, tmp_path), INPUTS), tuned)


def test_moving_and_casting_the_model():
    _, model = adapted("all")
    before = outputs(model, INPUTS)
    assert outputs(model.double(), {"pixel_values": images().double()}).dtype == torch.float64
    assert close(outputs(model.float(), INPUTS), before)
    model.merge_adapter()
    model.half().float()
    model.unmerge_adapter()
    assert outputs(model, INPUTS).dtype == torch.float32
    base = vit().bfloat16()
    half = get_peft_model(base, SurgicalConfig(target="all"))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    half = get_peft_model(vit().bfloat16(), SurgicalConfig(target="all"), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}


def test_loading_through_the_config_class(tmp_path):
    _, model = adapted("block1", task_type="FEATURE_EXTRACTION")
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, SurgicalConfig)
    assert config.target == "block1"
    assert config.task_type == "FEATURE_EXTRACTION"


# --- pinned limitations of PEFT for a method outside its tree ---


def test_mixed_models_and_hotswap_refuse_cleanly(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    with pytest.raises(ValueError, match=r"SURGICAL|mixed|compatible"):
        get_peft_model(vit(), SurgicalConfig(target="block1"), mixed=True)
    _, model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hotswap|SURGICAL|LORA|not supported"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_an_adapter_of_the_tied_case_is_a_table_row():
    assert isinstance(CASES["tied"].network(), Tied)
