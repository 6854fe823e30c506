"""`fit` against a plain PyTorch loop bit for bit; the chosen epoch, costs, stopping and going on."""

import copy
import functools
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import ConvNet, Rows, same, snapshot, used_batchnorm
from torch import nn
from torch.func import functional_call
from transformers import TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput

from peft_surgical.choosing.models import forward_loss, trained_tensors
from peft_surgical.errors import ConfigError
from peft_surgical.training.fitting import (
    FitSettings,
    balanced,
    fit,
    forget_checkpoints,
)

pytestmark = pytest.mark.usefixtures("quick_collections", "own_accelerate_state")
fit = functools.partial(fit, cache=False)  # what is read, in which order; test_prefix.py compares with the cache

SETTINGS = FitSettings(lr=0.02, epochs=3, batch_size=4, weight_decay=0.1, use_cpu=True)
BLOCK1 = (
    *("conv1.weight", "bn1.weight", "bn1.bias"),
    *("layer1.0.weight", "layer1.0.bias", "layer1.1.weight", "layer1.1.bias"),
)


def data():
    return Rows(10, seed=1), Rows(8, seed=2)


def weights(model):
    """Base + deltas by the names of the network, as it would be saved merged."""
    merged = copy.deepcopy(model).merge_and_unload()
    return dict(merged.named_parameters())


def plain(net, names, rows, order, settings, validation, make=torch.optim.Adam, loss_of=None):
    """A loop of one's own: base + delta by functional_call, decay on the deltas, source statistics.

    Returns the accuracies on the validation images, and all weights, at the end of each epoch.
    """
    net = net.eval()
    base = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    deltas = {name: torch.zeros_like(base[name]).requires_grad_() for name in names}
    optimizer = make(deltas.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    curve, states = [], []
    for epoch in range(settings.epochs):
        drawn = order[epoch * len(rows) : (epoch + 1) * len(rows)]
        batches = [drawn[i : i + settings.batch_size] for i in range(0, len(drawn), settings.batch_size)]
        for start in range(0, len(batches), settings.accumulation):
            micro = batches[start : start + settings.accumulation]
            for batch in micro:
                tuned = {**base, **{name: base[name] + deltas[name] for name in names}}
                logits = functional_call(net, tuned, (rows.images[batch],))
                loss = (loss_of or F.cross_entropy)(logits, rows.classes[batch])
                (loss / len(micro)).backward()
            optimizer.step()
            optimizer.zero_grad()
        tuned = {**base, **{name: (base[name] + deltas[name]).detach() for name in names}}
        with torch.no_grad():
            logits = functional_call(net, tuned, (validation.images,))
        curve.append((logits.argmax(1) == validation.classes).double().mean().item())
        states.append(tuned)
    return curve, states


def assert_same_weights(found, wanted, exact=True):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if exact else torch.allclose(found[name], value, atol=1e-6), name


# --- the run ---


@pytest.mark.parametrize("method", ["block1", "full"])
def test_a_run_is_a_plain_loop_bit_for_bit_and_keeps_the_best_epoch(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuning, validation = data()
    found = fit(used_batchnorm(), method, tuning, validation, SETTINGS)
    order = list(tuning.drawn)
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    names = BLOCK1 if method == "block1" else [name for name, _ in used_batchnorm().named_parameters()]
    curve, states = plain(used_batchnorm(), names, tuning, order, SETTINGS, validation)
    assert found.curve == pytest.approx(curve)
    best = max(range(3), key=lambda epoch: (curve[epoch], -epoch))
    assert (found.best_epoch, found.validation) == (best + 1, pytest.approx(max(curve)))
    assert_same_weights(weights(found.model), states[best])
    assert len(found.losses) == 3
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_equal_epochs_is_kept():
    tuning, validation = data()
    rate = FitSettings(lr=1e-5, epochs=3, batch_size=4, weight_decay=0, use_cpu=True)  # too small to change a label
    found = fit(used_batchnorm(), "head", tuning, validation, rate)
    assert len(set(found.curve)) == 1
    assert found.best_epoch == 1
    _, states = plain(used_batchnorm(), ("fc.weight", "fc.bias"), tuning, list(tuning.drawn), rate, validation)
    assert_same_weights(weights(found.model), states[0])
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])


