"""Adapters for ONNX Runtime: one graph of the base, in which a site's small file replaces tensors; and merged graphs.

The tensors that any of the adapters tunes are inputs of the graph that have the base's values unless a run gives others
(ONNX: an initializer that is an input, too). A site's file holds its tuned values, in the format of ONNX Runtime's LoRA
adapters, whose mechanism replaces inputs by name whatever they are. So a run adds nothing up and is as fast for a site
as for the base, and norm statistics, which are no deltas, are served in the same way.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, BaseMismatchError
from ..extras import require
from ..tuner.attach import bare
from ..tuner.base import recorded_base
from ..tuner.plan import check_fingerprint, make_plan
from .adapter import Adapter, AdapterSource, new_folder, read_adapter

FORMATS = ("onnx",)
PIXELS, LOGITS = "pixel_values", "logits"
BASE_GRAPH, SITES, MERGED = "base.onnx", "sites", "merged"
LOGIT_TOLERANCE = 1e-3
"""Largest difference from PyTorch's logits, relative to the largest logit, with which a graph is written."""
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written and run.

    Attributes:
        site: The adapter's name; ``""`` for the base.
        file: Its path, relative to the output folder.
        bytes: Its size.
        difference: Largest difference of ONNX Runtime's logits from PyTorch's, relative to the largest logit.
    """

    site: str
    file: str
    bytes: int
    difference: float


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote.

    Attributes:
        folder: Where.
        files: The base's graph, each site's file, and the merged graphs.
        inputs: Names of the tensors that a site's file can replace.
    """

    folder: Path
    files: tuple[ExportedFile, ...]
    inputs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"folder": str(self.folder), "files": [asdict(one) for one in self.files], "inputs": list(self.inputs)}


def export_onnx(
    base: nn.Module,
    adapters: Mapping[str, AdapterSource],
    pixel_values: Tensor,
    output: str | os.PathLike[str],
    *,
    merged: bool = False,
    label_names: Sequence[str] | None = None,
) -> OnnxExport:
    """Write a base and the adapters of its sites for ONNX Runtime, and compare what these compute with PyTorch.

    The folder gets ``base.onnx``, ``sites/NAME.onnx_adapter`` for each adapter, and ``merged/NAME.onnx`` on request.
    The graphs take ``pixel_values`` (n, 3, h, w), for any n, in float32, and return ``logits``.

    Args:
        base: The base, which is left as it is.
        adapters: Name of each site -> its adapter; see `read_adapter`.
        pixel_values: Two or more images as the network takes them, to trace and to compare with.
        output: A new folder, which appears as a whole or not at all.
        merged: Whether to write each site as a graph of its own, too.
        label_names: Names of the classes, kept in the graphs' metadata as JSON under ``label_names``.

    Raises:
        AdapterError: For names that are no file names, a folder with something in it, a network that torch.onnx does
            not export, or logits that differ from PyTorch's.
        BaseMismatchError: An adapter has another base, or holds a module of another shape whole.
        DataError: ONNX, its converter or ONNX Runtime is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "exporting to ONNX", "onnx")
    if not adapters or (wrong := [name for name in adapters if not _NAME.fullmatch(name) or name.startswith(".")]):
        raise AdapterError(
            f"{wrong[0]!r} names no site: use letters, digits, '.', '_' and '-'." if adapters else "Give an adapter."
        )
    goal = new_folder(output)
    found = {name: read_adapter(source) for name, source in adapters.items()}
    with bare(base):
        values = {name: value.detach().cpu() for name, value in base.state_dict().items()}
    sites = {name: _tuned(base, values, adapter) for name, adapter in found.items()}
    names = tuple(name for name in values if any(name in site for site in sites.values()))
    reader = _Reader(base, names, pixel_values)
    program = _program(reader, values)
    program.model.metadata_props.update(
        {"label_names": json.dumps(list(label_names or [])), "made_by": "peft-surgical"}
    )
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{goal.name}.", dir=goal.parent) as scratch:
        folder = Path(scratch, "exported")
        rows = list(_write(folder, program, reader, {name: values[name] for name in names}, sites, merged))
        if goal.is_dir():
            goal.rmdir()
        shutil.move(folder, goal)
    return OnnxExport(goal, tuple(rows), names)


def _tuned(base: nn.Module, values: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Name -> value of each tensor that an adapter changes, as a forward with it reads it."""
    check_fingerprint(make_plan(base, adapter.config), adapter.config, recorded_base(base))
    for name, whole in adapter.whole.items():
        if name not in values or values[name].shape != whole.shape:
            there = tuple(values[name].shape) if name in values else "not there"
            raise BaseMismatchError(
                f"{adapter.label} holds {name} whole, of shape {tuple(whole.shape)}, which is {there} in the base: "
                "export adapters with the same classes together."
            )
    # Counters of batches are read in training only.
    names = [name for name in adapter.names if values[name].is_floating_point()]
    return {name: adapter.tuned(name, values[name]).to(values[name].dtype) for name in names}


