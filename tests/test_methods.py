"""Every row of the table trains one step: what should move does, and nothing else. Schedules are worked by hand."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import ConvNet
from torch import nn

from peft_surgical import BlockScores, Pace, SurgicalConfig, anatomy_of
from peft_surgical.choosing.methods import (
    METHODS,
    AutoRGN,
    AutoSNR,
    Progress,
    alternating,
    gradual_unfreezing,
    lp_ft,
    method_of,
    normalised,
)
from peft_surgical.choosing.models import trained_tensors
from peft_surgical.choosing.pace import block_means
from peft_surgical.choosing.penalties import SelectiveDecay
from peft_surgical.errors import AdapterError, ConfigError
from peft_surgical.training.fitting import OPTIMIZERS

LABELS = torch.tensor([0, 1, 2, 4])
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return ConvNet(nn.BatchNorm2d).eval()


NAMES = {name for name, _ in network().named_parameters()}
STEM = {"conv1.weight", "bn1.weight", "bn1.bias"}
HEAD = {"fc.weight", "fc.bias"}
BLOCK1 = STEM | {name for name in NAMES if name.startswith("layer1")}
NORMS = {f"{path}.{kind}" for path in ("bn1", "layer1.1", "layer2.1") for kind in ("weight", "bias")}


def gradients(images, labels):
    net = network()
    F.cross_entropy(net(images), labels).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def above(scores, threshold):
    return {name for name, score in scores.items() if score / max(scores.values()) >= threshold}


def by_snr():
    """Paper, eq. 4, by one backward pass for each image."""
    each = [gradients(IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    stacked = {name: torch.stack([one[name] for one in each]).double() for name in NAMES}
    return above({name: (g.mean(0) ** 2 / g.var(0)).nanmean().item() for name, g in stacked.items()}, 0.3)


def by_reference_snr():
    """The reference code's, of a batch of all: per entry g^2 over the variance along the first axis, compared as is."""
    found = {}
    for name, g in gradients(IMAGES, LABELS).items():
        if "bn" not in name:
            variance = g.double().numpy().var(axis=0, ddof=1, keepdims=True)
            found[name] = float((g.double().numpy() ** 2 / (variance + 1e-8)).mean())
    return {name for name, score in found.items() if score >= 0.95}


MOVED = {
    "full": NAMES,
    "linear-probe": HEAD,
    "gradual-first-last": BLOCK1,
    "gradual-last-first": HEAD,
    "l1-sp": NAMES,
    "l2-sp": NAMES,
    "spd": NAMES,
    "lp-ft": HEAD,
    "alternating": NAMES - HEAD,
    "auto-rgn": NAMES,
    "auto-rgn-reset": NAMES,
    "auto-rgn-reference": {name for name in NAMES if "bn" not in name},
    "auto-snr": by_snr(),
    "auto-snr-reference": by_reference_snr(),
    "freeze-embed": NAMES - STEM,
    "dfr": HEAD,
    "logistic-head": HEAD,
    "dp-head": HEAD,
}