def test_without_decay_live_deltas_are_ordinary_fine_tuning():
    tuning, validation = data()
    settings = FitSettings(lr=0.01, epochs=1, batch_size=4, weight_decay=0, use_cpu=True)
    found = fit(used_batchnorm(), "block1", tuning, validation, settings)
    net = used_batchnorm().eval()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in BLOCK1)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for batch in (tuning.drawn[:4], tuning.drawn[4:8], tuning.drawn[8:10]):
        optimizer.zero_grad()
        F.cross_entropy(net(tuning.images[batch]), tuning.classes[batch]).backward()
        optimizer.step()
    assert_same_weights(weights(found.model), dict(net.named_parameters()), exact=False)


class Outputs(ConvNet):
    """As transformers' classifiers: named inputs, further keywords, an output with a loss of its own."""

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = super().forward(pixel_values)
        loss = None if labels is None else smoothed(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.3)


class Silent(ConvNet):
    """Returns an output without a loss."""

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=super().forward(pixel_values))


@pytest.mark.parametrize(("kind", "loss_of"), [(ConvNet, None), (Silent, None), (Outputs, smoothed)])
def test_the_models_own_loss_and_the_mean_over_accumulated_batches(kind, loss_of):
    tuning, validation = data()
    settings = FitSettings(
        lr=0.05, epochs=1, batch_size=2, optimizer="sgd", accumulation=2, weight_decay=0.1, use_cpu=True
    )
    found = fit(used_batchnorm(kind), "block1", tuning, validation, settings)
    sgd = lambda parameters, **how: torch.optim.SGD(list(parameters), momentum=0.9, **how)  # noqa: E731
    net = used_batchnorm()
    _, states = plain(net, BLOCK1, tuning, list(tuning.drawn), settings, validation, sgd, loss_of)
    assert_same_weights(weights(found.model), states[0], exact=False)
    assert found.cost == pytest.approx(3 * 2 + 8 / 2 / 3)  # 5 batches in 3 steps; validation images as forwards


def test_the_models_own_loss_is_found_below_the_wrapper_of_several_processes():
    tuning, _ = data()
    net = used_batchnorm(Outputs).eval()
    batch = {"pixel_values": tuning.images, "labels": tuning.classes}
    wanted = smoothed(net(tuning.images).logits, tuning.classes)
    assert torch.equal(forward_loss(nn.DataParallel(net), batch), wanted)  # as with DDP, forward takes anything
    assert not torch.equal(F.cross_entropy(net(tuning.images).logits, tuning.classes), wanted)


