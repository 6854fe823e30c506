"""`transformers.Trainer` for image classifiers of any origin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback

from ..choosing.forward import forward_loss, logits_of


class ClassifierTrainer(Trainer):
    """Trainer for any image classifier: also those that return bare logits.

    Args:
        *args: As for Trainer.
        optimizer_of: Makes the optimizer. Unlike one that is handed over ready made, FSDP can do with it.
        **kwargs: As for Trainer.
    """

    def __init__(
        self, *args: Any, optimizer_of: Callable[[], torch.optim.Optimizer] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer_of = optimizer_of
        # The loss below is the mean over one batch, also of a network whose forward takes any keyword: Trainer is to
        # divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None):  # type: ignore[no-untyped-def]
        """See Trainer."""
        if self.optimizer is None and self.optimizer_of is not None:
            self.optimizer = self.optimizer_of()
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See Trainer, which lets the first process save alone: with FSDP the others must give their shards."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self.model.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """The model's own loss, or cross entropy; mean over the batch."""
        outputs: list[Any] = []

        def keep(given: Any, labels: Any) -> torch.Tensor:
            outputs.append(given)
            own = getattr(given, "loss", None)
            return own if own is not None else F.cross_entropy(logits_of(given).float(), labels)

        loss = forward_loss(model, inputs, keep)
        return (loss, {"logits": logits_of(outputs[0])}) if return_outputs else loss


class StopAt(TrainerCallback):
    """Stops after so many epochs of the run, at whose end Trainer evaluates and saves."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """See TrainerCallback."""
        control.should_training_stop = round(state.epoch) >= self.epoch
