"""The config files of `accelerate launch`, and launches with them for real, as far as they go without a GPU."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from launched.tune import tune
from launching import CONFIGS, environment, launched
from safetensors.torch import load_file
from tiny import ConvNet
from torch import nn

from peft_surgical import anatomy_of
from peft_surgical.choosing.methods import METHODS

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "launched" / "tune.py"
LAUNCHERS = {
    "one_gpu.yaml": "simple_launcher",
    "multi_gpu.yaml": "multi_gpu_launcher",
    "multi_node.yaml": "multi_gpu_launcher",
    "fsdp2.yaml": "multi_gpu_launcher",
    "zero2.yaml": "deepspeed_launcher",
    "cpu.yaml": "multi_gpu_launcher",
}
DOCS = (CONFIGS / "README.md", ROOT / "docs" / "accelerate.md")
LIMIT = 600
"""Seconds for one launch; each process imports torch and transformers first."""


# --- the files ---


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerate_knows_every_field(name):
    config = load_config_from_file(str(CONFIGS / name))  # refuses unknown fields
    assert isinstance(config, ClusterConfig)
    known = {action.dest for action in launch.launch_command_parser()._actions}
    for field in dataclasses.fields(config):
        nested = getattr(config, field.name)
        if isinstance(nested, dict):  # of these it refuses none
            assert set(nested) <= known
    assert config.mixed_precision == "no"  # `fit` says it


def test_all_files_are_known_here():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(LAUNCHERS)


def started(monkeypatch, *arguments):
    """Which of Accelerate's launchers a command uses."""
    found = []
    for name in set(LAUNCHERS.values()):
        monkeypatch.setattr(launch, name, lambda args, name=name: found.append((name, args)))
    launch.launch_command(launch.launch_command_parser().parse_args([*arguments, "script.py"]))
    return found[0]


@pytest.mark.parametrize(("name", "launcher"), LAUNCHERS.items())
def test_each_file_uses_its_launcher(name, launcher, monkeypatch):
    found, args = started(monkeypatch, "--config_file", str(CONFIGS / name))
    assert found == launcher
    assert args.num_processes == {"one_gpu.yaml": 1, "multi_node.yaml": 8}.get(name, 2)


