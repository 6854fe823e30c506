"""Test-time adaptation: MEMO and TENT, on exactly the tensors of an adapter, without labels.

Adapting all parameters to a stream of unlabelled images drifts and can destroy a network; adapting its first layer
keeps improving it (Lee et al. 2023, Sec. 2.2, Table 9)::

    model = get_peft_model(network, SurgicalConfig(target="stem"))
    memo = Memo(model, lr=1e-3, preprocess=normalize)
    logits = memo(images)  # (n, classes), one image after the other
    model.save_pretrained("site-a")  # what was learnt is an adapter like any other

The views of an image are predicted in one forward and one backward, and the image itself in one forward without a
graph, after the step. Autograd records nothing before the first tensor that moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..choosing.models import logits_of
from ..errors import ConfigError, TargetError
from .batchnorm import batch_statistics, batchnorms, is_owned, mixed_statistics, prior_share
from .streams import COLLAPSE_WINDOW, Stream, evaluating
from .views import AugMix, Views, generator_at


def log_marginal(logits: Tensor) -> Tensor:
    """Log of the mean probability over views: (views, classes) -> (classes,)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the mean prediction over views (Zhang et al. 2022, eq. 2-3): (views, classes) -> ().

    It is low where the views agree and the agreement is confident.
    """
    log_p = log_marginal(logits)
    return -(log_p.exp() * log_p).sum()


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean over a batch of the entropy in nats of each prediction (Wang et al. 2021, Sec. 3.1): (n, classes) -> ()."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def norm_target(network: nn.Module) -> list[str]:
    """The target that TENT adapts: scale and shift of every normalisation (Wang et al. 2021, Sec. 3.2).

    A glob does the same where norms are named after what they are: ``"*norm*"`` for most transformers. In timm's
    ResNets ``"*bn*"`` leaves out the norms of the shortcuts and of deep stems, which are numbered.

    Args:
        network: A network without an adapter.

    Returns:
        Tensor names, to be used as ``SurgicalConfig(target=norm_target(network))``.

    Raises:
        TargetError: If no normalisation has a scale or shift.
    """
    kinds = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm2d)
    names = [
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, kinds) or type(module).__name__.endswith(("Norm", "Norm2d", "NormAct", "NormAct2d"))
        for name in ("weight", "bias")
        if isinstance(getattr(module, name, None), nn.Parameter)
    ]
    if not names:
        raise TargetError("no normalisation of this network has a scale or shift: TENT needs another target, e.g. stem")
    return names


class Memo(Stream):
    """MEMO (Zhang, Levine and Finn 2022): make the views of an image agree, then predict it.

    For each image: ``steps`` times, make views, and step down the entropy of their mean prediction; then predict the
    image as it is. The network is in ``eval()`` throughout, as in the published code: no dropout, and BatchNorms use
    the source's statistics (or a mixture, see ``prior_strength``). No running statistic moves under any norm policy.

    Args:
        model: A PeftModel whose surgical adapter is active and trainable. Its deltas need not be zero: a trained
            adapter is adapted further.
        views: How many views `AugMix` makes of an image; or a callable that makes them, as `views.Views` says.
        steps: Optimizer steps per image; each has views of its own.
        optimizer: ``sgd`` (no momentum), ``adam`` or ``adamw``. MEMO on CIFAR-10: ``sgd`` with lr 0.005, all tensors.
        lr: Learning rate, absolute.
        weight_decay: Acts on the deltas, so it pulls towards the pretrained weights.
        episodic: Put everything back after every image, bit for bit (MEMO as published). Otherwise online: what was
            learnt stays (Lee et al. 2023, Sec. 2.2).
        preprocess: Images (n, c, h, w) in [0, 1] -> the network's input; None for the images themselves.
        prior_strength: For BatchNorms, N of `mixed_statistics`; None for the source's statistics.
        seed: Seed of the views, which depend on it and on the position in the stream alone.
        collapse_window: Number of predictions in a row that are a collapse if they are one class; 0 not to look.
        reset_on_collapse: Whether a collapse puts the deltas and the optimizer back to the start.

    Raises:
        ConfigError: For a setting that is out of range.
        AdapterError: If nothing of the model can move.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        views: int | Views = 32,
        steps: int = 1,
        optimizer: str = "sgd",
        weight_decay: float = 0.0,
        episodic: bool = False,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        prior_strength: float | None = None,
        seed: int = 0,
        collapse_window: int = COLLAPSE_WINDOW,
        reset_on_collapse: bool = False,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            steps=steps,
            optimizer=optimizer,
            weight_decay=weight_decay,
            episodic=episodic,
            preprocess=preprocess,
            collapse_window=collapse_window,
            reset_on_collapse=reset_on_collapse,
        )
        if seed < 0:
            raise ConfigError(f"seed={seed}: give 0 or more")
        self.views: Views = AugMix(views) if isinstance(views, int) else views
        self.prior_strength, self.seed = prior_strength, seed
        if prior_strength is not None:
            prior_share(prior_strength)  # refused here rather than at the first image

    def __call__(self, images: Tensor) -> Tensor:
        """Adapt to and predict one image after the other.

        Args:
            images: (n, c, h, w), floats in [0, 1]; on any device.

        Returns:
            Logits (n, classes) on the model's device, each after the steps on its own image.

        Raises:
            DataError: For images of another form.

        Warns:
            CollapseWarning: If all predictions of a window have become one class.
        """
        images = self.received(images)
        logits = []
        prior = self.prior_strength
        with evaluating(self.model), nullcontext() if prior is None else mixed_statistics(self.model, prior):
            for image in images:
                generator = generator_at(self.seed, self.position)
                try:
                    for _ in range(self.steps):
                        with torch.no_grad():
                            inputs = self.preprocess(self.views(image, generator))
                        with torch.enable_grad():
                            loss = marginal_entropy(_wide(logits_of(self.model(inputs))))
                        self.step(loss)
                    with torch.no_grad():
                        logits.append(logits_of(self.model(self.preprocess(image[None]))))
                finally:
                    if self.episodic:
                        self.restore()
                self.predicted(logits[-1])
        return torch.cat(logits) if logits else images.new_zeros(0, 0)

    @property
    def keeps_statistics(self) -> bool:
        """Whether a saved adapter normalises as the predictions did: not with a ``prior_strength``, in a BatchNorm."""
        return self.prior_strength is None or not batchnorms(self.model)


