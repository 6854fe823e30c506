"""A surgical adapter as a standard LoRA adapter, for PEFT without this package and for servers that know only LoRA.

Each delta of a linear map or convolution becomes two factors (`low_rank`). What has none is kept as PEFT can keep it
beside LoRA: a bias as the bias of ``lora_B``, other modules (norms, grouped convolutions) whole. What PEFT has no place
for is named.

`peft.tuners.lora.conversion.convert_to_lora` is not used, as it converts a live model all or nothing: it refuses one
with any module but linear ones, and any bias, and gives zero deltas factors of the full rank. What remains of it is the
singular value decomposition, to which `low_rank` is compared in the tests.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..errors import AdapterError
from ..folders import commit, staging
from ..keys import PEFT_PREFIX, join
from ..tuner.attach import bare, base_value, surgical_layers
from ..tuner.base import recorded_base
from ..tuner.plan import check_fingerprint, make_plan
from .adapter import Adapter, AdapterSource, new_folder, read_adapter
from .low_rank import LoraPlan, as_matrix, lora_config, lora_tensors, low_rank, plan_lora


@dataclass(frozen=True)
class Converted:
    """One tensor of the adapter, and what became of it.

    Attributes:
        name: The tensor.
        kept: ``"factors"``, ``"bias"`` (of ``lora_B``), ``"whole"`` (its module, by ``modules_to_save``), or
            ``"nothing"``.
        rank: Rank of the factors, at most ``full_rank``; None without factors.
        full_rank: The rank at which factors are exact.
        norm: L2 norm of the delta, times its scale.
        error: ||delta - what was kept|| / ||delta||, in [0, 1]: the relative error in Frobenius norm.
    """

    name: str
    kept: str
    rank: int | None
    full_rank: int | None
    norm: float
    error: float


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA adapter made of a surgical one.

    Attributes:
        name: The surgical adapter's.
        config: For PEFT.
        tensors: By PEFT's keys.
        rows: What became of each delta.
        left_out: The tensors, statistics included, of which nothing was kept.
        bytes_before: Size of the deltas and values.
        metric_before: What ``evaluate`` says of the surgical adapter; None without it.
        metric_after: The same of the LoRA adapter.
    """

    name: str
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    rows: tuple[Converted, ...] = field(repr=False)
    left_out: tuple[str, ...]
    bytes_before: int
    metric_before: float | None = None
    metric_after: float | None = None

    @property
    def error(self) -> float:
        """Relative error of all deltas as one vector, what is left out included."""
        total = math.sqrt(sum(row.norm**2 for row in self.rows))
        return math.sqrt(sum((row.norm * row.error) ** 2 for row in self.rows)) / total if total else 0.0

    @property
    def bytes(self) -> int:
        """Size of the LoRA tensors."""
        return _bytes(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        facts = {name: getattr(self, name) for name in ("name", "error", "bytes", "bytes_before")}
        facts |= {"metric_before": self.metric_before, "metric_after": self.metric_after}
        return {**facts, "left_out": list(self.left_out), "tensors": [asdict(row) for row in self.rows]}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a new folder, from which PEFT loads it without this package.

        Raises:
            AdapterError: If there is something at that place already.
        """
        target = new_folder(folder)
        with staging(target) as stage:
            save_file(dict(self.tensors), stage / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            self.config.save_pretrained(str(stage))
            commit(stage, target)


def to_lora(
    source: AdapterSource,
    base: nn.Module | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keep: bool = True,
    evaluate: Callable[[nn.Module], float] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> LoraConversion:
    """Write an adapter as LoRA, ``W + B @ A``, module by module.

    ::

        found = to_lora("site-a", base, energy=0.95, output="site-a-lora")
        print(found.error, found.left_out)
        PeftModel.from_pretrained(base, "site-a-lora")      # without this package, too

    Exact, up to rounding, at the full rank or with ``energy=1.0``, but for what is left out.

    Args:
        source: A folder, a Hub id, or an adapter of a live model; see `read_adapter`.
        base: Its base, which is left as it is. A live model brings its own.
        rank: Rank of the factors; those of a smaller matrix have its full rank.
        energy: Instead: each delta gets the smallest rank that holds this share of its squared norm, in (0, 1].
        keep: Keep what has no factors, by ``lora_bias`` and ``modules_to_save``. False leaves it out, for servers that
            read factors only.
        evaluate: Called with the tuned network and with the LoRA model, both in ``eval()``; returns a metric, such as
            the accuracy. Takes the memory of two copies of the base.
        output: A new folder to save the result to.

    Raises:
        AdapterError: For a rank or energy out of range, an adapter of which nothing has factors, or no base.
        BaseMismatchError: The base is another one.
    """
    _check_amount(rank, energy)
    network = _network_of(source, base)
    adapter = read_adapter(source)
    plan = make_plan(network, adapter.config)
    check_fingerprint(plan, adapter.config, recorded_base(network))
    deltas = adapter.scaled()
    moved = {name for name, delta in deltas.items() if delta.any()} | set(adapter.statistics)
    chosen = plan_lora(network, plan, moved, adapter.config.modules_to_save or (), keep)
    if not chosen.factors:
        raise AdapterError(
            f"{adapter.label} tunes nothing that has factors (the weights of linear maps, plain convolutions and "
            "embeddings). Share it as it is, or merged into its base."
        )
    tensors, factors = _factorise(chosen, deltas, rank, energy)
    whole = {
        join(path, name): value.cpu().clone()
        for path in chosen.whole
        for name, value in _tuned_copy(network, path, adapter).state_dict().items()
    }
    tensors |= {PEFT_PREFIX + name: value for name, value in {**whole, **adapter.whole}.items()}
    ranks = {name.removesuffix(".weight"): row.rank or 0 for name, row in factors.items()}
    config = lora_config(adapter.config, chosen, ranks, network, rank)
    rows = []
    for name, delta in deltas.items():
        norm = float(delta.double().norm())
        kept = "whole" if name in whole else "nothing" if norm == 0 or name in chosen.nothing else "bias"
        other = Converted(name, kept, None, None, norm, float(kept == "nothing" and norm > 0))
        rows.append(factors.get(name, other))
    before = after = None
    if evaluate is not None:
        before = float(evaluate(_tuned_copy(network, "", adapter).eval()))
        after = float(evaluate(_lora_model(network, config, tensors).eval()))
    size = _bytes(adapter.state_dict())
    found = LoraConversion(adapter.label, config, tensors, tuple(rows), chosen.nothing, size, before, after)
    if output is not None:
        found.save(output)
    return found


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _check_amount(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise AdapterError(f"rank={rank} and energy={energy}: give one of them.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank={rank}: give a whole number from 1 up.")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"energy={energy}: give a share of the squared norm in (0, 1].")


def _network_of(source: AdapterSource, base: nn.Module | None) -> nn.Module:
    model = source[0] if isinstance(source, tuple) else source
    if isinstance(model, PeftModel):
        network = model.get_base_model()
        if any(layer.merged_adapters for _, layer in surgical_layers(network)):
            raise AdapterError("An adapter is merged into this model: call model.unmerge_adapter() first.")
        return network
    if base is None:
        raise AdapterError(
            "No base: norms are saved whole and convolutions have a geometry, which only the base knows. Pass it as "
            "to_lora(adapter, base, ...)."
        )
    return base


def _factorise(
    chosen: LoraPlan, deltas: Mapping[str, torch.Tensor], rank: int | None, energy: float | None
) -> tuple[dict[str, torch.Tensor], dict[str, Converted]]:
    """The tensors of all factors, and name of each weight -> what became of it."""
    tensors: dict[str, torch.Tensor] = {}
    rows: dict[str, Converted] = {}
    for path, entry in chosen.factors.items():
        name = join(path, "weight")
        shape = base_value(entry.module, "weight").shape
        # A module whose bias alone moved has factors, too: of rank 1, and zero.
        matrix = as_matrix(entry.module, deltas.get(name, torch.zeros(shape)))
        a, b = low_rank(matrix, *((rank, energy) if matrix.any() else (1, None)))
        tensors |= lora_tensors(path, entry.module, shape, a, b)
        if chosen.bias:
            bias = deltas.get(join(path, "bias"))
            tensors[f"{PEFT_PREFIX}{path}.lora_B.bias"] = torch.zeros(len(b), dtype=b.dtype) if bias is None else bias
        norm, lost = (float(part.double().norm()) for part in (matrix, matrix - b @ a))
        rows[name] = Converted(name, "factors", len(a), min(matrix.shape), norm, lost / norm if norm else 0.0)
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, rows


def _tuned_copy(network: nn.Module, path: str, adapter: Adapter) -> nn.Module:
    """A copy of one of the base's modules, with the values that a forward with the adapter reads in it."""
    with bare(network):
        module = copy.deepcopy(network.get_submodule(path))
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(adapter.tuned(join(path, name), tensor))
    return module


def _lora_model(network: nn.Module, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    with bare(network):
        plain = copy.deepcopy(network)
    plain.__dict__.pop("peft_config", None)  # where PEFT notes the adapters that a live model has
    model = get_peft_model(plain, copy.deepcopy(config))
    set_peft_model_state_dict(model, dict(tensors))
    return model
