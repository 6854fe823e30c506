"""From the names of two checkpoints to an adapter in a folder, with the record of its base and its knock-out curve."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ..adapters.adapter import new_folder
from ..adapters.extract import Extraction, extract_adapter
from ..adapters.knockout import KnockOut, knock_out
from ..bases.load import Base, load_base
from ..data.labelled import collate, read_data
from ..errors import AdapterError
from ..experiment.subject import Rows
from ..extras import accelerator_or_cpu
from ..files import file_sha256
from ..keys import WEIGHTS
from ..tuner.saving import write_card
from .pulling import attached
from .records import dtype_of, fingerprint_without_whole, record_of, write_record


@dataclasses.dataclass(frozen=True)
class Extracted:
    """An adapter that was extracted to a folder.

    Attributes:
        extraction: The adapter, and how far each block moved.
        curve: Accuracy with each block's deltas taken away; empty without data.
        part: The images of the curve, in words.
    """

    extraction: Extraction
    curve: tuple[KnockOut, ...] = ()
    part: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; intervals as [value, low, high]."""
        rows = [{"without": row.without, "accuracy": [*row.accuracy], "change": [*row.change]} for row in self.curve]
        return {**self.extraction.to_dict(), "knock_out": rows, "images": self.part}


def extract_to(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str | Sequence[str] | None = None,
    energy: float | None = None,
    delta_dtype: str | None = None,
    data: Any = None,
    reading: dict[str, Any] | None = None,
    batch_size: int = 64,
    cpu: bool = False,
) -> Extracted:
    """Open two checkpoints, write the difference as an adapter, and load it from there to see that it is exact.

    Where the tuned network has other classes than the base, the base is opened with a head of zeros, so that the
    adapter holds the whole head as its delta.

    Args:
        base: As for `load_base`.
        tuned: The same; of the base's architecture.
        output: A new folder. It gets the adapter, its page, and ``base.json``, by which `open_adapted` opens the base.
        target: As for `extract_adapter`.
        energy: As for `extract_adapter`.
        delta_dtype: As for `extract_adapter`.
        data: Labelled images, as for `read_data`, for the knock-out curve: its test part, else all images. The curve is
            too high on images that the tuned network was trained on.
        reading: Further arguments of `read_data`.
        batch_size: Images per forward pass.
        cpu: Leave an accelerator alone.

    Raises:
        AdapterError: There is something at ``output``; or as `extract_adapter`, with its other errors.
        DataError: A checkpoint or the images cannot be opened.
        ConfigError: The tuned network has not the classes of the images.
    """
    target_folder = new_folder(output)
    images = None if data is None else read_data(data, **(reading or {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The head is")  # which is compared below
        after = load_base(tuned, label_names=images.label_names, head="keep") if images else load_base(tuned)
        before, head = _base_for(base, after)
    network = before.model
    wider = torch.promote_types(_dtype(network), _dtype(after.model))
    if wider != _dtype(network):
        network.to(wider)
    found = extract_adapter(
        network, after.model, target=target, energy=energy, delta_dtype=delta_dtype, output=target_folder
    )
    config = found.adapter.config
    record = record_of(network, config)
    if record is not None:
        record = dataclasses.replace(
            record,
            label_names=after.label_names or before.label_names,
            num_classes=after.classes,
            head=head,
            fingerprint=fingerprint_without_whole(network, config),
            weights_sha256=file_sha256(target_folder / WEIGHTS),
        )
        write_record(target_folder, record)
    write_card(target_folder)
    curve: tuple[KnockOut, ...] = ()
    part = ""
    if images is not None:
        rows, part = _rows(images, after)
        curve = knock_out(network, found.adapter, _judge(rows, batch_size, accelerator_or_cpu(cpu)))
    _check(before, target_folder, found, after.model)
    return Extracted(found, curve, part)


def _base_for(name: str | os.PathLike[str], tuned: Base) -> tuple[Base, str]:
    """The base with as many outputs as the tuned network, and what became of its head."""
    found = load_base(name)
    named = None not in (found.label_names, tuned.label_names)
    other = found.classes != tuned.classes or (named and found.label_names != tuned.label_names)
    if not (found.head_is_new or other):
        return found, "keep"
    return load_base(name, tuned.classes, label_names=tuned.label_names, head="zero"), "zero"


def _dtype(network: nn.Module) -> torch.dtype:
    return getattr(torch, dtype_of(network) or "float32")


def _rows(images: Any, tuned: Base) -> tuple[Dataset[Any], str]:
    chosen = {"test": images.test} if images.test is not None else images.parts
    rows = [Rows(part, tuned.transform_eval, True, tuned.outputs) for part in chosen.values()]
    return ConcatDataset(rows), f"{' and '.join(chosen)} images"


def _judge(rows: Dataset[Any], batch_size: int, device: torch.device) -> Callable[[nn.Module], Tensor]:
    @torch.no_grad()
    def correct(network: nn.Module) -> Tensor:
        network.to(device)
        dtype = _dtype(network)
        found = []
        for batch in DataLoader(rows, batch_size, collate_fn=collate):
            outputs = network(batch["pixel_values"].to(device, dtype))
            predicted = getattr(outputs, "logits", outputs).argmax(1).cpu()
            found.append(predicted == batch["labels"])
        return torch.cat(found)

    return correct


def _check(base: Base, folder: Path, found: Extraction, tuned: nn.Module) -> None:
    """Raise `AdapterError` unless what is loaded from the folder is the tuned network, where it should be."""
    merged = attached(base, folder).merge_and_unload().state_dict()
    ours = {*found.adapter.names} - {*found.inexact}
    values = tuned.state_dict()
    wrong = [name for name in ours if not torch.equal(merged[name], values[name].to(merged[name].dtype))]
    if wrong:
        raise AdapterError(
            f"what is loaded from {folder} differs from the tuned network in {wrong[0]}: please report this, with the "
            "names of both checkpoints"
        )
