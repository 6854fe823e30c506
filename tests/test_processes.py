"""Launches that would train otherwise than was asked for are refused; one process is one device."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from launching import environment
from tiny import ConvNet
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from peft_surgical.errors import ConfigError
from peft_surgical.training.engines import check_launch, check_sharding, sharding
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.trainer import settle

pytestmark = pytest.mark.usefixtures("quick_collections", "own_accelerate_state")


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i % 5}


def train(folder=None, callbacks=(), **settings):
    settings = FitSettings(**{"lr": 0.01, "epochs": 1, "batch_size": 2, "use_cpu": True, **settings})
    return fit(ConvNet(nn.BatchNorm2d), "head", Rows(), Rows(), settings, folder=folder, callbacks=callbacks)


def of(kind, **how):
    """What TrainingArguments knows of a launch with two processes."""
    state = SimpleNamespace(distributed_type=kind)
    return SimpleNamespace(
        **{"world_size": 2, "mixed_precision": "no", "fsdp": None, "deepspeed": None, "distributed_state": state, **how}
    )


# --- refused by fit ---


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, tmp_path):
    # As without an accelerator, unless the run is told to use the CPU.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were launched and each would train alone.*ACCELERATE_USE_CPU"):
        train(tmp_path, use_cpu=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("told_by_launch", "precision"), [("bf16", None), ("fp16", None)])
def test_a_precision_that_only_the_launcher_knows_is_refused(told_by_launch, precision, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told_by_launch)
    with pytest.raises(ConfigError, match=f"mixed_precision={told_by_launch}, and the run precision=None"):
        train(precision=precision)


def test_the_runs_own_precision_counts(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what `accelerate launch` sets if it is told nothing
    dtypes = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            hook = lambda module, inputs, output: dtypes.append(output.dtype)  # noqa: E731
            kwargs["model"].get_base_model().fc.register_forward_hook(hook)

    train(precision="bf16", callbacks=[Look()])
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("config", ["fsdp2.yaml", "zero2.yaml"])
def test_shards_on_the_cpu_are_refused_where_accelerate_would_leave_them_out(config, monkeypatch, tmp_path):
    if config == "zero2.yaml":
        pytest.importorskip("deepspeed")
    for name, value in environment(config).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"Accelerate has no (FSDP|DeepSpeed) on the CPU.*cpu\.yaml"):
        train(tmp_path)


def test_shards_without_a_folder_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"with FSDP the best epoch can only be found again .*: give a folder"):
        train()


# --- refused by the checks ---


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "FSDP1 cannot give back .* --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP1 cannot give back"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {},
            r"ZeRO-3 cuts up .*zero2\.yaml",
        ),
        ({}, {"fsdp": True}, "tell `accelerate launch`"),
        ({}, {"deepspeed": {"zero_optimization": {}}}, "tell `accelerate launch`"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(variables, arguments, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_launch(of(DistributedType.MULTI_GPU, **arguments), None)


@pytest.mark.parametrize("config", ["multi_gpu.yaml", "fsdp2.yaml", "zero2.yaml"])
def test_the_recipes_launches_are_allowed(config, monkeypatch):
    for name, value in environment(config).items():
        monkeypatch.setenv(name, value)
    assert sharding() == {"multi_gpu.yaml": None, "fsdp2.yaml": "FSDP", "zero2.yaml": "DeepSpeed"}[config]
    check_launch(of(DistributedType.MULTI_GPU), None)
    check_sharding("block1", "folder", paced=False, driven=False, clips=True)


@pytest.mark.parametrize(
    ("kind", "what", "message"),
    [
        ("FSDP", {"paced": True, "driven": True, "clips": False}, "auto-rgn scores whole gradients, and FSDP leaves"),
        (
            "DEEPSPEED",
            {"paced": True, "driven": True, "clips": False},
            "auto-rgn scores whole gradients, and DeepSpeed",
        ),
        ("DEEPSPEED", {"paced": True, "driven": False, "clips": False}, "auto-rgn paces torch's optimizers, not Deep"),
        (
            "FSDP",
            {"paced": True, "driven": False, "clips": True},
            "what auto-rgn has frozen would count in max_grad_norm",
        ),
    ],
)
def test_a_method_that_cannot_be_sharded_is_refused(kind, what, message, monkeypatch):
    check_sharding("auto-rgn", None, **what)  # without shards all of them can be
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ConfigError, match=message):
        check_sharding("auto-rgn", "folder", **what)


# --- one process ---


def test_a_process_that_sees_several_gpus_uses_one(monkeypatch):
    """Trainer would spread its batches over all of them, so that a batch is twice as large."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(args.train_batch_size)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    train(use_cpu=torch.accelerator.is_available(), callbacks=[Count()])
    assert steps == [2] * 4


def test_alone_there_is_nothing_to_agree_on():
    network = ConvNet(nn.BatchNorm2d)
    before = network.fc.weight.detach().clone()
    settle(network, ConvNet(nn.BatchNorm2d), ["fc.weight"])
    assert torch.equal(network.fc.weight, before)