class Seen(TrainerCallback):
    """Keeps the arguments, the optimizer, the norm of each step's gradient and the rate after it."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.args, self.optimizer = args, kwargs["optimizer"].optimizer
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        self.norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    def on_step_end(self, args, state, control, **kwargs):
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


def test_clipping_and_the_schedule_of_the_rate_are_as_the_settings_say():
    plain, clipped = Seen(), Seen()
    fit(used_batchnorm(), "block1", *data(), SETTINGS, callbacks=[plain])
    assert min(plain.norms) > 0.02
    assert plain.rates == [0.02] * 9
    how = {"max_grad_norm": 0.01, "lr_scheduler": "linear"}
    fit(used_batchnorm(), "block1", *data(), replace(SETTINGS, **how), callbacks=[clipped])
    assert clipped.norms == pytest.approx([0.01] * 9, rel=1e-3)
    assert clipped.rates == pytest.approx([0.02 * (1 - step / 9) for step in range(1, 10)])


@pytest.mark.parametrize(("method", "kind"), [("freeze-embed", torch.optim.SGD), ("block1", torch.optim.AdamW)])
def test_a_method_may_bring_its_optimizer(method, kind):
    seen = Seen()
    fit(used_batchnorm(), method, *data(), replace(SETTINGS, epochs=1, optimizer="adamw"), callbacks=[seen])
    assert type(seen.optimizer) is kind
    groups = [group for group in seen.optimizer.param_groups if group["params"]]
    assert {group["weight_decay"] for group in groups} == {0.1}  # also of biases and norms
    assert {group.get("momentum", 0.9) for group in groups} == {0.9}


def test_precision_and_norm_policy_are_as_asked_for():
    seen = Seen()
    how = {"config": {"norm_stats": "target"}, "callbacks": [seen]}
    found = fit(used_batchnorm(), "block1", *data(), replace(SETTINGS, epochs=1, precision="bf16"), **how)
    assert (seen.args.bf16, seen.args.fp16) == (True, False)
    assert found.model.peft_config["default"].norm_stats == "target"
    moved = dict(found.model.merge_and_unload().named_buffers())
    assert not torch.equal(moved["bn1.running_mean"], dict(used_batchnorm().named_buffers())["bn1.running_mean"])


def test_the_seed_draws_the_order_of_the_images():
    orders = []
    for seed in (0, 1, 0):
        tuning, validation = data()
        fit(used_batchnorm(), "head", tuning, validation, replace(SETTINGS, epochs=2, seed=seed))
        orders.append(tuple(tuning.drawn))
    assert orders[0] == orders[2] != orders[1]


def test_the_reference_codes_method_forgets_the_moments_at_every_epoch():
    for method, steps in (("auto-rgn-reference", 3), ("auto-rgn-reset", 3), ("auto-rgn", 6)):
        seen = Seen()
        fit(used_batchnorm(), method, *data(), replace(SETTINGS, epochs=2), callbacks=[seen])
        assert max(int(state["step"]) for state in seen.optimizer.state.values()) == steps


def test_the_validation_accuracy_is_that_of_the_best_epoch():
    found = fit(used_batchnorm(), "head", *data(), replace(SETTINGS, epochs=1))
    assert replace(found, curve=(0.5, 0.75, 0.25)).validation == 0.75


def test_options_reach_the_penalty_and_the_schedule():
    def tuned(method, **options):
        return weights(fit(used_batchnorm(), method, *data(), replace(SETTINGS, epochs=2), options=options).model)

    full, trunk = tuned("full"), dict(used_batchnorm().named_parameters())
    assert_same_weights(tuned("l2-sp", strength=0.0), full)
    held = tuned("l2-sp", strength=100.0)
    assert not torch.equal(held["fc.weight"], full["fc.weight"])
    late = tuned("lp-ft", share=0.99)  # the head alone, but for no step at all
    assert {name for name in late if not torch.equal(late[name], trunk[name])} == {"fc.weight", "fc.bias"}


def test_dfr_trains_the_head_on_equally_many_of_every_class():
    tuning, validation = data()
    tuning.classes = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    found = fit(used_batchnorm(), "dfr", tuning, validation, FitSettings(lr=0.1, epochs=1, batch_size=2, use_cpu=True))
    assert set(trained_tensors(found.model)) == {"fc.weight", "fc.bias"}
    drawn = tuning.drawn[10:]  # after the labels were read
    assert sorted(tuning.classes[drawn].tolist()) == [0, 0, 1, 1, 2, 2]
    assert found.cost == pytest.approx(3 + 8 / 2 / 3)
    before = dict(used_batchnorm().named_parameters())
    moved = {name for name, value in weights(found.model).items() if not torch.equal(value, before[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_costs_count_steps_scores_and_validation():
    tuning, validation = data()
    found = fit(
        used_batchnorm(), "auto-rgn", tuning, validation, FitSettings(lr=0.01, epochs=2, batch_size=4, use_cpu=True)
    )
    # Twice 3 steps of up to 4 images, twice the same 3 batches scored (5 are asked for), twice 8 images validated.
    assert found.cost == pytest.approx(2 * 3 + 2 * 3 + 2 * 8 / 4 / 3)
    assert sorted(found.record) == [0, 1]
    assert max(found.record[0].values()) == 1


# --- stopping and going on ---


def of(found):
    return found.curve, found.losses, found.best_epoch, found.cost, found.record


class Kill(TrainerCallback):
    """Dies in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["block1", "auto-rgn", "gradual-last-first"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(method, tmp_path):
    tuning, validation = data()
    whole = fit(used_batchnorm(), method, tuning, validation, SETTINGS)
    part = fit(used_batchnorm(), method, tuning, validation, SETTINGS, folder=tmp_path, stop_epoch=2)
    assert part.curve == whole.curve[:2]
    assert part.cost < whole.cost
    tuning.drawn.clear()
    rest = fit(used_batchnorm(), method, tuning, validation, SETTINGS, folder=tmp_path)
    assert of(rest) == of(whole)
    assert same(snapshot(rest.model), snapshot(whole.model))
    if method == "block1":  # no images drawn for scores: those of the last epoch alone
        assert len(tuning.drawn) == 10
    forget_checkpoints(tmp_path)
    assert not tmp_path.exists()


def test_a_stopped_run_trains_no_epoch_twice(tmp_path):
    # The best epoch is the first: the checkpoint to go on from is another.
    tuning, validation = data()
    rate = FitSettings(lr=1e-5, epochs=3, batch_size=4, use_cpu=True)
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    for stop in (1, 2, None):
        found = fit(
            used_batchnorm(), "head", tuning, validation, rate, folder=tmp_path, stop_epoch=stop, callbacks=[Count()]
        )
    assert found.best_epoch == 1
    assert steps == list(range(1, 10))


@pytest.mark.parametrize("stop", [1, None])
def test_asking_again_for_what_is_finished_trains_nothing(stop, tmp_path):
    tuning, validation = data()
    settings = FitSettings(lr=0.02, epochs=2, batch_size=4, use_cpu=True)
    first = fit(used_batchnorm(), "auto-rgn", tuning, validation, settings, folder=tmp_path, stop_epoch=stop)
    tuning.drawn.clear()
    again = fit(used_batchnorm(), "auto-rgn", tuning, validation, settings, folder=tmp_path, stop_epoch=stop)
    assert tuning.drawn == []
    assert of(again) == of(first)
    assert same(snapshot(again.model), snapshot(first.model))


def test_a_run_that_was_killed_within_an_epoch_goes_on_from_the_one_before(tmp_path):
    tuning, validation = data()
    settings = FitSettings(lr=0.02, epochs=2, batch_size=4, use_cpu=True, lr_scheduler="cosine")
    whole = fit(used_batchnorm(), "auto-snr", tuning, validation, settings)
    with pytest.raises(KeyboardInterrupt):
        fit(used_batchnorm(), "auto-snr", tuning, validation, settings, folder=tmp_path, callbacks=[Kill(5)])
    found = fit(used_batchnorm(), "auto-snr", tuning, validation, settings, folder=tmp_path)
    assert of(found) == of(whole)
    assert same(snapshot(found.model), snapshot(whole.model))


def test_a_checkpoint_that_was_torn_is_passed_over(tmp_path):
    tuning, validation = data()
    whole = fit(used_batchnorm(), "block1", tuning, validation, SETTINGS, folder=tmp_path, stop_epoch=2)
    steps = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert steps == ["checkpoint-3", "checkpoint-6"]
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:40])
    tuning.drawn.clear()
    found = fit(used_batchnorm(), "block1", tuning, validation, SETTINGS, folder=tmp_path, stop_epoch=2)
    assert len(tuning.drawn) == 10
    assert of(found) == of(whole)
    assert same(snapshot(found.model), snapshot(whole.model))


