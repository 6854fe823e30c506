"""A tiny run of `fit` for `accelerate launch`: writes what each process has, and the adapter.

accelerate launch --config_file recipes/accelerate/cpu.yaml tests/launched/tune.py OUTPUT --cpu
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from launching import cpu_as_accelerator
from tiny import ConvNet

from peft_surgical.training.fitting import FitSettings, fit

BATCH = 8  # of all processes together


class Rows(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.classes = torch.randint(5, (count,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": int(self.classes[i])}


class KillAt(TrainerCallback):
    """Kills the last process after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def tune(output, method="full", cpu=True, kill_at=0, batch=BATCH):
    """One run; what came of it."""
    torch.manual_seed(0)
    network = ConvNet(nn.BatchNorm2d)
    settings = FitSettings(lr=0.05, epochs=3, batch_size=batch, use_cpu=cpu)
    callbacks = [KillAt(kill_at)] if kill_at else []
    found = fit(network, method, Rows(24, 1), Rows(21, 2), settings, folder=output / "checkpoints", callbacks=callbacks)
    digest = hashlib.sha256()
    for name, value in found.model.state_dict().items():
        if "surgical_delta" in name:
            digest.update(value.cpu().numpy().tobytes())
    return found, {"curve": found.curve, "losses": found.losses, "deltas": digest.hexdigest()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", default="full")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shards", action="store_true", help="let Accelerate shard on the CPU")
    parser.add_argument("--kill-at", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.shards:
        cpu_as_accelerator()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found, said = tune(args.output, args.method, args.cpu, args.kill_at, BATCH // world)
    if rank == 0:
        found.model.save_pretrained(args.output / "adapter")
    (args.output / f"process{rank}.json").write_text(json.dumps({**said, "processes": world}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