class _Reader(nn.Module):
    """The network as a function of its images and of some of its tensors."""

    def __init__(self, base: nn.Module, names: Sequence[str], pixel_values: Tensor) -> None:
        super().__init__()
        with bare(base):
            self.network = copy.deepcopy(base).cpu().float().eval().requires_grad_(False)
        self.names = tuple(names)
        self.shapes = {name: value.shape for name, value in self.network.state_dict().items()}
        self.pixel_values = pixel_values.cpu().float()
        self.keyword = PIXELS if hasattr(base, "config") and hasattr(base, "main_input_name") else None

    def forward(self, pixel_values: Tensor, values: list[Tensor]) -> Tensor:
        shapes = self.shapes
        given = {name: value.reshape(shapes[name]) for name, value in zip(self.names, values, strict=True)}
        plain, named = ((), {self.keyword: pixel_values}) if self.keyword else ((pixel_values,), {})
        found = torch.func.functional_call(self.network, given, plain, named)
        return getattr(found, "logits", found)

    @torch.no_grad()
    def logits(self, values: Mapping[str, Tensor]) -> Tensor:
        own = self.network.state_dict()
        return self(self.pixel_values, [_plain(values.get(name, own[name])) for name in self.names])


def _plain(value: Tensor) -> Tensor:
    """As the graph has it: in float32, and of one dimension at least, which ONNX Runtime's adapters ask for."""
    return torch.atleast_1d(value.float()).contiguous().clone()


def _program(reader: _Reader, values: Mapping[str, Tensor]) -> Any:
    sample = [_plain(values[name]) for name in reader.names]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter about itself
            return torch.onnx.export(
                reader.eval(),
                (reader.pixel_values, sample),
                dynamo=True,
                input_names=[PIXELS, *reader.names],
                output_names=[LOGITS],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, [None] * len(sample)),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"torch.onnx does not export this network ({type(error).__name__}: {reason})") from error


def _write(
    folder: Path,
    program: Any,
    reader: _Reader,
    base: Mapping[str, Tensor],
    sites: Mapping[str, Mapping[str, Tensor]],
    merged: bool,
) -> Iterator[ExportedFile]:
    """Write and check every file; yields what was written."""
    graph = program.model.graph
    inputs = list(graph.inputs)
    (folder / SITES).mkdir(parents=True)

    def fill(values: Mapping[str, Tensor]) -> None:
        ir = require("onnx_ir", "exporting to ONNX", "onnx")
        for value in inputs[1:]:
            value.const_value = ir.tensor(_plain(values[value.name]).numpy(), name=value.name)
            graph.register_initializer(value)

    fill(base)
    program.save(folder / BASE_GRAPH)
    shared = session_of(folder / BASE_GRAPH)
    yield _row("", folder, folder / BASE_GRAPH, _compared(shared, reader, {}))
    for name, values in sites.items():
        file = folder / SITES / f"{name}.onnx_adapter"
        write_site(file, values)
        yield _row(name, folder, file, _compared(shared, reader, values, file))
    for name, values in sites.items() if merged else ():
        (folder / MERGED).mkdir(exist_ok=True)
        file = folder / MERGED / f"{name}.onnx"
        fill({**base, **values})
        graph.inputs.clear()
        graph.inputs.append(inputs[0])
        program.save(file)
        graph.inputs.extend(inputs[1:])
        yield _row(name, folder, file, _compared(session_of(file), reader, values))


def _row(site: str, folder: Path, file: Path, difference: float) -> ExportedFile:
    place = file.relative_to(folder).as_posix()
    if not difference <= LOGIT_TOLERANCE:
        raise AdapterError(
            f"{place}: ONNX Runtime's logits differ from PyTorch's by {difference:.2g} of the largest, so nothing was "
            "written."
        )
    return ExportedFile(site, place, file.stat().st_size, difference)


def _compared(session: Any, reader: _Reader, values: Mapping[str, Tensor], site: Path | None = None) -> float:
    expected = reader.logits(values)
    found = run_onnx(session, reader.pixel_values, site)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def write_site(file: str | os.PathLike[str], values: Mapping[str, Tensor]) -> None:
    """Write the values that replace a graph's inputs of these names, in ONNX Runtime's format of adapters."""
    runtime = require("onnxruntime", "exporting to ONNX", "onnx")
    made = runtime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    arrays = {name: _plain(value).numpy() for name, value in values.items()}
    made.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()})
    made.export_adapter(os.fspath(file))


def session_of(file: str | os.PathLike[str]) -> Any:
    """A session of ONNX Runtime on the CPU, without its warning that inputs with values are not folded."""
    runtime = require("onnxruntime", "running ONNX", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])


def run_onnx(session: Any, pixel_values: Tensor, site: str | os.PathLike[str] | None = None) -> Tensor:
    """The logits (n, classes) of images (n, 3, h, w) with a site's file, or of the base."""
    given = {PIXELS: pixel_values.float().cpu().numpy()}
    if site is None:
        return torch.from_numpy(session.run([LOGITS], given)[0])
    options, adapter = site_options(site)
    found = torch.from_numpy(session.run([LOGITS], given, options)[0])
    del adapter
    return found


def site_options(file: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Options of a run with a site's file, and the adapter, to which they only point: keep it as long as them."""
    runtime = require("onnxruntime", "running ONNX", "onnx")
    adapter = runtime.LoraAdapter()
    adapter.Load(os.fspath(file))
    options = runtime.RunOptions()
    options.add_active_adapter(adapter)
    options.log_severity_level = 3
    return options, adapter
