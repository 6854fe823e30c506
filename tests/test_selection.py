"""Criteria and targets from data: against ten-line references, on every form of batch, and leaving no trace."""

import importlib
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from tiny import ConvNet
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import BatchFeature, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from peft_surgical import SurgicalConfig, anatomy_of, resolve_target, score_blocks
from peft_surgical.choosing import CRITERIA
from peft_surgical.choosing.gradients import is_looking
from peft_surgical.choosing.models import forward_loss, trained_tensors
from peft_surgical.choosing.scores import axis_ratios
from peft_surgical.errors import AdapterError, ConfigError, DataError, UnresolvedTargetError, UnsupportedModelError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ConvNet(nn.BatchNorm2d)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 5) for _ in range(3)]


def gradients_by_hand(net, x, y):
    """Gradients of the mean loss in eval mode, by name."""
    net.eval()
    loss = F.cross_entropy(net(x), y)
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


def per_input_by_hand(net, batches):
    rows = [gradients_by_hand(net, x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_rgn_is_the_mean_over_batches_of_gradient_norm_over_weight_norm(net, batches):
    scores = score_blocks(net, batches, "rgn", num_batches=2)
    found = [gradients_by_hand(net, x, y) for x, y in batches[:2]]
    for name, p in net.named_parameters():
        expected = sum(g[name].norm() for g in found) / 2 / p.norm() if p.norm() > 0 else None
        if expected is not None:
            assert scores.tensor_scores[name] == pytest.approx(expected.item(), rel=1e-5)
    names = ["layer2.0.weight", "layer2.0.bias", "layer2.1.weight", "layer2.1.bias"]
    gradient = sum(torch.cat([g[n].flatten() for n in names]).norm() for g in found) / 2
    weights = torch.cat([net.get_parameter(n).flatten() for n in names]).norm()
    assert scores["block2"] == pytest.approx((gradient / weights).item(), rel=1e-5)
    assert (scores.num_samples, scores.num_batches, scores.uses_labels, scores.split) == (12, 2, True, "tuning")
    assert sum(scores.num_parameters.values()) == sum(p.numel() for p in net.parameters())


def test_rgn_of_a_tensor_that_is_all_zero_is_that_of_its_block(net, batches):
    nn.init.zeros_(net.fc.bias)
    scores = score_blocks(net, batches, "rgn")
    assert scores.tensor_scores["fc.bias"] == scores["head"] > 0
    nn.init.zeros_(net.fc.weight)
    scores = score_blocks(net, batches, "rgn")
    assert scores.tensor_scores["fc.weight"] == scores["head"] == 0  # nothing to compare with in the whole block


def test_snr_is_squared_mean_over_variance_over_inputs(net, batches):
    scores = score_blocks(net, batches, "snr", num_batches=None)
    for name, g in per_input_by_hand(net, batches).items():
        expected = torch.nan_to_num(g.double().mean(0) ** 2 / g.double().var(0), posinf=0.0).mean()
        assert scores.tensor_scores[name] == pytest.approx(float(expected), rel=1e-3)


def test_snr_counts_entries_without_noise_as_0_and_a_block_entry_by_entry(net, batches):
    dark = [(x * torch.tensor([1.0, 1.0, 0.0]).reshape(3, 1, 1), y) for x, y in batches]  # one channel is black
    scores = score_blocks(net, dark, "snr", num_batches=None)
    entries = {}
    for name, g in per_input_by_hand(net, dark).items():
        variance = g.double().var(0)
        entries[name] = torch.where(variance > 0, g.double().mean(0) ** 2 / variance, 0.0).flatten()
    assert (entries["conv1.weight"] == 0).float().mean() == pytest.approx(1 / 3)
    assert scores.tensor_scores["conv1.weight"] == pytest.approx(float(entries["conv1.weight"].mean()), rel=1e-3)
    head = torch.cat([entries["fc.weight"], entries["fc.bias"]])
    assert scores["head"] == pytest.approx(float(head.mean()), rel=1e-3)


def test_fisher_is_the_mean_squared_gradient_over_inputs(net, batches):
    scores = score_blocks(net, batches, "fisher", num_batches=None)
    found = per_input_by_hand(net, batches)
    for name, g in found.items():
        assert scores.tensor_scores[name] == pytest.approx(float(g.square().mean()), rel=1e-4)
    head = torch.cat([found["fc.weight"].flatten(1), found["fc.bias"].flatten(1)], 1)
    assert scores["head"] == pytest.approx(float(head.square().mean()), rel=1e-4)


def test_snr_reference_is_the_mean_over_minibatches_of_what_the_reference_code_computes(net, batches):
    """Against plain numpy, from gradients by hand; every tensor of more than one row, and one of a single row."""
    scores = score_blocks(net, batches, "snr-reference", num_batches=None)
    found = [gradients_by_hand(net, x, y) for x, y in batches]
    blocks = {}
    for name, score in scores.tensor_scores.items():
        values = []
        for row in found:
            g = row[name].double().numpy()
            values.append(g**2 / (g.var(axis=0, ddof=1, keepdims=True) + 1e-8))
        assert score == pytest.approx(sum(value.mean() for value in values) / len(values), rel=1e-4)
        blocks.setdefault("head" if name.startswith("fc") else name, []).extend(values)
    head = sum(float(value.sum()) for value in blocks["head"]) / len(found)
    entries = sum(value.size for value in blocks["head"]) / len(found)
    assert scores["head"] == pytest.approx(head / entries, rel=1e-4)
    single = axis_ratios(torch.tensor([[[0.5, -2.0]]]))  # one unit, a tensor (1, 2): no variance
    assert single.tolist() == pytest.approx([(0.25 + 4.0) / 1e-8])


def test_rgn_residual_is_the_gradient_outside_of_the_principal_directions(net, batches):
    """Against numpy: projections with the singular vectors that hold nine tenths of the energy."""
    scores = score_blocks(net, batches, "rgn-residual", num_batches=None)
    found = [gradients_by_hand(net, x, y) for x, y in batches]
    rests, norms, ranks = {}, {}, []
    for name, parameter in net.named_parameters():
        weight = parameter.detach().double().numpy()
        gradient = np.mean([one[name].double().numpy() for one in found], axis=0)
        if weight.ndim > 1:
            weight, gradient = (value.reshape(len(value), -1) for value in (weight, gradient))
            left, values, right = np.linalg.svd(weight, full_matrices=False)
            rank = 1
            while (values[:rank] ** 2).sum() < 0.9 * (values**2).sum():
                rank += 1
            ranks.append((rank, len(values)))
            rows = left[:, :rank] @ left[:, :rank].T
            columns = right[:rank].T @ right[:rank]
            gradient = gradient - rows @ gradient @ columns
        rests[name], norms[name] = (gradient**2).sum(), (weight**2).sum()
        if norms[name]:
            assert scores.tensor_scores[name] == pytest.approx(np.sqrt(rests[name] / norms[name]), rel=1e-3)
    assert any(rank < full for rank, full in ranks)
    head = ("fc.weight", "fc.bias")
    assert scores["head"] == pytest.approx(
        np.sqrt(sum(rests[name] for name in head) / sum(norms[name] for name in head)), rel=1e-3
    )


def outputs_by_hand(net, x):
    """What each block puts out, in the order of the blocks."""
    stem = torch.tanh(net.bn1(net.conv1(x)))
    one = net.layer1(stem)
    two = net.layer2(one)
    return {"block1": one, "block2": two, "head": net(x)}


def test_sensitivity_is_the_growth_of_a_perturbation_from_block_to_block(net, batches):
    scores = score_blocks(net, batches, "sensitivity", num_batches=None)
    net.eval()
    expected = {name: [] for name in ("block1", "block2", "head")}
    with torch.no_grad():
        for x, _ in batches:
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            noisy = x + 0.1 * x.std() * drawn
            before = float((noisy - x).norm() / x.norm())
            plain, moved = outputs_by_hand(net, x), outputs_by_hand(net, noisy)
            for name, values in expected.items():
                after = float((moved[name] - plain[name]).norm() / plain[name].norm())
                values.append(after / before)
                before = after
    assert dict(scores) == pytest.approx({name: sum(v) / len(v) for name, v in expected.items()}, rel=1e-4)
    assert scores.tensor_scores["fc.bias"] == scores["head"]
    assert (scores.num_samples, scores.num_batches, scores.uses_labels) == (18, 3, True)


def test_sensitivity_needs_no_labels(net, batches):
    bare = [{"x": x} for x, _ in batches]
    scores = score_blocks(net, bare, "sensitivity")
    assert not scores.uses_labels
    assert dict(scores) == dict(score_blocks(net, batches, "sensitivity"))
    with pytest.raises(DataError, match="gave no batch"):
        score_blocks(net, [], "sensitivity")
    config = resolve_target(SurgicalConfig(target="auto-sensitivity"), net, bare)
    assert config.target == scores.top(1)[0]
    assert config.selection["uses_labels"] is False


def test_sensitivity_refuses_what_it_cannot_perturb(net, batches):
    class Tokens(nn.Module):
        """Takes integers."""

        def __init__(self):
            super().__init__()
            self.embedding, self.fc = nn.Embedding(10, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.embedding(x).mean(1))

    blocks = {"embedding": ["embedding"], "head": ["fc"]}
    with pytest.raises(DataError, match="no input of a batch can be perturbed: sensitivity needs images as floating"):
        score_blocks(Tokens(), [(torch.arange(6).reshape(2, 3), torch.arange(2))], "sensitivity", blocks=blocks)
    with pytest.raises(DataError, match="that are not all alike"):
        score_blocks(net, [(torch.zeros(6, 3, 8, 8), batches[0][1])], "sensitivity")


def test_a_block_without_an_output_of_its_own_has_no_sensitivity(batches):
    class Shifted(ConvNet):
        """Adds a vector that belongs to no module."""

        def __init__(self):
            super().__init__(nn.BatchNorm2d)
            self.shift = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x):
            return super().forward(x + self.shift)

    names = {"shift": ["shift"], "rest": ["conv1", "bn1", "layer1", "layer2"], "head": ["fc"]}
    scores = score_blocks(Shifted(), batches, "sensitivity", blocks=names)
    assert scores["shift"] == 0.0
    assert scores["rest"] > 0


@pytest.mark.parametrize("criterion", ["snr", "fisher"])
def test_criteria_over_inputs_do_not_depend_on_the_batches(net, batches, criterion):
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    one = score_blocks(net, whole, criterion, num_batches=None)
    for other in (
        score_blocks(net, batches, criterion, num_batches=None),
        score_blocks(net, whole, criterion, num_batches=None, chunk_size=1),
        score_blocks(net, whole, criterion, num_batches=None, chunk_size=5),
    ):
        assert one.tensor_scores == pytest.approx(other.tensor_scores, rel=1e-3)


def test_no_more_inputs_than_a_chunk_are_differentiated_at_once(net, batches):
    calls = []

    def loss(logits, labels):
        calls.append(len(labels))
        return F.cross_entropy(logits, labels)

    for chunk_size, chunks in ((None, 3), (4, 6), (1, 18)):  # of three batches of six
        calls.clear()
        score_blocks(net, batches, "fisher", loss_fn=loss, chunk_size=chunk_size)
        assert calls == [1] * chunks  # torch.func calls it once for all inputs of a chunk, as if for one


@pytest.mark.parametrize("criterion", CRITERIA)
def test_two_processes_with_the_same_batches_are_one_with_each_batch_twice(net, batches, criterion, monkeypatch):
    # What every collective gives where the other process holds the same; real processes are in the slow tier.
    def twice(found, own):
        found[:] = [own, own]

    one = score_blocks(net, [*batches, *batches], criterion, num_batches=None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", twice)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: own.mul_(2))
    two = score_blocks(net, batches, criterion, num_batches=None)
    assert (two.num_samples, two.num_batches) == (one.num_samples, one.num_batches) == (36, 6)
    assert two.uses_labels
    assert two.tensor_scores == pytest.approx(one.tensor_scores, rel=1e-4)


def test_a_network_that_vmap_refuses_is_taken_one_input_at_a_time(net, batches, caplog):
    class Fussy(ConvNet):
        def forward(self, x):
            return super().forward(x if float(x.abs().sum()) > 0 else -x)

    fussy = Fussy(nn.BatchNorm2d)
    fussy.load_state_dict(net.state_dict())
    with caplog.at_level("INFO", "peft_surgical.choosing.gradients"):
        found = score_blocks(fussy, batches, "snr")
    assert "vmap" in caplog.text
    assert found.tensor_scores == pytest.approx(score_blocks(net, batches, "snr").tensor_scores, rel=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_everything_is_left_bit_identical(net, batches, criterion):
    class Counts(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(F.dropout(x, 0.5))  # random also in eval mode

    model = Counts(net).train()
    net.layer1.eval()
    net.fc.weight.requires_grad_(False)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    dataset = list(zip(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), strict=True))
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(dataset, 4, shuffle=True, generator=generator)

    def state():
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            torch.get_rng_state(),
            generator.get_state(),
            random.getstate(),
            str(np.random.get_state()),
        )

    before = state()
    blocks = {
        "block1": ["inner.conv1", "inner.bn1", "inner.layer1", "calls"],
        "block2": "inner.layer2",
        "head": "inner.fc",
    }
    score_blocks(model, loader, criterion, blocks=blocks)
    for old, new in zip(before, state(), strict=True):
        if isinstance(old, dict):
            assert old.keys() == new.keys()
            assert all(v is new[k] if v is None else torch.equal(v, new[k]) for k, v in old.items())
        else:
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_generators_that_the_data_draws_from_are_left_where_they_were(net, batches):
    own = torch.Generator().manual_seed(3)

    class Augmented(list):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image + random.random() + float(np.random.rand()) + torch.randn(()), label

    dataset = Augmented(zip(*batches[0], strict=True))
    sampler = BatchSampler(RandomSampler(dataset, generator=own), 2, drop_last=False)
    before = own.get_state(), torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for loader in (DataLoader(dataset, batch_sampler=sampler), DataLoader(dataset, 2, sampler=sampler.sampler)):
        found = [score_blocks(net, loader).tensor_scores for _ in range(2)]
        assert found[0] == found[1]  # the same images, drawn and changed in the same way
        after = own.get_state(), torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_modes_come_back_where_a_module_has_a_train_of_its_own(net, batches):
    class Kept(ConvNet):
        def train(self, mode=True):
            return super().train(False)  # as those do that keep their statistics

    kept = Kept(nn.BatchNorm2d)
    kept.load_state_dict(net.state_dict())
    assert all(module.training for module in kept.modules())  # nobody has called train() yet
    score_blocks(kept, batches)
    assert all(module.training for module in kept.modules())


def test_an_error_while_scoring_leaves_no_trace_either(net, batches):
    def broken(logits, labels):
        raise RuntimeError("a loss of one's own")

    net.train()
    net.fc.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="a loss of one's own"):
        score_blocks(net, batches, loss_fn=broken)
    assert all(module.training for module in net.modules())
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert not is_looking()


def test_scores_can_be_taken_where_gradients_are_switched_off(net, batches):
    with torch.no_grad():
        found = score_blocks(net, batches)
    assert found == score_blocks(net, batches)


def test_a_loss_of_the_networks_own_is_the_one_that_counts(net, batches):
    class WithLoss(ConvNet):
        def forward(self, pixel_values, labels=None):
            logits = super().forward(pixel_values)
            return ImageClassifierOutput(loss=3 * F.cross_entropy(logits, labels), logits=logits)

    own = WithLoss(nn.BatchNorm2d)
    own.load_state_dict(net.state_dict())
    dicts = [{"pixel_values": x, "labels": y} for x, y in batches]
    plain = score_blocks(net, batches).tensor_scores
    assert score_blocks(own, dicts).tensor_scores == pytest.approx({n: 3 * s for n, s in plain.items()}, rel=1e-5)
    given = score_blocks(own, dicts, loss_fn=lambda outputs, labels: F.cross_entropy(outputs.logits, labels))
    assert given.tensor_scores == pytest.approx(plain, rel=1e-5)


def test_every_form_of_batch_gives_the_same_scores(net, batches):
    class ByName(ConvNet):
        def forward(self, pixel_values, labels=None):
            return super().forward(pixel_values)

    named = ByName(nn.BatchNorm2d)
    named.load_state_dict(net.state_dict())
    one = score_blocks(net, batches).tensor_scores
    dicts = [{"pixel_values": x, "labels": y} for x, y in batches]
    others = [
        score_blocks(net, dicts),
        score_blocks(named, dicts),
        score_blocks(net, [{"image": x, "label": y} for x, y in batches]),
        score_blocks(net, [BatchFeature({"pixel_values": x, "labels": y}) for x, y in batches]),  # a processor's
        score_blocks(net, [[x, F.one_hot(y, 5).float()] for x, y in batches]),  # timm's loaders with mixup
        score_blocks(net, batches, loss_fn=lambda logits, labels: F.nll_loss(F.log_softmax(logits, 1), labels)),
    ]
    for other in others:
        assert one == pytest.approx(other.tensor_scores, rel=1e-5)


def test_a_transformers_model_with_its_own_loss():
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 3}
    scores = score_blocks(model, [batch])
    model.eval()
    loss = model(**batch).loss
    weight = model.classifier.weight
    assert scores.tensor_scores["classifier.weight"] == pytest.approx(
        float(torch.autograd.grad(loss, weight)[0].norm() / weight.detach().norm()), rel=1e-4
    )
    assert list(scores.block_scores) == ["embedding", "block1", "block2", "head"]
    assert score_blocks(model, [batch], "fisher", chunk_size=1).tensor_scores == pytest.approx(
        score_blocks(model, [batch], "fisher").tensor_scores, rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", ["rgn", "snr", "fisher"])
def test_mixed_precision_gives_nearly_the_same_scores(net, batches, dtype, criterion):
    plain = score_blocks(net, batches, criterion)
    mixed = score_blocks(net, batches, criterion, autocast=dtype)
    assert mixed.block_scores == pytest.approx(plain.block_scores, rel=0.15)
    assert mixed.block_scores != plain.block_scores
    half = ConvNet(nn.BatchNorm2d)
    half.load_state_dict(net.state_dict())
    inputs = [(x.to(dtype), y) for x, y in batches]
    assert score_blocks(half.to(dtype), inputs).block_scores == pytest.approx(
        score_blocks(net, batches).block_scores, rel=0.15
    )


@pytest.mark.parametrize("criterion", ["rgn", "fisher"])
def test_small_gradients_survive_half_precision(net, batches, criterion):
    def small(logits, labels):
        return 1e-5 * F.cross_entropy(logits.float(), labels)

    plain = score_blocks(net, batches, criterion, loss_fn=small)
    half = ConvNet(nn.BatchNorm2d)
    half.load_state_dict(net.state_dict())
    found = score_blocks(half.half(), [(x.half(), y) for x, y in batches], criterion, loss_fn=small)
    assert found.block_scores == pytest.approx(plain.block_scores, rel=0.05)


def test_an_adapter_is_scored_by_effective_weights_and_its_trained_tensors_only(net, batches):
    plain = score_blocks(net, batches)
    model = get_peft_model(net, SurgicalConfig(target="block1", norm_stats="frozen"))
    assert score_blocks(model, batches)["block1"] == pytest.approx(plain["block1"])
    assert list(score_blocks(model, batches).block_scores) == ["block1"]
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    moved = score_blocks(model, batches)
    merged = score_blocks(model.merge_and_unload(), batches)
    assert moved["block1"] == pytest.approx(merged["block1"], rel=1e-4)
    assert moved["block1"] != pytest.approx(plain["block1"], rel=1e-3)


def test_trained_tensors_go_by_the_names_of_the_base(net):
    names = [name for name, _ in net.named_parameters()]
    assert list(trained_tensors(net)) == names
    model = get_peft_model(net, SurgicalConfig(target="block2", modules_to_save=["fc"]))
    found = trained_tensors(model)
    assert set(found) == {n for n in names if n.startswith(("layer2.", "fc."))}
    assert [found[n].is_delta for n in ("layer2.0.weight", "fc.weight")] == [True, False]
    assert torch.equal(found["layer2.0.weight"].value, net.layer2[0].weight)
    assert all(dict(model.named_parameters())[t.path] is t.parameter for t in found.values())
    model.eval()
    model.set_requires_grad = None
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(AdapterError, match="is_trainable=True"):
        trained_tensors(model)


def test_two_active_adapters_on_one_tensor_are_refused(net):
    model = get_peft_model(net, SurgicalConfig(target="block1"))
    model.add_adapter("other", SurgicalConfig(target="block1"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedModelError, match="trained twice"):
        trained_tensors(model)


def test_scoring_a_reloaded_adapter(net, batches, tmp_path):
    get_peft_model(net, SurgicalConfig(target="head")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(ConvNet(nn.BatchNorm2d), tmp_path, is_trainable=True)
    assert list(score_blocks(model, batches).block_scores) == ["head"]


def test_resolve_target_names_blocks_and_says_why(net, batches, tmp_path):
    scores = score_blocks(net, batches)
    config = resolve_target(SurgicalConfig(target="auto-rgn"), net, batches)
    assert config.target == scores.top(1)[0]
    assert config.selection["asked"] == "auto-rgn"
    assert config.selection["block_scores"] == scores.block_scores
    pair = resolve_target(SurgicalConfig(target="auto-rgn"), net, batches, num_blocks=2)
    assert pair.target == " + ".join(scores.contiguous(2))
    model = get_peft_model(net, pair)
    model.save_pretrained(tmp_path)
    assert SurgicalConfig.from_pretrained(tmp_path).selection == pair.selection
    assert model.peft_config["default"].tensor_names


def test_resolve_target_keeps_to_a_budget(net, batches):
    asked = SurgicalConfig(target="auto-fisher")
    config = resolve_target(asked, net, batches, budget=0.6, num_batches=1)
    assert config.target == "block2 + head"
    anatomy = anatomy_of(net)
    total = sum(block.num_parameters for block in anatomy)
    assert sum(anatomy[name].num_parameters for name in config.target.split(" + ")) <= 0.6 * total
    assert config.selection["budget"] == 0.6
    assert resolve_target(asked, net, batches, budget=0.4, num_batches=1).target == "head"
    assert (asked.target, asked.selection) == ("auto-fisher", None)  # a copy was resolved


def test_resolve_target_chooses_among_the_blocks_of_the_config(net, batches):
    blocks = {"block1": ["conv1", "bn1"], "block2": ["layer1"], "block3": ["layer2"], "head": ["fc"]}
    config = resolve_target(SurgicalConfig(target="auto-rgn", blocks=blocks), net, batches)
    assert config.selection["block_scores"] == score_blocks(net, batches, blocks=blocks).block_scores
    assert config.target in blocks


def test_resolve_target_leaves_a_concrete_target_alone(net, batches):
    config = SurgicalConfig(target="block1")
    assert resolve_target(config, net, batches) is config


@pytest.mark.parametrize("target", ["race", "cross-val", "greedy", "auto"])
def test_targets_that_need_runs_are_sent_to_the_searches(net, batches, target):
    with pytest.raises(ConfigError, match=f"peft-surgical tune --target {target}"):
        resolve_target(SurgicalConfig(target=target), net, batches)
    with pytest.raises(UnresolvedTargetError, match=r"call peft_surgical\.training\.\w+\.\w+, which") as raised:
        get_peft_model(net, SurgicalConfig(target=target))
    module, name = re.search(r"call (\S+)\.(\w+),", str(raised.value)).groups()
    assert callable(getattr(importlib.import_module(module), name))


def test_an_unresolved_score_target_names_the_call(net):
    with pytest.raises(UnresolvedTargetError, match=r"resolve_target\(config, model, dataloader\)"):
        get_peft_model(net, SurgicalConfig(target="auto-rgn"))


def test_errors_name_the_way_out(net, batches):
    with pytest.raises(ConfigError, match="choose one of rgn, snr"):
        score_blocks(net, batches, "nonsense")
    with pytest.raises(ConfigError, match="num_batches=0"):
        score_blocks(net, batches, num_batches=0)
    with pytest.raises(DataError, match="gave no batch"):
        score_blocks(net, [])
    with pytest.raises(DataError, match="no labels"):
        score_blocks(net, [(batches[0][0],)])
    with pytest.raises(DataError, match="keep one tensor"):
        score_blocks(net, [{"a": batches[0][0], "b": batches[0][0], "labels": batches[0][1]}])
    with pytest.raises(DataError, match="a batch is a str"):
        forward_loss(net, "x")
    with pytest.raises(DataError, match="not finite"):
        score_blocks(net, [(batches[0][0] * float("inf"), batches[0][1])])
    with pytest.raises(ConfigError, match="at least 2 inputs"):
        score_blocks(net, [(batches[0][0][:1], batches[0][1][:1])], "snr")


def test_parameters_that_are_cut_up_are_refused_before_anything_runs(net, monkeypatch):
    # A single process has no DTensor, and only the class is checked.
    monkeypatch.setattr("peft_surgical.choosing.models.DTensor", nn.Parameter)
    with pytest.raises(UnsupportedModelError, match=r"conv1\.weight is sharded \(FSDP\): score the network before"):
        score_blocks(net, [])


def test_the_loss_of_a_batch_without_labels_is_the_users(net, batches):
    entropy = lambda logits, labels: -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()  # noqa: E731
    scores = score_blocks(net, [(x,) for x, _ in batches], loss_fn=entropy, split="test")
    assert not scores.uses_labels
    assert scores.split == "test"
    assert forward_loss(net.eval(), (batches[0][0],), entropy) > 0
