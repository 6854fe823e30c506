"""Real processes for tests: several of one run, over gloo on the CPU, or one that is to be killed.

They are forked from the test's own process where that is safe, so that nothing has to be imported again.
"""

import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
# Autograd has threads for accelerators, of which a fork would keep half; macOS does not fork with its frameworks.
START = "fork" if sys.platform == "linux" and not torch.accelerator.is_available() else "spawn"
LIMIT = 300
"""Seconds after which processes count as hanging: a busy machine takes its time."""


def run(work, *given, processes=1, env=None):
    """Exit codes of ``work(rank, *given)``, a function of a test module, in so many processes.

    One process has no process group. ``env`` is what a launcher sets; where it asks for shards, Accelerate is made to
    take the CPU for an accelerator, because on its own it has FSDP2 and ZeRO there alone.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a port of the system's choice
    context = multiprocessing.get_context(START)
    given = (processes, store.port, env or {}, work, given)
    started = [context.Process(target=_inside, args=(rank, *given)) for rank in range(processes)]
    try:
        for process in started:
            process.start()
        end = time.monotonic() + LIMIT
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in started]
        assert None not in codes, f"not done after {LIMIT} s"
        return codes
    finally:
        for process in started:
            if process.is_alive():
                process.kill()


def _inside(rank, processes, port, env, work, given):
    torch.set_num_threads(1)
    warnings.resetwarnings()  # pytest's filters, of the process that this one was forked from
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's, which was alone
    GradientState._reset_state()
    os.environ.update(env)
    if processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
        # The store is the parent's already, as under torchrun.
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    if {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(env):
        cpu_as_accelerator()
    work(rank, *given)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def cpu_as_accelerator():
    """Let Accelerate treat processes on the CPU as it treats those on GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)


def launched(config, *options):
    """What `accelerate launch` makes of one of the recipes' config files: its parsed arguments."""
    given = ["--config_file", str(CONFIGS / config), *options, "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


def environment(config, *options):
    """The environment variables that `accelerate launch` sets in each process for a config file."""
    arguments = launched(config, *options)
    if arguments.use_deepspeed:
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}