def test_the_table_of_this_test_is_complete():
    assert set(MOVED) == set(METHODS)
    assert all(name == row.name for name, row in METHODS.items())
    for name in ("auto-snr", "auto-snr-reference"):
        assert 0 < len(MOVED[name]) < len(NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_moves_what_it_should_and_nothing_else(name):
    row = METHODS[name]
    options = row.settings()
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = get_peft_model(net, SurgicalConfig(target=row.target))
    parameters = [p for p in model.parameters() if p.requires_grad]
    make, how = OPTIMIZERS[row.optimizer or "adam"]
    optimizer = make(parameters, lr=0.1, weight_decay=1e-2, **how)
    pace = Pace(
        model,
        optimizer,
        row.schedule(anatomy_of(network()), options) if row.schedule else None,
        row.penalty(options) if row.penalty else None,
        total_steps=4,
        reset_moments=row.reset_moments,
    )
    pace.start_epoch(0, [(IMAGES, LABELS)])
    model.train()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    after = model.merge_and_unload().state_dict()
    assert {key for key, value in before.items() if not torch.equal(after[key], value)} == MOVED[name]
    assert len(pace.record) == int(name.startswith("auto-"))


@pytest.mark.parametrize(("name", "shift"), [("l1-sp", lambda d: 0.5 * d.sign()), ("l2-sp", lambda d: 0.5 * d)])
def test_penalties_pull_towards_the_pretrained_weights_with_the_given_strength(name, shift):
    row = METHODS[name]
    model = get_peft_model(network(), SurgicalConfig(target=row.target))
    tensors = trained_tensors(model)
    for i, tensor in enumerate(tensors.values()):
        tensor.parameter.data += (-1) ** i * 0.25
    optimizer = torch.optim.SGD([tensor.parameter for tensor in tensors.values()], lr=1.0)
    Pace(model, optimizer, penalty=row.penalty(row.settings({"strength": 0.5})), total_steps=1)
    before = {key: tensor.parameter.detach().clone() for key, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.parameter.grad = torch.zeros_like(tensor.parameter)
    optimizer.step()
    for key, tensor in tensors.items():
        assert torch.allclose(tensor.parameter, before[key] - shift(before[key]))


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_selective_decay_is_the_published_algorithm(strength):
    """Against the update written out on the weights, with a copy of the pretrained ones (Tian et al. 2024)."""
    plain, start = network(), network().state_dict()
    adam = torch.optim.Adam(plain.parameters(), lr=0.03)
    model = get_peft_model(network(), SurgicalConfig(target="all"))
    row = METHODS["spd"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    Pace(model, optimizer, penalty=row.penalty(row.settings({"strength": strength})), total_steps=12)
    pulled = 0
    for _ in range(12):
        for net, one in ((plain, adam), (model, optimizer)):
            one.zero_grad()
            F.cross_entropy(net(IMAGES), LABELS).backward()
        old = {name: value.detach().clone() for name, value in plain.named_parameters()}
        adam.step()
        optimizer.step()
        for name, value in plain.named_parameters():
            progress = old[name] - start[name]
            condition = -(value.grad * progress).sum()
            now, before = (value.data - start[name]).norm(), progress.norm()
            ratio = max(0.0, float((now - before) / now))
            if condition < 0 and ratio > 0:
                value.data -= min(1.0, strength * ratio) * (value.data - start[name])
                pulled += 1
    assert pulled > 5
    for name, tensor in trained_tensors(model).items():
        torch.testing.assert_close(tensor.value, dict(plain.named_parameters())[name].data, rtol=1e-4, atol=1e-5)


def test_selective_decay_needs_a_pretrained_value():
    model = get_peft_model(network(), SurgicalConfig(target="block2", modules_to_save=["fc"]))
    tensors = {name: one for name, one in trained_tensors(model).items() if not one.is_delta}
    assert tensors
    with pytest.raises(AdapterError, match="selective decay measures the distance from the pretrained weights"):
        SelectiveDecay(1.0).applies_to(tensors.values())


# --- options ---


def test_options_have_defaults_and_are_the_methods_own():
    assert METHODS["l1-sp"].settings() == {"strength": 1e-4}
    assert METHODS["lp-ft"].settings({"share": 0.25}) == {"share": 0.25}
    assert METHODS["auto-snr"].settings({}) == {"threshold": 0.3}
    anatomy = anatomy_of(network())
    assert METHODS["auto-snr"].schedule(anatomy, {"threshold": 0.7}) == AutoSNR(0.7)
    reference = METHODS["auto-snr-reference"].schedule(anatomy, METHODS["auto-snr-reference"].settings())
    left_out = frozenset(name for name in anatomy.tensors if "bn" in name)
    assert reference == AutoSNR(0.95, "snr-reference", scaled=False, left_out=left_out)
    assert METHODS["lp-ft"].schedule(anatomy, {"share": 0.25}).share == 0.25


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("full", {"strength": 1.0}, r"full has no option 'strength'; it has none"),
        ("l2-sp", {"strenght": 1.0}, r"l2-sp has no option 'strenght'; it has strength"),
        ("auto-snr", {"threshold": 0.5, "b": 1, "a": 1}, r"auto-snr has no option 'a'; it has threshold"),
    ],
)
def test_an_unknown_option_is_refused(name, given, message):
    with pytest.raises(ConfigError, match=message):
        METHODS[name].settings(given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("l1-sp", {"strength": -1.0}, r"l1-sp with strength=-1.0: give a factor of at least 0"),
        ("spd", {"strength": -1.0}, r"selective decay with strength=-1.0: give a factor of at least 0"),
        ("lp-ft", {"share": 0.0}, r"share=0.0: the head trains alone for a share of the run between 0 and 1"),
        ("auto-snr", {"threshold": 1.5}, r"threshold=1.5: SNRs are compared after scaling to \[0, 1\]"),
    ],
)
def test_an_option_out_of_range_is_refused(name, given, message):
    row = METHODS[name]
    options = row.settings(given)
    with pytest.raises(ConfigError, match=message):
        row.penalty(options) if row.penalty else row.schedule(anatomy_of(network()), options)


# --- names ---


def test_a_number_after_a_name_is_the_option():
    assert method_of("auto-snr@0.5").settings() == {"threshold": 0.5}
    assert method_of("l1-sp@1e-3").settings() == {"strength": 1e-3}
    assert method_of("auto-snr@0.5").target == "all"
    with pytest.raises(ConfigError, match=r"'full@2': full has no option; those that have one are dp-head \(epsilon\)"):
        method_of("full@2")
    with pytest.raises(ConfigError, match=r"'auto-snr@much': threshold is a number, such as auto-snr@0.3"):
        method_of("auto-snr@much")


def test_rows_go_by_their_names():
    assert all(method_of(name) is row for name, row in METHODS.items())


@pytest.mark.parametrize(
    ("name", "target"), [("block1", "block1"), ("block2-3+head", "block2-3 + head"), ("all -head", "all - head")]
)
def test_any_target_is_a_method_of_its_own(name, target):
    row = method_of(name)
    assert (row.name, row.target, row.schedule, row.penalty, row.settings()) == (name, target, None, None, {})


