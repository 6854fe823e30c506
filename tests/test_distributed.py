"""One run cut up: over two processes (DDP, FSDP2, ZeRO-2), over accumulated batches, in bfloat16; against whole batches
in one process."""

import copy
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import environment, run
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import Rows, outputs, used_batchnorm, vit
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from peft_surgical import SurgicalCallback, SurgicalConfig, score_blocks
from peft_surgical.choosing.callback import RECORD
from peft_surgical.choosing.methods import AutoRGN, normalised
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.trainer import MARK, ClassifierTrainer

pytestmark = pytest.mark.usefixtures("quick_collections", "own_accelerate_state")

BATCH = 8  # of all processes and accumulated batches together


def transformer():
    torch.manual_seed(0)
    return vit()


def logits(model, images):
    return outputs(model.eval(), images if "ConvNet" in str(model) else {"pixel_values": images})


@dataclass(frozen=True)
class Case:
    """A run on so many images."""

    method: str = "block1"
    tuning: int = 24
    settings: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    network: object = used_batchnorm
    keeps: bool = False  # has a folder
    tolerance: float = 1e-5  # single precision, sums in another order


SGD = {"optimizer": "sgd", "lr": 0.2}  # Adam makes steps of gradients that are zero but for rounding
CASES = {
    "plain": Case("full", settings={"lr": 0.02}),
    "auto-rgn": Case("auto-rgn", settings={"lr": 0.1}),
    "statistics": Case("full", config={"norm_stats": "all"}),
    "folder": Case(keeps=True),
    "transformer": Case("last2", network=transformer, settings=SGD),
    "gradual": Case("gradual-first-last"),
    "auto-snr": Case("auto-snr"),
    "penalty": Case("l2-sp"),
    "selective decay": Case("spd"),
    "accumulated": Case("gradual-last-first", settings={"accumulation": 2}),
    "clipped": Case("gradual-last-first", settings={"max_grad_norm": 0.1, "lr_scheduler": "cosine"}),
    "bf16": Case(settings={"precision": "bf16"}, tolerance=0.05),
    "uneven": Case(tuning=101),
}
QUICK = ("plain", "auto-rgn", "statistics", "folder")
OTHERWISE = ("statistics", "uneven", "auto-rgn")
"""Legitimately not the run of one process: each process norms its own batch, Accelerate fills the last batch up with
images from the beginning of the epoch, and units of scores are the batches of a process."""

SHARDED = {
    name: replace(case, keeps=True, settings={**case.settings, "use_cpu": False})
    for name, case in {
        "whole": Case(),
        "transformer": Case("last2", network=transformer, settings=SGD),
        "gradual": Case("gradual-first-last"),
        "penalty": Case("l2-sp"),
        "selective decay": Case("spd"),
        "accumulated": Case("full", settings={"accumulation": 2}),
    }.items()
}
UNPACED = ("whole", "transformer", "accumulated")


class Listen(TrainerCallback):
    """Keeps Trainer's log."""

    def on_train_end(self, args, state, control, **kwargs):
        self.log = state.log_history


def train(case, folder, processes=1):
    """One run as this process sees it: what came of it, what was validated, read and written."""
    tuning, validation, listen, seen, writes = Rows(case.tuning, 1), Rows(101, 2), Listen(), [], []
    settings = FitSettings(**{"lr": 0.05, "epochs": 3, "weight_decay": 0.1, "use_cpu": True, **case.settings})
    settings = replace(settings, batch_size=BATCH // processes // settings.accumulation)

    def accuracy(given, labels):
        seen.append((given, labels))
        return (given.argmax(1) == labels).double().mean().item()

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "save"), (os, "replace"), (TrainerState, "save_to_json")):
            patch.setattr(owner, name, noted(getattr(owner, name), writes))
        found = fit(
            case.network(),
            case.method,
            tuning,
            validation,
            settings,
            config=case.config,
            folder=folder if case.keeps else None,
            callbacks=[listen],
            metric=accuracy,
            cache=False,  # the images that are read are counted
        )
    state = {name: value.detach().clone() for name, value in found.model.state_dict().items()}
    return {
        "model": found.model,
        "curve": found.curve,
        "losses": found.losses,
        "epoch": found.best_epoch,
        "record": found.record,
        "logged": [entry[RECORD] for entry in listen.log if RECORD in entry],
        "state": state,
        "deltas": {name: value for name, value in state.items() if "surgical_delta" in name},
        "logits": logits(found.model, validation.images),
        "seen": seen,
        "drawn": len(validation.drawn),
        "writes": {path.name for path in writes},
    }


def noted(original, paths):
    """A function that also keeps the files in checkpoints that it is called with: the last of its arguments."""

    def call(*args, **kwargs):
        paths.extend(Path(arg) for arg in args[-1:] if "checkpoint-" in str(arg))
        return original(*args, **kwargs)

    return call


def together(rank, folder, cases):
    for name, case in cases.items():
        found = train(case, folder / name, processes=2)
        if rank == 0:
            found["model"].save_pretrained(folder / name / "adapter")
        torch.save({**found, "model": None}, folder / f"{name}-{rank}.pt")


