"""MEMO and TENT: their losses against ten-line references, their loops against plain ones, and what must not move."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import CASES, disturb, same, snapshot, vit
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.adaptation import CollapseWarning
from peft_surgical.adaptation.objectives import Memo, Tent, log_marginal, marginal_entropy, mean_entropy, norm_target
from peft_surgical.adaptation.streams import moving_deltas
from peft_surgical.adaptation.views import AugMix, generator_at
from peft_surgical.errors import AdapterError, ConfigError, DataError, TargetError

pytest.importorskip("torchvision")
STREAM = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def normalise(images):
    return (images - 0.5) / 0.5


def adapted(target="stem", case="conv+GN", **config):
    model = get_peft_model(CASES[case].network(), SurgicalConfig(target=target, **config))
    disturb(model)
    return model


def memo_of(model, **settings):
    return Memo(model, **{"views": 4, "lr": 0.05, "preprocess": normalise, **settings})


def deltas(model):
    return {name: value for name, value in snapshot(model).items() if ".surgical_delta." in f".{name}"}


def others(model):
    return {name: value for name, value in snapshot(model).items() if ".surgical_delta." not in f".{name}"}


# --- losses ---


def reference_marginal_entropy(logits):
    """Zhang et al. 2022, eq. 2-3, as they stand."""
    mean = torch.zeros(logits.shape[1], dtype=logits.dtype)
    for row in logits:
        mean = mean + row.exp() / row.exp().sum() / len(logits)
    return sum(-p * p.log() for p in mean)


def test_marginal_entropy_and_its_gradient():
    ours = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss, expected = marginal_entropy(ours), reference_marginal_entropy(theirs)
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
    assert torch.allclose(log_marginal(ours).exp(), ours.softmax(1).mean(0))
    assert torch.autograd.gradcheck(marginal_entropy, ours)


def test_marginal_entropy_of_confident_views():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)  # both sure, of different classes
    loss = marginal_entropy(logits)
    loss.backward()
    assert loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert logits.grad.isfinite().all()
    assert marginal_entropy(torch.tensor([[1e4, 0.0], [1e4, 0.0]])).item() == 0.0


def test_mean_entropy():
    logits = torch.randn(6, 5, requires_grad=True)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert torch.allclose(mean_entropy(logits), expected)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (mean_entropy(logits), expected))
    assert torch.allclose(ours, theirs, atol=1e-6)


# --- MEMO: the loop ---


@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 2), ("adam", 1), ("adamw", 2)])
def test_memo_is_a_plain_loop_on_the_weights(optimizer, steps, episodic):
    model = adapted("conv1").double()
    plain = copy.deepcopy(model).merge_and_unload()
    memo = memo_of(model, optimizer=optimizer, steps=steps, episodic=episodic)
    found = memo(STREAM.double())

    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]

    def fresh():
        # Decay would act on the delta in the one and on the weight in the other.
        return make([plain.conv1.weight], lr=0.05, **({"weight_decay": 0.0} if optimizer == "adamw" else {}))

    plain.requires_grad_(True)
    start, updates = copy.deepcopy(plain.state_dict()), fresh()
    for position, image in enumerate(STREAM.double()):
        generator = generator_at(0, position)
        for _ in range(steps):
            updates.zero_grad()
            views = AugMix(4)(image, generator)
            reference_marginal_entropy(plain(normalise(views))).backward()
            updates.step()
        with torch.no_grad():
            assert torch.allclose(found[position], plain(normalise(image[None]))[0], atol=1e-9)
        if episodic:
            plain.load_state_dict(start)
            updates = fresh()
    assert (memo.record.images, memo.record.steps, memo.record.skipped) == (5, 5 * steps, 0)


@pytest.mark.parametrize("target", ["stem", "block1", "head", "all"])
@pytest.mark.parametrize("case", ["conv+BN", "conv+GN"])
def test_online_memo_moves_every_delta_and_nothing_else(case, target):
    model = adapted(target, case).train()
    before, rest = deltas(model), others(model)
    memo_of(model)(STREAM)
    after = deltas(model)
    assert same(rest, others(model))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(vars(module)["training"] for module in model.modules())


@pytest.mark.parametrize("policy", ["frozen", "target", "all"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_episodic_memo_leaves_the_model_as_found_and_images_apart(policy, optimizer):
    model = adapted("stem", "conv+BN", norm_stats=policy).train()
    before = snapshot(model)
    memo = memo_of(model, episodic=True, optimizer=optimizer)
    found = memo(STREAM)
    assert same(before, snapshot(model))
    for position in (0, 3):
        alone = memo_of(model, episodic=True, optimizer=optimizer)
        alone.position = position
        assert torch.equal(alone(STREAM[position : position + 1])[0], found[position])
    with torch.no_grad():
        assert not torch.equal(found, model.eval()(normalise(STREAM)))


def test_episodic_memo_restores_the_deltas_when_an_image_fails():
    model = adapted()
    before, calls = snapshot(model), []

    def views(image, generator):
        calls.append(image)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return AugMix(2)(image, generator)

    with pytest.raises(RuntimeError, match="out of memory"):
        memo_of(model, views=views, steps=2, episodic=True)(STREAM)
    assert same(before, snapshot(model))


def test_the_same_seed_gives_the_same_stream_however_it_is_cut():
    whole = memo_of(adapted(), optimizer="adam")(STREAM)
    memo = memo_of(adapted(), optimizer="adam")
    assert torch.equal(whole, torch.cat([memo(STREAM[:2]), memo(STREAM[2:])]))
    assert not torch.equal(whole, memo_of(adapted(), optimizer="adam", seed=1)(STREAM))
    assert memo(STREAM[:0]).shape[0] == 0


def test_a_stream_goes_on_in_another_process_as_if_nothing_had_happened():
    first = memo_of(adapted(), optimizer="adam")
    whole = first(STREAM)
    first.reset()
    first(STREAM[:2])
    state = copy.deepcopy(first.state_dict())
    first(STREAM)  # what is in the state are copies
    second = memo_of(adapted(), optimizer="adam")
    second.load_state_dict(state)
    assert torch.equal(second(STREAM[2:]), whole[2:])
    assert second.record.images == 5
    second.reset()
    assert torch.equal(second(STREAM), whole)
    with pytest.raises(DataError, match="other tensors"):
        memo_of(adapted("head")).load_state_dict(state)


def test_reset_restores_deltas_that_were_not_zero_and_the_optimizer():
    model = adapted("block1")
    before, memo = snapshot(model), memo_of(model, optimizer="adam")
    first = memo(STREAM)
    memo.reset()
    assert same(before, snapshot(model))
    assert memo.record.images == memo.position == 0
    assert torch.equal(first, memo(STREAM))  # with Adam's moments of before it would not


def test_what_was_learnt_online_is_an_ordinary_adapter(tmp_path):
    model = adapted("stem", "conv+BN")
    memo_of(model)(STREAM)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(CASES["conv+BN"].network(), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(STREAM), again(STREAM))
        assert not torch.equal(again(STREAM), CASES["conv+BN"].network()(STREAM))


def test_all_views_are_one_forward_and_frozen_parts_record_no_graph():
    model = adapted("layer2")
    seen = []
    model.base_model.model.layer1.register_forward_hook(
        lambda module, args, out: seen.append((len(out), out.requires_grad))
    )
    model.base_model.model.fc.register_forward_hook(
        lambda module, args, out: seen.append((len(out), out.requires_grad))
    )
    memo_of(model, steps=2)(STREAM[:1])
    assert seen == [(4, False), (4, True)] * 2 + [(1, False), (1, False)]


def test_any_callable_makes_views_and_any_network_is_adapted():
    model = get_peft_model(vit().eval(), SurgicalConfig(target="embedding"))  # returns an object with .logits
    memo = Memo(model, views=lambda image, generator: torch.stack([image, image.flip(-1)]), lr=0.1)
    before = deltas(model)
    assert memo(STREAM).shape == (5, 5)
    assert not same(before, deltas(model))


def test_a_head_of_ones_own_is_not_adapted():
    config = SurgicalConfig(target="stem", modules_to_save=["fc"])
    model = get_peft_model(CASES["conv+GN"].network(), config)
    rest = others(model)
    memo_of(model)(STREAM)
    assert same(rest, others(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_prior_for_batchnorms_changes_predictions_and_no_statistics():
    frozen, mixed = (memo_of(adapted("stem", "conv+BN"), prior_strength=n) for n in (None, 16))
    rest = others(mixed.model)
    assert not torch.equal(frozen(STREAM), mixed(STREAM))
    assert same(rest, others(mixed.model))


# --- safety ---


def test_nan_never_gets_into_the_weights():
    model = adapted("stem")
    memo, broken = memo_of(model, optimizer="adam"), STREAM.clone()
    broken[1, 0, 0, 0] = float("nan")
    found = memo(broken)
    assert (memo.record.steps, memo.record.skipped) == (4, 1)
    assert found[[0, 2, 3, 4]].isfinite().all()
    assert all(value.isfinite().all() for value in snapshot(model).values())


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e30])
def test_a_gradient_or_step_that_is_not_finite_is_not_taken(size):
    model = adapted("stem")
    memo = memo_of(model, lr=1e20, weight_decay=1e-4)
    (name, delta), before = next(iter(moving_deltas(model).items())), snapshot(model)
    assert name == "base_model.model.conv1.weight (default)"
    delta.register_hook(lambda gradient: torch.full_like(gradient, size))
    memo(STREAM)
    assert same(before, snapshot(model))
    assert (memo.record.steps, memo.record.skipped) == (0, 5)
    assert delta.grad is None


class Constant(nn.Module):
    """Says class 2 of everything, whatever its stem is."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 1)
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(self.conv1(x).mean((2, 3))) * 1e-3 + torch.eye(5)[2]


