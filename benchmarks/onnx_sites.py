"""Many sites on one ONNX graph, beside a merged graph for each: size, latency and memory.

::

    python benchmarks/onnx_sites.py --rounds 20 --markdown docs/results/onnx_sites.md     # needs the extras timm, onnx

The networks have random weights and the adapters random deltas, which changes no cost. Every graph's logits are
compared with PyTorch's while it is written. Then rounds: every measurement once per round, on a site drawn at random,
so that what else the machine does hits all alike. A number is the median with the distribution-free 95% interval
between two order statistics.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from many_adapters import save_adapters
from step import machine, median_interval

from peft_surgical.adapters.export import OnnxExport, export_onnx, session_of, site_options
from peft_surgical.evaluation import TextTable

HEADINGS = ("network, target", "base graph", "a site's file", "a merged graph", "largest difference")
TIMES = ("network, target", "what", "median", "95% interval", "n")


def measure(
    export: OnnxExport, sites: list[str], pixels: torch.Tensor, rounds: int, seed: int
) -> dict[str, list[float]]:
    """What -> seconds, one for each round."""
    folder, draw = export.folder, random.Random(seed)
    given = {"pixel_values": pixels.numpy()}
    shared = session_of(folder / "base.onnx")
    loaded = {name: site_options(folder / "sites" / f"{name}.onnx_adapter") for name in sites}
    merged = {name: session_of(folder / "merged" / f"{name}.onnx") for name in sites}
    found: dict[str, list[float]] = {}

    def clock(what: str, call: Any) -> None:
        begun = time.perf_counter()
        call()
        found.setdefault(what, []).append(time.perf_counter() - begun)

    for number in range(rounds + 1):
        name = draw.choice(sites)
        clock("a merged graph, batch", lambda name=name: merged[name].run(None, given))
        clock("the shared graph with a site, batch", lambda name=name: shared.run(None, given, loaded[name][0]))
        clock("the shared graph alone, batch", lambda: shared.run(None, given))
        clock("open a site's file", lambda name=name: site_options(folder / "sites" / f"{name}.onnx_adapter"))
        clock("open a merged graph", lambda name=name: session_of(folder / "merged" / f"{name}.onnx"))
        if not number:
            found.clear()  # the first round warms up
    return found


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet50:block1", "vit_small_patch16_224:block1-3"])
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    sizes, times = [], []
    for text in given.networks:
        model, _, target = text.partition(":")
        torch.manual_seed(given.seed)
        network = timm.create_model(model).eval()
        pixels = torch.randn(given.batch, 3, given.size, given.size, generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as scratch:
            folders = save_adapters(network, target, given.sites, Path(scratch))
            sites = {Path(folder).name: folder for folder in folders}
            export = export_onnx(network, sites, pixels[:2], Path(scratch, "out"), merged=True)
            by = {
                kind: [row for row in export.files if row.file.startswith(kind)] for kind in ("base", "sites", "merged")
            }
            largest = max(row.difference for row in export.files)
            megabytes = [f"{rows[0].bytes / 1e6:.1f} MB" for rows in by.values()]
            sizes.append((f"{model}, {target}", *megabytes, f"{largest:.0e}"))
            for what, seconds in measure(export, list(sites), pixels, given.rounds, given.seed).items():
                one = median_interval([1000 * value for value in seconds])
                ends = f"{one.low:.3g} to {one.high:.3g}"
                times.append((f"{model}, {target}", what, f"{one.value:.3g} ms", ends, str(len(seconds))))
    where = machine("cpu")
    busy = f"{where['cores']} cores, load average {os.getloadavg()[2]:.1f} over the last 15 minutes"
    note = (
        f"{given.sites} sites, random weights and deltas, float32, {given.size} px, batches of {given.batch}; ONNX "
        f"Runtime {onnxruntime.__version__}, torch {torch.__version__}; {where['cpu']}, {busy}. Differences from "
        "PyTorch's logits are relative to the largest logit. Medians over rounds with the 95% interval between order "
        "statistics."
    )
    tables = [TextTable(HEADINGS, sizes, ""), TextTable(TIMES, times, note)]
    text = "\n".join(one.markdown() for one in tables)
    print(text)
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