class Tent(Stream):
    """TENT (Wang et al. 2021): step down the mean entropy of each batch, and predict from the same forward.

    The target is the scale and shift of every normalisation: ``SurgicalConfig(target=norm_target(network))``; any other
    works, too. BatchNorms normalise with the statistics of the batch, so batches should be large and mixed. Running
    statistics stay as they are unless the adapter owns them (``norm_stats="target"`` or ``"all"``), in which case they
    follow the batches and are saved with it. With ``norm_stats="frozen"`` a saved adapter holds scale and shift alone:
    predict with it within `batch_statistics`, as it was adapted.

    A departure from the published code: dropout is off, where it is in ``train()``.

    Args:
        model: As for `Memo`.
        lr: Learning rate, absolute. The paper: 1e-3 with Adam for batches of 200 CIFAR images.
        steps: Optimizer steps per batch; the predictions are from the forward of the last.
        optimizer: ``adam``, or as for `Memo`.
        episodic: Put everything back after every batch, bit for bit.
        weight_decay: As for `Memo`.
        preprocess: As for `Memo`.
        collapse_window: As for `Memo`.
        reset_on_collapse: As for `Memo`.

    Raises:
        ConfigError: For a setting that is out of range.
        AdapterError: If nothing of the model can move.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Adapt to and predict one batch.

        Args:
            images: (n, c, h, w), floats in [0, 1]; on any device.

        Returns:
            Logits (n, classes) on the model's device, from before the last step.

        Raises:
            DataError: For images of another form.

        Warns:
            CollapseWarning: If all predictions of a window have become one class.
        """
        images = self.received(images)
        if not len(images):
            return images.new_zeros(0, 0)
        with evaluating(self.model), batch_statistics(self.model), torch.enable_grad():
            try:
                for _ in range(self.steps):
                    logits = logits_of(self.model(self.preprocess(images)))
                    self.step(mean_entropy(_wide(logits)))
            finally:
                if self.episodic:
                    self.restore()
        self.predicted(logits.detach())
        return logits.detach()

    @property
    def keeps_statistics(self) -> bool:
        """Whether a saved adapter has statistics of the stream for every BatchNorm: all belong to the adapter."""
        return all(map(is_owned, batchnorms(self.model)))


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: an entropy in bfloat16 has two digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