def constant():
    torch.manual_seed(0)
    blocks = {"block1": ["conv1"], "head": ["fc"]}
    return get_peft_model(Constant(), SurgicalConfig(target="block1", blocks=blocks))


@pytest.mark.parametrize("method", ["memo", "tent"])
def test_a_collapse_is_said_once_and_recorded(method):
    model = constant()
    settings = {"lr": 0.1, "collapse_window": 3}
    adapt = memo_of(model, **settings) if method == "memo" else Tent(model, **settings)
    with pytest.warns(CollapseWarning, match="the last 3 predictions up to image .* are all class 2: lower") as caught:
        adapt(STREAM)
    assert [warning.filename for warning in caught] == [__file__]  # where the stream was passed
    assert adapt.record.collapses == ((2,) if method == "memo" else (4,))
    adapt(STREAM)  # still the same collapse
    adapt.reset()
    with pytest.warns(CollapseWarning, match="class 2"):
        adapt(STREAM)


def test_a_collapse_can_reset():
    model = constant()
    before, memo = snapshot(model), memo_of(model, collapse_window=5, reset_on_collapse=True)
    with pytest.warns(CollapseWarning, match="back to the start"):
        memo(STREAM)
    assert same(before, snapshot(model))
    assert memo.position == 5  # the stream goes on: its next views are new ones
    memo(STREAM[:1])
    assert not same(before, snapshot(model))


