"""`SurgicalCallback` in Trainer: records, resuming, accumulation, clipping and schedulers, against loops by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import ConvNet, Rows, same, snapshot
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_callback import PrinterCallback

import peft_surgical.choosing.pace
from peft_surgical import SurgicalCallback, SurgicalConfig, anatomy_of
from peft_surgical.choosing.callback import RECORD, scoring_loader
from peft_surgical.choosing.methods import AutoRGN, AutoSNR, gradual_unfreezing
from peft_surgical.choosing.penalties import Penalty
from peft_surgical.errors import AnatomyError, ConfigError

pytestmark = pytest.mark.usefixtures("quick_collections", "own_accelerate_state")

RATE, DECAY = 0.02, 0.1


class Net(ConvNet):
    """A classifier as Trainer expects it, with dropout where it is asked for."""

    def __init__(self, dropout=0.0):
        super().__init__(nn.BatchNorm2d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixel_values, labels=None):
        logits = super().forward(self.dropout(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def network(dropout=0.0):
    torch.manual_seed(0)
    return Net(dropout)


NAMES = tuple(name for name, _ in network().named_parameters())
BLOCK1 = tuple(name for name in NAMES if name.startswith(("conv1", "bn1", "layer1")))


class Stream(IterableDataset):
    def __iter__(self):
        rows = Rows()
        yield from (rows[i] for i in range(10))


class Fixed:
    """The same factors all the time; with a criterion, scores are taken and not asked."""

    def __init__(self, factors, criterion=None):
        self.given, self.criterion = factors, criterion

    def factors(self, progress, scores):
        return self.given


class FrozenFrom:
    """Block 1 is trained for so many steps, and then frozen."""

    criterion = None

    def __init__(self, step):
        self.step = step

    def factors(self, progress, scores):
        return dict.fromkeys(BLOCK1, float(progress.step < self.step))


def trainer_of(folder, *callbacks, rows=None, model=None, **arguments):
    model = model or get_peft_model(network(), SurgicalConfig(target="all"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=DECAY)
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "log_level": "error"}
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**quiet, **defaults, **arguments}),
        train_dataset=Rows() if rows is None else rows,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(folder, *callbacks, resume=None, **how):
    trainer = trainer_of(folder, *callbacks, **how)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return dict(copy.deepcopy(trainer.model).merge_and_unload().named_parameters())


def recorded(trainer):
    return [entry for entry in trainer.state.log_history if RECORD in entry]


def by_hand(rows, order, factors, *, accumulation=1, clip=0.0, pull=0.0, reset=False, batch_size=4):
    """Adam on the deltas of the tensors whose factor is not 0; the others are no parameters at all."""
    net = network().eval()
    base = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    deltas = {name: torch.zeros_like(base[name]).requires_grad_() for name in NAMES if factors.get(name, 1.0) > 0}

    def adam():
        groups = [{"params": [delta], "lr": RATE * factors.get(name, 1.0)} for name, delta in deltas.items()]
        return torch.optim.Adam(groups, weight_decay=DECAY)

    optimizer = adam()
    for start in range(0, len(order), len(rows)):
        if reset:
            optimizer = adam()
        drawn = order[start : start + len(rows)]
        batches = [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]
        for first in range(0, len(batches), accumulation):
            micro = batches[first : first + accumulation]
            for batch in micro:
                tuned = {**base, **{name: base[name] + delta for name, delta in deltas.items()}}
                logits = functional_call(net, tuned, (rows.images[batch],)).logits
                (F.cross_entropy(logits, rows.classes[batch]) / len(micro)).backward()
            if clip:
                assert nn.utils.clip_grad_norm_(deltas.values(), clip) > clip  # it bites
            for delta in deltas.values():
                delta.grad += pull * delta.detach()
            optimizer.step()
            optimizer.zero_grad()
    return {name: (base[name] + deltas[name] if name in deltas else base[name]).detach() for name in NAMES}


def rgn_factors(batches):
    """Auto-RGN's factors by plain autograd on the untouched network (paper, eq. 3)."""
    net = network().eval()
    norms = dict.fromkeys(NAMES, 0.0)
    for images, labels in batches:
        net.zero_grad()
        net(images, labels).loss.backward()
        for name, parameter in net.named_parameters():
            norms[name] += parameter.grad.norm().item() / len(batches)
    sizes = {name: parameter.norm().item() for name, parameter in net.named_parameters()}
    found = {name: norms[name] / sizes[name] for name in NAMES if sizes[name] > 0}
    # All-zero weights (biases of the norms) have no relative norm of their own and are given their block's.
    blocks = anatomy_of(network())
    for block in blocks:
        members = [name for name in block.tensors if name in NAMES]
        for name in set(members) - set(found):
            squares = 0.0
            for images, labels in batches:
                net.zero_grad()
                net(images, labels).loss.backward()
                own = sum(p.grad.square().sum() for other, p in net.named_parameters() if other in members)
                squares += own.sqrt().item() / len(batches)
            found[name] = squares / math.sqrt(sum(sizes[other] ** 2 for other in members))
    return {name: found[name] / max(found.values()) for name in NAMES}