@pytest.mark.parametrize("method", ["block1", "auto-rgn"])
def test_a_rung_that_a_run_is_past_is_read_and_not_trained(method, tmp_path):
    tuning, validation = data()
    fresh = [
        fit(used_batchnorm(), method, tuning, validation, SETTINGS, folder=tmp_path / str(stop), stop_epoch=stop)
        for stop in (1, 2)
    ]
    whole = fit(used_batchnorm(), method, tuning, validation, SETTINGS, folder=tmp_path / "run")
    tuning.drawn.clear()
    for stop, alone in zip((1, 2), fresh, strict=True):
        found = fit(used_batchnorm(), method, tuning, validation, SETTINGS, folder=tmp_path / "run", stop_epoch=stop)
        assert of(found) == of(alone)
        assert found.model is None  # only the best and the last checkpoint of the run are kept
    assert tuning.drawn == []
    again = fit(used_batchnorm(), method, tuning, validation, SETTINGS, folder=tmp_path / "run")
    assert of(again) == of(whole)
    assert same(snapshot(again.model), snapshot(whole.model))


def test_lp_ft_leaves_the_trunk_alone_for_half_of_the_run(tmp_path):
    tuning, validation = data()
    settings = FitSettings(lr=0.05, epochs=2, batch_size=4, weight_decay=0.1, use_cpu=True)
    before = dict(used_batchnorm().named_parameters())
    half = fit(used_batchnorm(), "lp-ft", tuning, validation, settings, folder=tmp_path, stop_epoch=1)
    order = list(tuning.drawn)
    _, states = plain(used_batchnorm(), ("fc.weight", "fc.bias"), tuning, order + order, settings, validation)
    assert_same_weights(weights(half.model), states[0])  # bit for bit a linear probe
    assert not torch.equal(states[0]["fc.weight"], before["fc.weight"])
    fit(used_batchnorm(), "lp-ft", tuning, validation, settings, folder=tmp_path)
    deltas = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert len(deltas) == len(before)
    assert all(value.any() for value in deltas.values())  # and then everything is tuned