def test_no_collapse_where_predictions_differ_or_nobody_looks():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        memo_of(constant(), collapse_window=0)(STREAM)
        memo_of(constant(), collapse_window=6)(STREAM)


# --- TENT ---


def test_tent_is_a_plain_loop_in_training_mode():
    network = CASES["conv+BN"].network().double()
    model = get_peft_model(copy.deepcopy(network), SurgicalConfig(target=norm_target(network)))
    rest, batches = others(model), [STREAM.double(), STREAM.double().flip(-1), STREAM.double() ** 2]
    tent = Tent(model, lr=0.05, preprocess=normalise)
    found = [tent(batch) for batch in batches]

    network.train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    updates = torch.optim.Adam([p for norm in norms for p in norm.parameters()], lr=0.05)
    for batch, ours in zip(batches, found, strict=True):
        logits = network(normalise(batch))
        assert torch.allclose(ours, logits, atol=1e-9)
        updates.zero_grad()
        torch.distributions.Categorical(logits=logits).entropy().mean().backward()
        updates.step()
    assert same(rest, others(model))
    assert not any(logits.requires_grad for logits in found)
    assert tent.record.images == 15


def test_tent_moves_statistics_that_the_adapter_owns_and_they_are_saved(tmp_path):
    model = adapted("stem", "conv+BN", norm_stats="all")
    before = snapshot(model)
    tent = Tent(model, lr=0.01)
    tent(STREAM)
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert any("surgical_stats" in name for name in moved)
    assert all("surgical_" in name for name in moved)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(CASES["conv+BN"].network(), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(STREAM), again(STREAM))
    tent.reset()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("policy", ["frozen", "all"])