# --- records ---


def test_auto_rgn_records_the_factors_of_every_epoch(tmp_path):
    rows = Rows()
    trainer = trained(tmp_path, SurgicalCallback(AutoRGN()), rows=rows)
    entries = recorded(trainer)
    assert [(entry["epoch"], entry["step"]) for entry in entries] == [(0, 0), (1, 3)]
    # All ten images are scored, in three batches: what was drawn before training began, but for Trainer's prefetch.
    drawn = rows.drawn[:10]
    assert sorted(drawn) == list(range(10))
    batches = [(rows.images[part], rows.classes[part]) for part in (drawn[:4], drawn[4:8], drawn[8:])]
    assert entries[0][RECORD] == pytest.approx(rgn_factors(batches), rel=1e-4)
    assert entries[1][RECORD] != entries[0][RECORD]
    assert all(set(entry[RECORD]) == set(NAMES) and max(entry[RECORD].values()) == 1 for entry in entries)


def test_scores_can_come_from_data_of_their_own(tmp_path):
    others = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    batches = [(others[0], torch.tensor([0, 1, 2])), (others[1], torch.tensor([2, 3, 4]))]
    rows = Rows()
    data = [{"pixel_values": images, "labels": labels} for images, labels in batches]
    trainer = trained(tmp_path, SurgicalCallback(AutoRGN(), scoring_data=data), rows=rows)
    assert recorded(trainer)[0][RECORD] == pytest.approx(rgn_factors(batches), rel=1e-4)
    assert len(rows.drawn) == 20  # by training alone


def test_a_stream_needs_data_for_the_scores(tmp_path):
    with pytest.raises(
        ConfigError, match=r"the training data is a stream: pass SurgicalCallback\(scoring_data=loader\)"
    ):
        trained(tmp_path, SurgicalCallback(AutoRGN()), rows=Stream(), max_steps=2)
    trainer = trained(
        tmp_path,
        SurgicalCallback(AutoSNR(0.5), scoring_data=DataLoader(Rows(), 5), num_batches=1),
        rows=Stream(),
        max_steps=2,
    )
    assert set(recorded(trainer)[0][RECORD].values()) == {0.0, 1.0}
    # Without scores to take, a stream is as good as any data.
    trained(tmp_path, SurgicalCallback(FrozenFrom(1)), rows=Stream(), max_steps=2)


BLOCKS = {"block1": ["0", "1"], "head": "4"}