# --- balanced ---


def test_balanced_takes_as_many_of_every_class_as_the_rarest_has():
    rows = Rows(10, seed=1)
    rows.classes = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
    chosen = {seed: balanced(rows, seed).indices for seed in range(6)}
    for indices in chosen.values():
        assert indices == sorted(indices)
        assert rows.classes[indices].tolist() == [0, 0, 1, 1, 2, 2]
    assert balanced(rows, 0).indices == chosen[0]
    assert len({tuple(indices) for indices in chosen.values()}) > 1
    rows.labels = rows.classes.tolist()
    rows.drawn.clear()
    assert balanced(rows, 3).indices == chosen[3]
    assert rows.drawn == []  # known labels are not read from the rows


# --- errors ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "lamb"}, r"optimizer='lamb': choose one of adam, adamw, sgd"),
        ({"precision": "int8"}, r"precision='int8': choose bf16 or fp16, or leave it out for float32"),
        ({"lr": 0.0}, r"lr=0.0, epochs=15, batch_size=64, accumulation=1: all must be positive"),
        ({"lr": float("nan")}, r"lr=nan, .*all must be positive"),
        ({"epochs": 0}, r"epochs=0, .*all must be positive"),
        ({"batch_size": -1}, r"batch_size=-1, .*all must be positive"),
        ({"accumulation": 0}, r"accumulation=0.*must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        FitSettings(**{"lr": 0.1, **given})


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        ("block1", {"stop_epoch": 1}, "stop_epoch needs a folder"),
        ("block1", {"options": {"strength": 1}}, "block1 has no option 'strength'; it has none"),
        ("auto-snr", {"options": {"treshold": 1}}, "auto-snr has no option 'treshold'; it has threshold"),
        ("auto-snr", {"options": {"threshold": 2}}, "threshold=2: SNRs are compared"),
        ("lp-ft", {"options": {"share": 1}}, "share=1: the head trains alone"),
        ("race", {}, "'race' is a search over methods, not one"),
        ("block 1", {}, "'block 1' is no method .* and no target"),
    ],
)
def test_what_cannot_be_fitted_is_refused(method, how, message):
    tuning, validation = data()
    with pytest.raises(ConfigError, match=message):
        fit(used_batchnorm(), method, tuning, validation, SETTINGS, **how)


def test_an_epoch_that_diverged_counts_as_wrong():
    class Diverge(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            if state.epoch > 1:
                kwargs["model"].get_base_model().fc.bias.data[0] = float("nan")  # the largest, also at its label

    tuning, validation = data()
    validation.classes[:] = 0
    found = fit(used_batchnorm(), "block1", tuning, validation, SETTINGS, callbacks=[Diverge()])
    assert found.curve[1:] == (0.0, 0.0)
    assert found.losses[0] < found.losses[1] == found.losses[2] == sys.float_info.max
    assert found.best_epoch == 1
