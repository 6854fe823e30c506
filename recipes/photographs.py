"""Photographs of a new place: a new style, a new camera, a new laboratory, and few labels of each.

::

    python recipes/photographs.py --prepare --data FOLDER --output photographs           # copies of 80 pixels
    python recipes/photographs.py --data photographs --model BASE --tasks sketch webcam cellavision

BASE is an ImageNet network; the one that was measured is made from its weights by::

    size = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    network = timm.create_model("tf_efficientnet_lite0", checkpoint_path=WEIGHTS, pretrained_cfg_overlay=size)
    peft_surgical.bases.libraries.save_checkpoint("timm", network, "BASE", label_names=None)

FOLDER holds PACS (Li et al. 2017), Office-Caltech (Gong et al. 2012) and blood cells of two laboratories (Zheng et al.
2018), each as ``<set>/<domain>/<class>/<image>``; BASE is first trained on the source domain
(LP-FT), then tuned on ``--per-class`` images of each class of the target domain:

    =========== ======================= =================================
    task        source domain           target domain
    =========== ======================= =================================
    sketch      pacs/photo              pacs/sketch
    webcam      office_caltech/amazon   office_caltech/webcam
    cellavision blood_cells/tecom       blood_cells/cellavision
    photo       pacs/sketch             pacs/photo
    amazon      office_caltech/webcam   office_caltech/amazon
    tecom       blood_cells/cellavision blood_cells/tecom
    =========== ======================= =================================

The first three are those on which the rules of ``auto`` were fixed, the others confirm them. Test images are drawn once
with seed 2026 and are the same for all seeds; a seed draws its tuning images, and half as many to validate on, from the
others. Every row is tuned with the same epochs and batches. Tables: docs/results/photographs.md, by

    ... --table --output outputs/photographs --markdown docs/results/photographs.md      # trains nothing
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paper.choice_tables import LITE0, TASKS, table
from paper.findings import source_accuracy
from paper.parts import Published, cut, images_of
from paper.pretraining import SOURCE_REPORT, SourceTraining
from paper.protocol import Protocol, parser_of, rows_of
from paper.rows import write_rows
from paper.study import SOURCE, run_study
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.experiment.choosing import batch_size_for
from peft_surgical.experiment.experiment import Experiment
from peft_surgical.training.fitting import FitSettings
from peft_surgical.training.ledger import Ledger, Run
from peft_surgical.training.search import NONE

TEST_SEED, TEST_IMAGES, POOL = 2026, 800, 45
"""The draw of the test images, their largest number, and how many images of a class are kept from it to tune on."""
SIDE = 80
"""Pixels of the shorter side of prepared copies."""
PROTOCOL = Protocol(
    name="photographs",
    data=None,
    layouts="the folder of the sets: <set>/<domain>/<class>/<image>",
    model="tf_efficientnet_lite0",
    rows=("all", "auto", "logistic-head", "head", *LITE0),
    lrs=(3e-4, 1e-3),
    head_lrs=(1e-3, 1e-2),
    fitting=FitSettings(lr=1e-3, epochs=15, batch_size=16, optimizer="adam", weight_decay=1e-4),
    source=SourceTraining(
        FitSettings(lr=3e-4, epochs=10, batch_size=32, optimizer="adam", weight_decay=1e-4),
        method="lp-ft",
        options={"share": 0.3},
        augment="flip",
        reference="chosen here",
    ),
    reference="none: chosen here",
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(PROTOCOL, __doc__)
    add = parser.add_argument
    add("--data", metavar="PATH", help=f"{PROTOCOL.layouts}; needed to train")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="T", help="default: all six")
    add("--per-class", nargs="+", type=int, default=[5, 20], metavar="N", help="images to tune on; default: 5 20")
    add("--all-lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="rates of `all`; default: %(default)s")
    add("--prepare", action="store_true", help=f"write copies whose shorter side has {SIDE} pixels, and stop")
    add("--table", action="store_true", help="draw the tables from OUTPUT/rows.jsonl, train nothing")
    add("--rows", metavar="FILE", help="results; default: OUTPUT/rows.jsonl")
    add("--markdown", metavar="FILE", help="also write the tables to this file")
    args = parser.parse_args(argv)
    if not args.data and not args.table:
        parser.error("--data is needed to train; without it --table draws what the rows hold")
    if args.push_to_hub:
        parser.error("--push-to-hub: this study compares, and makes no adapter to keep; use peft-surgical tune")
    args.rows = Path(args.rows or Path(args.output, "rows.jsonl"))
    return args


def prepare(folder: Path, output: Path) -> None:
    """Copies of all images, JPEG of quality 95, whose shorter side has `SIDE` pixels."""
    for domain in dict.fromkeys(place for pair in TASKS.values() for place in pair):
        for file in files_of(folder, domain):
            with Image.open(file) as image:
                scale = SIDE / min(image.size)
                small = image.convert("RGB").resize([max(SIDE, round(scale * side)) for side in image.size])
            copy = output / file.relative_to(folder).with_suffix(".jpg")
            copy.parent.mkdir(parents=True, exist_ok=True)
            small.save(copy, quality=95)


def files_of(folder: Path, domain: str) -> list[Path]:
    """The images of a domain, in the order of their names."""
    found = sorted(file for file in (folder / domain).glob("*/*") if file.is_file())
    if not found:
        raise DataError(f"{folder / domain} holds no class folders with images: --data takes {PROTOCOL.layouts}")
    return found


@functools.lru_cache(maxsize=4)
def read_photographs(folder: str, task: str, per_class: int, seed: int) -> Published:
    """The images of a task: all of the source domain but a tenth, and of the target domain as drawn."""
    files = [files_of(Path(folder), domain) for domain in TASKS[task]]
    names = sorted({file.parent.name for file in files[1]})
    everything = [*files[0], *files[1]]
    labels = np.array([names.index(file.parent.name) for file in everything])
    rows: dict[str, list[int]] = {part: [] for part in ("source", "source_test", "tuning", "validation", "test")}
    fixed, drawn = np.random.default_rng(TEST_SEED), np.random.default_rng(seed)
    for label in range(len(names)):
        source = fixed.permutation(np.flatnonzero(labels[: len(files[0])] == label))
        held_out = max(1, len(source) // 10)
        rows["source_test"] += source[:held_out].tolist()
        rows["source"] += source[held_out:].tolist()
        target = len(files[0]) + fixed.permutation(np.flatnonzero(labels[len(files[0]) :] == label))
        pool = min(POOL, len(target) // 2)
        rows["test"] += target[pool:].tolist()
        own = drawn.permutation(target[:pool])
        tuned = min(per_class, 2 * pool // 3)
        rows["tuning"] += own[:tuned].tolist()
        rows["validation"] += own[tuned : tuned + -(-tuned // 2)].tolist()
    rows["test"] = fixed.permutation(rows["test"])[:TEST_IMAGES].tolist()
    origin = dict.fromkeys(("tuning", "validation"), f"drawn: seed {seed}")
    origin |= {"test": f"drawn once: seed {TEST_SEED}", "source": TASKS[task][0], "source_test": "a tenth, drawn once"}
    return cut(
        f"{task}, {per_class} per class",
        images_of([str(file) for file in everything]),
        labels,
        labels,
        {part: np.array(sorted(found)) for part, found in rows.items()},
        label_names=names,
        group_names=names,
        origin=origin,
        files=[str(file.relative_to(folder)) for file in everything],
    )


def study(args: argparse.Namespace, rows: Ledger, task: str, per_class: int) -> None:
    """One task with one number of labels: trains what is missing, and writes its rows."""
    folder = Path(args.output, task, str(per_class))
    source = Path(args.output, "sources", TASKS[task][0].replace("/", "-"))
    data = functools.partial(read_photographs, str(args.data), task, per_class)
    batch = batch_size_for(len(data(args.seeds[0]).tuning))
    methods = rows_of(PROTOCOL, args.target, args.method)
    own = {"batch_size": batch, "forgetting": False}
    if not args.source_checkpoint:
        if not (source / SOURCE / SOURCE_REPORT).exists():  # its images are the same for every number of labels
            run_study(PROTOCOL, _with(args, own, output=str(source), source_only=True), data)
        own["source_checkpoint"] = str(source / SOURCE)
    if args.source_only:
        return

    def measured(experiment: Experiment, run: Run) -> dict[str, Any]:
        """What a row says beyond what the study measures."""
        seed = run.key["seed"]
        network: Any = experiment.base(seed).model
        if run.key["method"] != NONE:
            if not (place := experiment.adapter(run.key)).is_dir():
                raise DataError(
                    f"{args.rows} has no row of {run.key['method']} with seed {seed}, and {args.output}, which is "
                    "finished, no longer has its adapter: name the --rows that it wrote, or another --output"
                )
            network = experiment.load(place, network)
        kept, _ = source_accuracy(PROTOCOL, experiment, network, seed)
        return {"n": len(experiment.rows("test", seed)), "source": kept}

    def export(experiment: Experiment, found: Mapping[str, list[Run]]) -> None:
        def settings(method: str) -> dict[str, Any]:
            shared = {"recipe": "photographs", "task": task, "per_class": per_class, "method": method}
            shared |= {"effort": args.effort} if method == "auto" and args.effort > 1 else {}
            return {**shared, "epochs": args.epochs, "batch_size": batch, "model": Path(args.model).name}

        write_rows(rows, experiment, found, settings, functools.partial(measured, experiment))

    protocol = replace(PROTOCOL, name=f"photographs, {task}")
    for lrs, names in ((args.all_lr, ["all"]), (args.lr, [name for name in methods if name != "all"])):
        if asked := [name for name in names if name in methods]:
            place = folder / ("all" if asked == ["all"] else "parts" if args.effort == 1 else f"effort{args.effort}")
            run_study(
                protocol, _with(args, own, output=str(place), target=asked, method=[], lr=lrs), data, export=export
            )


def _with(args: argparse.Namespace, *others: Mapping[str, Any], **more: Any) -> argparse.Namespace:
    found = vars(args).copy()
    for other in (*others, more):
        found |= other
    return argparse.Namespace(**found)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.prepare:
        prepare(Path(args.data), Path(args.output))
        return
    rows = Ledger(args.rows)
    if not args.table:
        for task in args.tasks:
            for per_class in args.per_class:
                study(args, rows, task, per_class)
    if args.table or not args.source_only:
        tables = table(rows.runs(), args.tasks, args.per_class, args.seeds)
        if not tables:
            print(f"No table yet: no task has rows of both `all` and `auto` in {args.rows}.")
        for found in tables:
            found.show()
        if args.markdown and tables:
            Path(args.markdown).write_text("\n".join(found.markdown() for found in tables), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_in_words(main))