def test_blocks_may_be_named_for_networks_of_unknown_layout(tmp_path):
    class Plain(nn.Sequential):
        def forward(self, pixel_values, labels):
            logits = super().forward(pixel_values)
            return ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)

    def model(**how):
        torch.manual_seed(0)
        net = Plain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        return get_peft_model(net, SurgicalConfig(target="all", **how))

    net = model(blocks=BLOCKS)
    order = gradual_unfreezing(anatomy_of(net.get_base_model(), BLOCKS))
    first = trained(tmp_path, SurgicalCallback(order), model=net, max_steps=1)
    moved = {
        name.rpartition(".default.")[0] for name, p in first.model.named_parameters() if p.requires_grad and p.any()
    }
    assert moved == {"base_model.model.4.surgery.surgical_delta"}  # of two steps' one, the head's
    plain = get_peft_model(net.unload(), SurgicalConfig(target_modules=["0", "1", "4"]))
    with pytest.raises(AnatomyError, match="Cannot tell the blocks"):
        trained(tmp_path, SurgicalCallback(AutoRGN()), model=plain, max_steps=1)
    second = trained(tmp_path, SurgicalCallback(AutoRGN(), blocks=BLOCKS), model=plain, max_steps=1)
    assert set(recorded(second)[0][RECORD]) == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


# --- resuming ---