@pytest.mark.parametrize("name", ["auto", "race", "cross-val", "greedy", "auto-fisher"])
def test_searches_are_not_methods(name):
    with pytest.raises(ConfigError, match=rf"'{name}' is .*peft_surgical"):
        method_of(name)


@pytest.mark.parametrize("name", ["", "block1 block2", "- head", "re:("])
def test_what_is_neither_is_refused_with_the_names_that_there_are(name):
    with pytest.raises(ConfigError, match=r"is no method \(full, linear-probe, .*, dfr\) and no target: "):
        method_of(name)


# --- schedules as pure functions of progress ---

ANATOMY = anatomy_of(ConvNet(nn.BatchNorm2d))  # block1, block2, head


def trained(schedule, step, total=9):
    factors = schedule.factors(Progress(step, total), None)
    return {ANATOMY.block_of(name).name for name, factor in factors.items() if factor == 1.0}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("first-to-last", [{"block1"}, {"block1", "block2"}, {"block1", "block2", "head"}]),
        ("last-to-first", [{"head"}, {"block2", "head"}, {"block1", "block2", "head"}]),
    ],
)
def test_gradual_unfreezing_adds_a_block_after_each_third_of_the_run(order, expected):
    schedule = gradual_unfreezing(ANATOMY, order)
    assert [trained(schedule, step) for step in range(9)] == [expected[step // 3] for step in range(9)]
    assert set(schedule.factors(Progress(0, 9))) == set(ANATOMY.tensors)


def test_a_run_that_is_shorter_than_the_blocks_are_many_ends_with_fewer():
    schedule = gradual_unfreezing(ANATOMY, "last-to-first")
    assert [trained(schedule, step, total=2) for step in range(2)] == [{"head"}, {"block2", "head"}]


def test_an_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="first-to-last"):
        gradual_unfreezing(ANATOMY, "upwards")


def test_lp_ft_frees_all_but_the_head_after_its_share():
    schedule = lp_ft(ANATOMY, 1 / 3)
    assert not any(name.startswith("fc.") for name in schedule.others)
    values = [set(schedule.factors(Progress(step, 9)).values()) for step in range(9)]
    assert values == [{0.0}] * 3 + [{1.0}] * 6
    with pytest.raises(ConfigError, match="share=1"):
        lp_ft(ANATOMY, 1)


def test_progress_stays_within_the_run():
    assert Progress(0, 10).share == 0.0
    assert Progress(5, 10).share == 0.5
    assert Progress(12, 10).share == 1.0
    assert trained(gradual_unfreezing(ANATOMY), 12) == {"block1", "block2", "head"}


SCORES = BlockScores(
    "rgn", {"block1": 1.0}, {"conv1.weight": 0.5, "bn1.weight": 2.0, "fc.weight": 0.0}, {"block1": 3}, 10, 2
)


def test_auto_rgn_scales_by_the_largest():
    factors = AutoRGN().factors(Progress(0, 1), SCORES)
    assert factors == {"conv1.weight": 0.25, "bn1.weight": 1.0, "fc.weight": 0.0}
    left_out = AutoRGN(left_out=frozenset({"bn1.weight"})).factors(Progress(0, 1), SCORES)
    assert left_out == {"conv1.weight": 1.0, "bn1.weight": 0.0, "fc.weight": 0.0}


def test_parts_take_turns_by_epoch():
    schedule = alternating(ANATOMY)
    head = set(ANATOMY["head"].tensors)
    for epoch in range(4):
        trained = {name for name, factor in schedule.factors(Progress(0, 1, epoch)).items() if factor == 1.0}
        assert trained == (head if epoch % 2 else set(ANATOMY.tensors) - head)


def test_auto_snr_freezes_below_the_threshold():
    assert AutoSNR(0.25).factors(Progress(0, 1), SCORES) == {"conv1.weight": 1.0, "bn1.weight": 1.0, "fc.weight": 0.0}
    assert AutoSNR(0.26).factors(Progress(0, 1), SCORES)["conv1.weight"] == 0.0
    assert set(AutoSNR(0.0).factors(Progress(0, 1), SCORES).values()) == {1.0}
    raw = AutoSNR(0.5, scaled=False, left_out=frozenset({"bn1.weight"}))
    assert raw.factors(Progress(0, 1), SCORES) == {"conv1.weight": 1.0, "bn1.weight": 0.0, "fc.weight": 0.0}
    assert AutoSNR(2, scaled=False).factors(Progress(0, 1), SCORES)["bn1.weight"] == 1.0
    with pytest.raises(ConfigError, match="threshold=2: SNRs are compared after scaling"):
        AutoSNR(2)
    with pytest.raises(ConfigError, match="threshold=-1: give a number of at least 0"):
        AutoSNR(-1, scaled=False)


def test_normalised_and_block_means():
    assert normalised({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}
    assert normalised({}) == {}
    means = block_means({"conv1.weight": 0.5, "bn1.weight": 1.0, "fc.weight": 0.0}, ANATOMY)
    assert means == {"block1": 0.75, "head": 0.0}