def pair(folder, cases, env=None):
    """Name -> what the first and the second process have, and the folder."""
    assert run(together, folder, cases, processes=2, env=env) == [0, 0]
    return {
        name: (*(torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)), folder / name)
        for name in cases
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The cases under DDP; the slow ones only where one of them is asked for."""
    found = {}

    def of(name):
        if name not in found:
            cases = {one: case for one, case in CASES.items() if (one in QUICK) == (name in QUICK)}
            found.update(pair(tmp_path_factory.mktemp("pair"), cases))
        return found[name]

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in this process."""
    found = {}

    def of(case):
        if str(case) not in found:
            found[str(case)] = train(case, tmp_path_factory.mktemp("alone"))
        return found[str(case)]

    return of


def tiered(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def assert_the_same_run(found, wanted, tolerance):
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
    assert found["deltas"].keys() == wanted["deltas"].keys()
    for key, value in wanted["deltas"].items():
        assert torch.allclose(found["deltas"][key], value, atol=tolerance), key
    assert any(value.any() for value in wanted["deltas"].values())
    if tolerance < 1e-4:
        assert found["curve"] == wanted["curve"]
        assert found["epoch"] == wanted["epoch"]


def assert_the_same_bits(first, second):
    for what in ("curve", "losses", "epoch", "record", "logged"):
        assert first[what] == second[what]
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


# --- DDP, through fit ---


@pytest.mark.parametrize("name", tiered([name for name in CASES if name not in OTHERWISE]))
def test_two_processes_give_the_metrics_and_the_adapter_of_one(pairs, alone, name):
    assert_the_same_run(pairs(name)[0], alone(CASES[name]), CASES[name].tolerance)


@pytest.mark.parametrize("name", tiered(CASES))
def test_both_processes_return_the_same_model_bit_for_bit(pairs, name):
    first, second, _ = pairs(name)
    assert_the_same_bits(first, second)
    if name in ("plain", "auto-rgn"):
        assert first["epoch"] < 3  # so the best epoch had to be found again


@pytest.mark.parametrize("name", tiered(CASES))
def test_every_validation_image_counts_once(pairs, name):
    labels = Rows(101, 2).classes
    for found in pairs(name)[:2]:
        assert found["drawn"] == 3 * 51  # half of the images, and one that fills the batches up
        for (given, of), accuracy, loss in zip(found["seen"], found["curve"], found["losses"], strict=True):
            assert torch.equal(of, labels)  # all of them, in their order
            assert accuracy == int((given.argmax(1) == labels).sum()) / 101
            assert loss == pytest.approx(nn.functional.cross_entropy(given, labels).item(), rel=1e-5)


@pytest.mark.parametrize("name", tiered(CASES))
def test_the_saved_adapter_is_what_was_validated(pairs, name):
    """Also where statistics move, of which each process has seen others."""
    first, _, folder = pairs(name)
    loaded = PeftModel.from_pretrained(CASES[name].network(), folder / "adapter")
    assert torch.equal(logits(loaded, Rows(101, 2).images), first["logits"])  # no cast is left behind by bfloat16
    validated, _ = first["seen"][first["epoch"] - 1]
    assert torch.allclose(first["logits"], validated, atol=CASES[name].tolerance)


def test_only_the_first_process_writes_but_for_each_ones_random_state(pairs):
    first, second, folder = pairs("folder")
    assert second["writes"] == {"rng_state_1.pth"}
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state_0.pth"} <= first["writes"]
    checkpoints = list(folder.glob("checkpoint-*"))
    assert {path.name for path in checkpoints} <= {"checkpoint-3", "checkpoint-6", "checkpoint-9"}
    assert len(checkpoints) in (1, 2)
    for path in checkpoints:
        assert {MARK, "rng_state_0.pth", "rng_state_1.pth"} <= {inner.name for inner in path.iterdir()}
        assert load_file(path / "adapter_model.safetensors")


def test_auto_rgns_factors_are_those_of_the_union_of_the_batches(pairs):
    first, second, _ = pairs("auto-rgn")
    assert sorted(first["record"]) == [0, 1, 2]
    assert first["logged"] == second["logged"] == [first["record"][epoch] for epoch in range(3)]
    # By hand: the images that each process draws for its scores, four at a time.
    rows = Rows(24, 1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [batch for rank in (0, 1) for batch in DataLoader(Subset(rows, order[rank::2]), 4)]
    model = get_peft_model(used_batchnorm(), SurgicalConfig(target="all"))
    wanted = normalised(score_blocks(model, batches, "rgn", None).tensor_scores)
    assert first["record"][0] == pytest.approx(wanted, rel=1e-4)
    assert len({round(factor, 3) for factor in wanted.values()}) > 5


# --- FSDP2 and ZeRO-2, through fit ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    found = pair(tmp_path_factory.mktemp("fsdp2"), SHARDED, environment("fsdp2.yaml"))
    layers = environment(
        "fsdp2.yaml",
        *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_transformer_layer_cls_to_wrap", "ViTLayer", "--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
    )
    by_layer = pair(tmp_path_factory.mktemp("layers"), {"transformer": SHARDED["transformer"]}, layers)
    return {**found, "layers": by_layer["transformer"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARDED, "layers"])
def test_fsdp2_gives_the_metrics_and_the_adapter_of_one_process(sharded, alone, name):
    first, second, folder = sharded[name]
    case = SHARDED.get(name, SHARDED["transformer"])
    assert_the_same_run(first, alone(replace(case, settings={**case.settings, "use_cpu": True})), case.tolerance)
    assert_the_same_bits(first, second)
    assert second["writes"] <= {"rng_state_1.pth"}
    loaded = PeftModel.from_pretrained(case.network(), folder / "adapter")
    assert torch.equal(logits(loaded, Rows(101, 2).images), first["logits"])


@pytest.mark.slow
def test_zero2_gives_the_metrics_and_the_adapter_of_one_process(alone, tmp_path):
    pytest.importorskip("deepspeed")
    cases = {name: SHARDED[name] for name in UNPACED}
    for name, (first, second, _) in pair(tmp_path, cases, environment("zero2.yaml")).items():
        wanted = replace(cases[name], settings={**cases[name].settings, "use_cpu": True})
        assert_the_same_run(first, alone(wanted), cases[name].tolerance)
        assert_the_same_bits(first, second)


# --- accumulated batches, in one process ---


@pytest.mark.parametrize("method", ["block1", "gradual-first-last", "l2-sp", "auto-snr"])
def test_two_half_batches_are_a_whole_one(alone, method):
    # 16 images: all of them are in the first five batches, of four as of eight, which scores are taken on.
    whole = Case(method, tuning=16)
    halves = replace(whole, settings={"accumulation": 2})
    assert_the_same_run(alone(halves), alone(whole), 1e-5)
    if method == "auto-snr":
        assert set(alone(whole)["record"][0].values()) == {0.0, 1.0}
        assert alone(halves)["record"] == alone(whole)["record"]


def test_auto_rgn_paces_two_half_batches_as_a_whole_one(tmp_path):
    """On the same batches to score: in `fit` those are the ones that are accumulated."""
    rows, found = Rows(16, 1), []
    scoring = [{"pixel_values": rows.images[i : i + 4], "labels": rows.classes[i : i + 4]} for i in (0, 4, 8)]
    for accumulation in (1, 2):
        model = get_peft_model(used_batchnorm(), SurgicalConfig(target="all"))
        arguments = TrainingArguments(
            output_dir=tmp_path,
            num_train_epochs=2,
            per_device_train_batch_size=BATCH // accumulation,
            gradient_accumulation_steps=accumulation,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        callback = SurgicalCallback(AutoRGN(), scoring_data=scoring)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        trainer = ClassifierTrainer(
            model=model, args=arguments, train_dataset=rows, optimizers=(sgd, None), callbacks=[callback]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found.append((callback.pace.record, {n: p for n, p in model.named_parameters() if p.requires_grad}))
    (whole, deltas), (halves, others) = found
    assert halves[0] == whole[0]
    assert halves[1] == pytest.approx(whole[1], rel=1e-3)
    assert whole[0] != whole[1]
    for name, value in deltas.items():
        assert torch.allclose(others[name], value, atol=1e-5), name


# --- a loop of one's own ---

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 5


def steps(model, images, labels, count=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(count):
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_loop(rank, kind, folder):
    dist.init_process_group("gloo")
    model = get_peft_model(transformer(), SurgicalConfig(target="embedding + block1 + head"))
    wrapped = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.get_base_model().vit.layers:
            fully_shard(block)
        fully_shard(model)
    losses = torch.tensor(steps(wrapped, IMAGES[rank::2], LABELS[rank::2]))
    dist.all_reduce(losses)
    # Every rank gathers; each writes its own folder, so that they can be compared.
    model.save_pretrained(f"{folder}/rank{rank}")
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    if rank == 0:  # Trainer hands its state dict to the first process, which saves alone
        model.save_pretrained(f"{folder}/first", state_dict=whole)
        torch.save(losses / 2, f"{folder}/losses.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_loop_of_ones_own_on_two_processes_equals_one(kind, tmp_path):
    alone = get_peft_model(transformer(), SurgicalConfig(target="embedding + block1 + head"))
    losses = steps(alone, IMAGES, LABELS)
    assert run(own_loop, kind, str(tmp_path), processes=2) == [0, 0]
    assert torch.allclose(torch.load(tmp_path / "losses.pt"), torch.tensor(losses), atol=1e-5)
    base = transformer()
    places = ("rank0", "rank1", "first")
    loaded = [PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / place) for place in places]
    found = [get_peft_model_state_dict(model) for model in loaded]
    wanted = get_peft_model_state_dict(alone)
    assert found[0].keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[0][key], found[1][key])
        assert torch.equal(found[0][key], found[2][key])
        assert torch.allclose(found[0][key], value, atol=1e-5)
        assert value.any()