class Kill(TrainerCallback):
    """Dies once, in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.fixture
def scored(monkeypatch):
    calls = []
    real = peft_surgical.choosing.pace.score_blocks

    def counting(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(peft_surgical.choosing.pace, "score_blocks", counting)
    return calls


SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
CASES = {
    "scores": lambda: SurgicalCallback(AutoRGN()),
    "scores and new moments": lambda: SurgicalCallback(AutoRGN(), reset_moments=True),
    "new moments": lambda: SurgicalCallback(reset_moments=True),
    "steps": lambda: SurgicalCallback(FrozenFrom(5), Penalty("l2-sp", 0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_in_the_middle_of_an_epoch_bit_for_bit(case, tmp_path, scored):
    whole = trained(tmp_path, CASES[case](), **SAVING)  # checkpoints after 2, 4 and 6 steps; an epoch has 3
    assert len(scored) == (2 if "scores" in case else 0)
    assert len(recorded(whole)) >= len(scored)
    scored.clear()
    callback = CASES[case]()
    rest = trained(tmp_path / "rest", callback, resume=str(tmp_path / "checkpoint-4"), **SAVING)
    assert scored == []
    assert recorded(rest) == recorded(whole)
    assert same(snapshot(rest.model), snapshot(whole.model))
    if case == "scores":
        again = trained(tmp_path / "again", callback, resume=str(tmp_path / "checkpoint-2"), **SAVING)
        assert len(scored) == 1  # of the second epoch; the first one's are in the checkpoint
        assert recorded(again) == recorded(whole)
        assert same(snapshot(again.model), snapshot(whole.model))


def test_new_moments_begin_with_an_epoch_also_in_a_run_that_resumes_there(tmp_path):
    saving = {"save_strategy": "epoch"}
    whole = trained(tmp_path, SurgicalCallback(reset_moments=True), **saving)
    rest = trained(
        tmp_path / "rest", SurgicalCallback(reset_moments=True), resume=str(tmp_path / "checkpoint-3"), **saving
    )
    assert same(snapshot(rest.model), snapshot(whole.model))


class BySteps(AutoRGN):
    """Wants scores, and says the share of the run that was done when they were taken."""

    def factors(self, progress, scores):
        return dict.fromkeys(scores.tensor_scores, progress.share)


def test_a_schedule_with_scores_knows_the_step_also_in_a_run_that_resumes(tmp_path):
    saving = {"save_strategy": "epoch"}
    whole = trained(tmp_path, SurgicalCallback(BySteps()), **saving)
    assert [set(entry[RECORD].values()) for entry in recorded(whole)] == [{0.0}, {0.5}]
    rest = trained(tmp_path / "rest", SurgicalCallback(BySteps()), resume=str(tmp_path / "checkpoint-3"), **saving)
    assert recorded(rest) == recorded(whole)


def test_an_interrupted_trainer_can_be_started_again(tmp_path):
    whole = trained(tmp_path / "whole", SurgicalCallback(AutoRGN()), **SAVING)
    trainer = trainer_of(tmp_path, SurgicalCallback(AutoRGN()), Kill(3), **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert recorded(trainer) == recorded(whole)
    assert same(snapshot(trainer.model), snapshot(whole.model))


def test_afterwards_the_optimizer_and_the_gradients_are_left_alone(tmp_path):
    trainer = trained(tmp_path, SurgicalCallback(Fixed(dict.fromkeys(NAMES, 0.0))), max_steps=1)
    assert not any(p.any() for p in trainer.model.parameters() if p.requires_grad)
    optimizer = trainer.optimizer.optimizer
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(NAMES)
    trainer.model(Rows().images, Rows().classes).loss.backward()
    optimizer.step()
    assert all(p.any() for p in group["params"])


# --- steps ---


def test_blocks_join_at_the_steps_that_the_schedule_says(tmp_path):
    schedule = gradual_unfreezing(anatomy_of(network()))
    seen = []

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            names = {n: p for n, p in kwargs["model"].named_parameters() if p.requires_grad}
            seen.append({n.removeprefix("base_model.model.").split(".")[0] for n, p in names.items() if p.grad.any()})

    trained(tmp_path, SurgicalCallback(schedule), Watching(), num_train_epochs=3)
    wanted = [{"fc"}] * 3 + [{"fc", "layer2"}] * 3 + [{"fc", "layer2", "layer1", "bn1", "conv1"}] * 3
    assert seen == wanted


def test_steps_that_a_gradient_scaler_skips_count(tmp_path):
    trainer = trainer_of(tmp_path, callback := SurgicalCallback(FrozenFrom(3)))
    callback.on_train_begin(
        trainer.args, TrainerState(max_steps=6), None, model=trainer.model, optimizer=trainer.optimizer
    )
    counted = []
    for step in range(5):  # and none of them reaches the optimizer
        callback.on_step_begin(trainer.args, TrainerState(global_step=step), None)
        counted.append((callback.pace.step, callback.pace.factors["conv1.weight"]))
    assert counted == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)]


@pytest.mark.parametrize(("epoch", "wanted"), [(None, 0), (0.0, 0), (0.5, 0), (2 - 1e-9, 2), (2.0, 2), (2.25, 2)])
def test_epochs_are_whole_also_where_their_fractions_do_not_add_up(tmp_path, epoch, wanted):
    trainer = trainer_of(tmp_path, callback := SurgicalCallback())
    state = TrainerState(epoch=epoch, max_steps=9)
    callback.on_train_begin(trainer.args, state, None, model=trainer.model, optimizer=trainer.optimizer)
    assert callback.pace.epoch == wanted


# --- rates ---


class Watch(TrainerCallback):
    """Keeps what the optimizer's groups and the scheduler say after each step, and Adam's moments at one of them."""

    def __init__(self, step=None):
        self.step, self.rates, self.last, self.sizes = step, [], [], set()

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = kwargs["optimizer"].optimizer
        self.rates += [group["lr"] for group in optimizer.param_groups]
        self.last += kwargs["lr_scheduler"].get_last_lr()
        self.sizes |= {len(group["params"]) for group in optimizer.param_groups}
        if state.global_step == self.step:
            self.state = copy.deepcopy(named_state(kwargs["model"], optimizer))
            self.deltas = snapshot(kwargs["model"])


def named_state(model, optimizer):
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def test_a_schedulers_rates_are_untouched_by_the_factors(tmp_path):
    watch = Watch()
    trained(tmp_path, SurgicalCallback(AutoRGN()), watch, lr_scheduler_type="cosine")
    wanted = [RATE * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(1, 7)]
    assert watch.rates == pytest.approx(wanted)  # one group, six steps
    assert watch.last == pytest.approx(wanted)
    assert watch.sizes == {len(NAMES)}


FACTORS = {**dict.fromkeys(BLOCK1, 0.0), "fc.weight": 0.5, "layer2.1.weight": 0.25}


@pytest.mark.parametrize(
    ("hand", "arguments", "penalty"),
    [
        ({}, {}, None),
        ({"accumulation": 2, "batch_size": 2}, {"gradient_accumulation_steps": 2}, None),
        ({"clip": 0.05}, {"max_grad_norm": 0.05}, None),
        ({"clip": 0.05, "pull": 0.3}, {"max_grad_norm": 0.05}, Penalty("l2-sp", 0.3)),
    ],
    ids=["plain", "accumulated", "clipped", "clipped and penalised"],
)
def test_frozen_tensors_are_as_good_as_absent(hand, arguments, penalty, tmp_path):
    rows = Rows()
    sizes = {"per_device_train_batch_size": hand.get("batch_size", 4)}
    trainer = trained(tmp_path, SurgicalCallback(Fixed(FACTORS), penalty), rows=rows, **arguments, **sizes)
    wanted = by_hand(rows, rows.drawn, FACTORS, **hand)
    found = weights(trainer)
    before = dict(network().named_parameters())
    for name in NAMES:
        if name in BLOCK1:  # also no decay: their deltas are not even touched
            assert torch.equal(found[name], before[name])
        elif "clip" in hand:  # the norm is summed up in another order
            assert torch.allclose(found[name], wanted[name], atol=1e-6), name
        else:
            assert torch.equal(found[name], wanted[name]), name


def test_clipping_does_not_see_frozen_gradients(tmp_path):
    # With them, the norm would be larger and all steps of SGD smaller.
    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            frozen = [p.grad for name, p in kwargs["model"].named_parameters() if p.requires_grad and is_block1(name)]
            assert len(frozen) == len(BLOCK1)
            assert not any(gradient.any() for gradient in frozen)

    def is_block1(name):
        return name.removeprefix("base_model.model.").startswith(("conv1", "bn1", "layer1"))

    trained(tmp_path, SurgicalCallback(Fixed(FACTORS)), Norms(), max_steps=2, max_grad_norm=1.0)


def test_freezing_stops_decay_and_moments(tmp_path):
    watch = Watch(step=2)
    trainer = trained(tmp_path, SurgicalCallback(FrozenFrom(2)), watch)
    after, deltas = named_state(trainer.model, trainer.optimizer.optimizer), snapshot(trainer.model)
    frozen = {name for name in after if name.removeprefix("base_model.model.").startswith(("conv1", "bn1", "layer1"))}
    assert len(frozen) == len(BLOCK1)
    for name, state in after.items():
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[kind], watch.state[name][kind]) == (name in frozen), (name, kind)
        assert torch.equal(deltas[name], watch.deltas[name]) == (name in frozen)
        assert deltas[name].any()


def test_moments_are_forgotten_at_every_epoch(tmp_path):
    rows = Rows()
    trainer = trained(tmp_path, SurgicalCallback(reset_moments=True), rows=rows)
    assert {int(s["step"]) for s in trainer.optimizer.optimizer.state.values()} == {3}
    wanted, found = by_hand(rows, rows.drawn, {}, reset=True), weights(trainer)
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


# --- the scoring images ---


def test_the_scoring_loader_is_a_function_of_seed_and_epoch():
    rows = Rows(20)
    dataloader = DataLoader(rows, 4, shuffle=True)
    state = torch.get_rng_state()

    def drawn(seed, epoch, num_batches=3):
        rows.drawn.clear()
        with torch.random.fork_rng():
            batches = list(scoring_loader(dataloader, 4, num_batches, seed, epoch))
        assert [len(batch["labels"]) for batch in batches] == [4] * min(num_batches, 5)
        return list(rows.drawn)

    found = drawn(0, 0)
    assert len(set(found)) == 12
    assert drawn(0, 0) == found
    assert drawn(0, 0, 2) == found[:8]
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(drawn(0, 0, 9)) == list(range(20))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_process_scores_images_of_its_own(monkeypatch):
    rows, drawn = Rows(20), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        rows.drawn.clear()
        list(scoring_loader(DataLoader(rows, 4), 4, 2, seed=0, epoch=0))
        drawn += rows.drawn
    assert len(drawn) == len(set(drawn)) == 16


def test_scores_are_taken_with_the_seed_the_collator_and_the_loss_of_the_run(tmp_path):
    rows, asked = Rows(), []

    def collate(drawn):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in drawn]) / 2,
            "labels": torch.zeros(len(drawn)).long(),
        }

    def loss(outputs, labels):
        asked.append(labels.tolist())
        return outputs.logits.square().mean()

    def run(**how):
        arguments = {"max_steps": 1, "rows": rows, "data_seed": 0, **how}
        trainer = trainer_of(tmp_path, SurgicalCallback(AutoRGN(), loss_fn=loss, num_batches=1), **arguments)
        trainer.data_collator = collate
        rows.drawn.clear()
        trainer.train()
        return rows.drawn[:4], recorded(trainer)[0][RECORD]

    first, factors = run(seed=0)
    assert asked == [[0, 0, 0, 0]]  # one batch, its labels by the collator
    net = network().eval()
    outputs = net(torch.stack([rows.images[i] for i in first]) / 2)
    outputs.logits.square().mean().backward()
    ratios = {n: (p.grad.norm() / p.norm()).item() for n, p in net.named_parameters() if p.any()}
    for name, ratio in ratios.items():
        assert factors[name] / factors["fc.weight"] == pytest.approx(ratio / ratios["fc.weight"], rel=1e-4)
    assert run(seed=0)[0] == first
    assert run(seed=1)[0] != first


def test_no_more_batches_than_asked_for_are_scored(tmp_path):
    data = list(DataLoader(Rows(), 5))
    runs = [SurgicalCallback(AutoRGN(), scoring_data=data[:n], num_batches=k) for n, k in ((2, 1), (1, 5), (2, 5))]
    found = [recorded(trained(tmp_path, callback, max_steps=1))[0][RECORD] for callback in runs]
    assert found[0] == found[1] != found[2]


def test_scoring_disturbs_neither_the_order_nor_the_dropout(tmp_path):
    runs = []
    for callbacks in ([], [SurgicalCallback(Fixed({}, "rgn"))], [SurgicalCallback(Fixed({}, "snr"))]):
        seen = []
        net = network(dropout=0.3)
        net.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: (
                seen.append(kwargs["pixel_values"][:, 0, 0, 0].tolist()) if module.training else None
            ),
            with_kwargs=True,
        )
        trainer = trained(tmp_path, *callbacks, model=get_peft_model(net, SurgicalConfig(target="all")))
        assert len(recorded(trainer)) == 2 * len(callbacks)
        runs.append((seen, snapshot(trainer.model)))
    assert len(runs[0][0]) == 6
    for seen, state in runs[1:]:
        assert seen == runs[0][0]
        assert same(state, runs[0][1])


def test_auto_rgn_leaves_the_order_of_the_images_alone(tmp_path):
    orders = []
    for callbacks in (
        [],
        [SurgicalCallback(AutoRGN(), scoring_data=[{"pixel_values": Rows().images, "labels": Rows().classes}])],
    ):
        rows = Rows()
        trained(tmp_path, *callbacks, rows=rows)
        orders.append(rows.drawn)
    assert orders[0] == orders[1]


def test_scores_are_taken_in_the_precision_of_training(tmp_path, monkeypatch):
    asked = []
    real = peft_surgical.choosing.pace.score_blocks
    monkeypatch.setattr(
        peft_surgical.choosing.pace,
        "score_blocks",
        lambda *args, **how: asked.append(how["autocast"]) or real(*args, **how),
    )
    trainer = trained(tmp_path, SurgicalCallback(AutoRGN()), bf16=True, max_steps=1)
    assert asked == [torch.bfloat16]
    assert max(recorded(trainer)[0][RECORD].values()) == 1