def test_episodic_tent_leaves_the_model_as_found(policy):
    model = adapted("*bn*", "conv+BN", norm_stats=policy)
    before, tent = snapshot(model), Tent(model, lr=0.05, steps=2, episodic=True)
    first = tent(STREAM)
    assert same(before, snapshot(model))
    assert torch.equal(first, tent(STREAM))
    assert tent.record.steps == 4
    assert len(tent(STREAM[:0])) == 0
    with pytest.raises(AdapterError, match="no gradient"), torch.inference_mode():
        tent(STREAM)
    assert same(before, snapshot(model))


def test_tent_goes_on_from_a_state():
    whole, cut = (Tent(adapted("*bn*", "conv+BN"), lr=0.05) for _ in range(2))
    whole(STREAM)
    cut.load_state_dict(whole.state_dict())
    assert torch.equal(whole(STREAM), cut(STREAM))


def test_norm_target_is_what_the_globs_say():
    resnet = CASES["conv+BN"].network()
    by_name = SurgicalConfig(target=norm_target(resnet))
    norms = ("bn1", "layer1.1", "layer2.1")
    assert norm_target(resnet) == [f"{norm}.{name}" for norm in norms for name in ("weight", "bias")]
    assert len(deltas(get_peft_model(resnet, by_name))) == 6
    timm = pytest.importorskip("timm")
    for name, glob in (("test_resnet", "*bn* + *downsample.2* + conv1.1 + conv1.4"), ("test_vit", "*norm*")):
        names = norm_target(timm.create_model(name))
        model = get_peft_model(timm.create_model(name), SurgicalConfig(target=glob))
        assert set(names) == set(model.peft_config["default"].tensor_names)
    with pytest.raises(TargetError, match="TENT needs another target"):
        norm_target(nn.Linear(2, 2))


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer='lion': choose one of sgd, adam, adamw"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"steps": 0}, "steps=0"),
        ({"views": 0}, "views=0"),
        ({"seed": -1}, "seed=-1"),
        ({"collapse_window": 1}, "collapse_window=1"),
        ({"prior_strength": -2.0}, "prior_strength=-2.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        memo_of(adapted(), **settings)


def test_a_model_of_which_nothing_can_move_is_refused(tmp_path):
    network = CASES["conv+GN"].network()
    with pytest.raises(AdapterError, match=r"it has no adapter\. Make one with get_peft_model"):
        memo_of(network)
    model = adapted()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="adapter is merged"):
        memo_of(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(AdapterError, match="adapter is disabled"):
        memo_of(model)
    memo_of(model)
    loaded = PeftModel.from_pretrained(network, tmp_path)
    with pytest.raises(AdapterError, match=r"its adapters are frozen\..*is_trainable=True"):
        memo_of(loaded)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (STREAM[0], "must be floats"),
        ((STREAM * 255).byte(), "divide bytes by 255"),
        ([STREAM], "got list"),
        (STREAM * 255, "not in \\[0, 1\\]: pass them before they are normalised"),
        (normalise(STREAM), "not in \\[0, 1\\]"),
    ],
)
def test_images_of_another_form_are_refused(images, message):
    model = adapted()
    before = snapshot(model)
    for method in (memo_of(model), Tent(model, lr=0.1)):
        with pytest.raises(DataError, match=message):
            method(images)
    assert same(before, snapshot(model))
