"""Scores and schedules under DDP, two processes on the CPU (gloo), against one process that sees all images."""

import pytest
import torch
import torch.nn.functional as F
from launching import run
from peft import get_peft_model
from tiny import ConvNet
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from accelerate import Accelerator
from peft_surgical import Pace, SurgicalCallback, SurgicalConfig, anatomy_of, score_blocks
from peft_surgical.choosing import CRITERIA
from peft_surgical.choosing.callback import RECORD
from peft_surgical.choosing.methods import AutoRGN, gradual_unfreezing
from peft_surgical.choosing.models import trained_tensors, unwrapped
from peft_surgical.training.trainer import ClassifierTrainer

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(1)
IMAGES, LABELS = torch.randn(12, 3, 8, 8, generator=GENERATOR), torch.arange(12) % 5
BATCHES = [(IMAGES[i : i + 4], LABELS[i : i + 4]) for i in (0, 4, 8)]
STEPS = 6


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return {"pixel_values": IMAGES[i], "labels": int(LABELS[i])}


def adapted():
    torch.manual_seed(0)
    return get_peft_model(ConvNet(nn.BatchNorm2d), SurgicalConfig(target="all"))


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def deltas(model):
    return {name: tensor.parameter.detach().clone() for name, tensor in trained_tensors(model).items()}


def scores(model, batches):
    return {name: dict(score_blocks(model, batches, name, None).tensor_scores) for name in CRITERIA}


def gradually(model, optimizer, images, labels, backward):
    """Gradual unfreezing; the deltas after each step."""
    model.train()
    order = gradual_unfreezing(anatomy_of(ConvNet(nn.BatchNorm2d)))
    pace = Pace(model, optimizer, order, total_steps=STEPS)
    found = []
    for epoch in range(STEPS):
        pace.start_epoch(epoch)
        backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        found.append(deltas(model))
    return found


def auto_rgn(model, optimizer, batches, images, labels, backward):
    """Auto-RGN for three epochs of one step; the factors of each, and the deltas at the end."""
    model.train()
    pace = Pace(model, optimizer, AutoRGN(), total_steps=3, num_batches=2 * len(BATCHES))
    for epoch in range(3):
        pace.start_epoch(epoch, batches)
        backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    return pace.record, deltas(model)


def by_trainer(folder):
    """Trainer's DDP, with every parameter's gradient expected; the factors of each epoch and the deltas."""
    model = adapted()
    trainer = ClassifierTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=2,
            per_device_train_batch_size=3,
            use_cpu=True,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Rows(),
        optimizers=(adam(model), None),
        callbacks=[SurgicalCallback(AutoRGN())],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry[RECORD] for entry in trainer.state.log_history if RECORD in entry], deltas(model)


def work(rank, folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    # The first process has two batches and the second one, or none at all.
    found = {"scores": scores(adapted(), BATCHES[rank::2]), "alone": scores(adapted(), BATCHES if rank == 0 else [])}
    own = IMAGES[rank::2], LABELS[rank::2]
    for kind in ("gradually", "auto_rgn"):
        model = adapted()
        model, optimizer = accelerator.prepare(model, adam(model))
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        assert not model.find_unused_parameters
        if kind == "gradually":
            found[kind] = gradually(model, optimizer, *own, accelerator.backward)
        else:
            found[kind] = auto_rgn(model, optimizer, BATCHES[rank::2], *own, accelerator.backward)
        assert unwrapped(model) is not model
    found["trainer"] = by_trainer(f"{folder}/trainer")
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert run(work, str(folder), processes=2) == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", ["scores", "alone"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_those_of_all_batches_in_one_process(ranks, case, criterion):
    wanted = scores(adapted(), BATCHES)[criterion]
    first, second = (found[case][criterion] for found in ranks)
    assert first == second
    assert first == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert any(wanted.values())


def test_gradual_unfreezing_under_ddp_is_that_of_one_process(ranks):
    model = adapted()
    alone = gradually(model, adam(model), IMAGES, LABELS, torch.Tensor.backward)
    for first, second, wanted in zip(ranks[0]["gradually"], ranks[1]["gradually"], alone, strict=True):
        assert equal(first, second)
        for name, value in wanted.items():
            assert torch.allclose(first[name], value, atol=1e-5), name
    moved = [{name.split(".")[0] for name, value in after.items() if value.any()} for after in ranks[0]["gradually"]]
    trunk = {"conv1", "bn1", "layer1"}  # two steps for each of head, block2, block1
    assert moved == [{"fc"}] * 2 + [{"fc", "layer2"}] * 2 + [{"fc", "layer2", *trunk}] * 2


def test_auto_rgns_factors_are_the_same_on_all_processes_and_those_of_one(ranks):
    (first, one), (second, other) = (found["auto_rgn"] for found in ranks)
    assert first == second
    assert equal(one, other)
    model = adapted()
    wanted, final = auto_rgn(model, adam(model), BATCHES, IMAGES, LABELS, torch.Tensor.backward)
    assert sorted(first) == [0, 1, 2]
    for epoch, factors in wanted.items():
        assert first[epoch] == pytest.approx(factors, rel=1e-2, abs=1e-4)
    assert first[0] == pytest.approx(wanted[0], rel=1e-4)  # later ones inherit the rounding of the steps before
    for name, value in final.items():
        assert torch.allclose(one[name], value, atol=1e-4), name


def test_in_trainer_all_processes_agree(ranks):
    (first, one), (second, other) = (found["trainer"] for found in ranks)
    assert len(first) == 2
    assert first == second
    assert first[0] != first[1]
    assert equal(one, other)
    assert any(value.any() for value in one.values())