@pytest.mark.parametrize("arguments", [["--cpu", "--num_processes", "2"], ["--config_file", "multi_cpu.yaml"]])
def test_why_cpu_processes_are_launched_as_if_on_gpus(arguments, monkeypatch, tmp_path):
    """`--cpu` and MULTI_CPU start one process, unless there is an MPI."""
    config = (CONFIGS / "cpu.yaml").read_text().replace("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU")
    (tmp_path / "multi_cpu.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    found, args = started(monkeypatch, *arguments)
    assert (found, args.num_processes) == ("simple_launcher", 2)
    command, variables = launch.prepare_simple_launcher_cmd_env(args)
    assert "WORLD_SIZE" not in variables
    assert command == [sys.executable, "script.py"]


def test_fsdp2_is_told_to_the_processes():
    found = environment("fsdp2.yaml")
    assert found["ACCELERATE_USE_FSDP"] == "true"
    assert found["FSDP_VERSION"] == "2"
    assert found["FSDP_AUTO_WRAP_POLICY"] == "NO_WRAP"
    assert found["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert load_config_from_file(str(CONFIGS / "fsdp2.yaml")).distributed_type == DistributedType.FSDP


def test_zero2_is_told_to_the_processes_and_leaves_the_rest_to_the_run():
    found = environment("zero2.yaml")
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert found["ACCELERATE_GRADIENT_CLIPPING"] == "auto"


def test_each_machine_gives_its_rank():
    args = launched("multi_node.yaml", "--machine_rank", "1", "--main_process_ip", "127.0.0.2")
    launch.prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "4", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "127.0.0.2:29500")


def test_the_table_says_which_methods_can_be_sharded():
    anatomy = anatomy_of(ConvNet(nn.BatchNorm2d))
    lines = (CONFIGS / "README.md").read_text(encoding="utf-8").splitlines()
    fsdp2, zero2 = (next(line for line in lines if f"[`{name}`]" in line) for name in ("fsdp2.yaml", "zero2.yaml"))
    for name, row in METHODS.items():
        schedule = row.schedule(anatomy, dict(row.options)) if row.schedule else None
        driven = schedule is not None and schedule.criterion is not None
        paced = bool(schedule or row.penalty or row.reset_moments)
        assert (f"`{name.removesuffix('-reference')}`" in fsdp2) == driven  # all but
        assert (f"`{name}`" in zero2) == (not paced and not row.solved)


def commands(text):
    """Every `accelerate launch` of a text, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if re.match(r" {4,}(\w+=\S+ )*accelerate launch ", line)]


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_the_commands_in_the_texts_can_be_parsed(file):
    found = commands(file.read_text(encoding="utf-8"))
    assert found
    for command in found:
        words = shlex.split(command)
        args = launch.launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        assert args.config_file is None or (ROOT / args.config_file).is_file(), command
        assert args.training_script.startswith("tests/") or Path(args.training_script).parts[0] == "recipes", command
        assert (ROOT / args.training_script).is_file(), command


# --- for real ---


def start(output, *arguments, options=(), config="cpu.yaml"):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "home")}
    return subprocess.Popen(
        [*command, str(SCRIPT), str(output), *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*launches):
    """Exit codes and outputs; nothing of them is left running."""
    try:
        return [(one.communicate(timeout=LIMIT)[0], one.returncode) for one in launches]
    finally:
        for one in launches:
            one.terminate()  # what is still running ends its workers, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)


def outcome(output, processes=2):
    """What both processes have, which must be the same."""
    found = [json.loads((output / f"process{rank}.json").read_text()) for rank in range(processes)]
    assert found[0]["processes"] == processes
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes under `accelerate launch`."""
    output = tmp_path_factory.mktemp("two")
    ((text, code),) = finish(start(output, "--cpu"))
    assert code == 0, text
    return output


def as_alone(found, tmp_path):
    wanted, _ = tune(tmp_path / "alone")
    assert found["curve"] == list(wanted.curve)
    assert found["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    return wanted


@pytest.mark.slow
def test_a_launch_of_two_processes_is_the_run_of_one(two, tmp_path):
    wanted = as_alone(outcome(two), tmp_path)
    wanted.model.save_pretrained(tmp_path / "adapter")
    saved, alone = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, tmp_path))
    assert saved.keys() == alone.keys()
    assert all((saved[key] - alone[key]).abs().max() < 1e-5 for key in alone)
    assert any(value.any() for value in alone.values())


@pytest.mark.slow
def test_a_launch_that_is_killed_goes_on_to_the_same_bytes(two, tmp_path):
    ((text, code),) = finish(start(tmp_path, "--cpu", "--kill-at", "5"))
    assert code != 0
    assert "SIGKILL" in text
    assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "checkpoints" / "checkpoint-3").is_dir()
    ((text, code),) = finish(start(tmp_path, "--cpu"))
    assert code == 0, text
    assert outcome(tmp_path) == outcome(two)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.slow
def test_two_machines_are_one_run(two, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launches = [
        start(tmp_path, "--cpu", options=[*common, "--machine_rank", str(rank)], config="multi_node.yaml")
        for rank in (0, 1)
    ]
    for text, code in finish(*launches):
        assert code == 0, text
    assert outcome(tmp_path) == outcome(two)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2.yaml", "zero2.yaml"])
def test_a_sharded_launch_is_the_run_of_one_process(config, tmp_path):
    if config == "zero2.yaml":
        pytest.importorskip("deepspeed")
    ((text, code),) = finish(start(tmp_path, "--shards", config=config))
    assert code == 0, text
    as_alone(outcome(tmp_path), tmp_path)


@pytest.mark.slow
def test_a_launch_that_cannot_train_together_says_so(tmp_path):
    ((text, code),) = finish(start(tmp_path))  # neither --cpu nor ACCELERATE_USE_CPU
    assert code != 0
    assert "2 processes were launched and each would train alone" in text
