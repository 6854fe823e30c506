"""The mean of the weights at the ends of the last epochs of a run, in place of the weights of one epoch.

With a few dozen validation images, the epoch of the highest accuracy is chosen by chance more than by merit, and the
weights of any one epoch jitter. Their mean over the end of a run at a constant rate (Polyak and Juditsky 1992, Izmailov
et al. 2018) is steadier and needs no validation image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

FILE = "mean.safetensors"
"""File in a checkpoint's folder with the sums so far."""
_COUNT = "epochs"


class MeanOfLastEpochs(TrainerCallback):
    """Adds up the trained parameters at the end of each epoch of the second half of a run; `put` writes their mean.

    Args:
        epochs: Length of the run. The last ``(epochs + 1) // 2`` epochs count.
    """

    def __init__(self, epochs: int) -> None:
        self.after = epochs // 2
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback. A run that goes on takes over the sums of its checkpoint."""
        file = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FILE)
        if state.global_step and file.is_file():
            self.sums = load_file(file)
            self.count = int(self.sums.pop(_COUNT))

    @torch.no_grad()
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        if round(state.epoch) <= self.after:
            return
        self.count += 1
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad:
                value = parameter.detach().float().cpu()
                self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        if self.count and args.should_save:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            save_file({**self.sums, _COUNT: torch.tensor(self.count)}, folder / FILE)

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        """Write the mean into the trained parameters of the model."""
        for name, parameter in model.named_parameters():
            if name in self.sums:
                parameter.copy_(self.sums[name] / self.count)
