"""What a network says about a set of inputs, whatever mode it is in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def predict_logits(model: nn.Module, inputs: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (n, classes) on the CPU, computed in ``eval()`` without gradients; the modes are restored after.

    Args:
        model: Maps a batch of inputs to logits (n, classes), or returns them as ``.logits``.
        inputs: (n, ...) on any device; moved to the model's, batch by batch.
        batch_size: Part of the arithmetic: kernels may differ in the last bit between batch sizes, so compare logits
            bit for bit only at the same one.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            outputs = [model(batch.to(device)) for batch in inputs.split(batch_size)]
    finally:
        # Module by module: a single train() would also wake modules that their owner had put into eval.
        for module, training in modes.items():
            module.training = training
    return torch.cat([getattr(output, "logits", output).cpu() for output in outputs])
