"""What to adapt at test time on ImageNet-C: MEMO and TENT on any timm network (Lee et al. 2023, Sec. 2.2, Table 10).

::

    python recipes/memo_imagenet_c.py --model vit_small_patch16_224 --data IMAGENET_C --corruption gaussian_noise

streams 2,000 images of severity 5, the first two of each class, through the network, without adaptation and adapting
``all``, ``stem``, ``block1`` and ``head``, online and episodic, and shows the accuracy of the predictions. IMAGENET_C
is the published layout, ``<corruption>/<severity>/<wnid>/*.JPEG``. MODEL is a timm id with ImageNet-1k's 1,000 classes,
or the folder of one; the paper's RVT*-small is not in timm. To expect, mean over corruptions of the paper's Table 3:
none 46.5; episodic all 47.8, first layer 46.6, first block 46.7, last 46.5; online all 1.8, first layer 46.4, first
block 49.0, last 46.5. Not measured here: it needs ImageNet-C. An image costs a training step of 32.

Protocol (paper, A.6): one rate, 1e-5, and one step, SGD online and AdamW episodic, 32 views, its first and last
tensors. With several rates (``--lr 1e-5 1e-4``) the most accurate stream of 200 validation images of ``--select-on``
chooses, which are the same photographs under every corruption and never test. ``--images N`` draws N of all others
instead. Departures: the paper's first layer is the first convolution within the first transformer block of its RVT, the
stem here is what comes before; its weight decay of 0.01 is left out, since decay acts on the change here, which is zero
at the one step of an episodic image, and 1e-7 of it for an image online. Views are resized crops, as in MEMO's code for
ImageNet. Finished streams are in OUTPUT/ledger.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from paper.rows import best_validated, judged
from peft_surgical.adaptation import CollapseWarning
from peft_surgical.bases import load_base
from peft_surgical.data.images import IMAGE_SUFFIXES
from peft_surgical.data.incoming import Incoming
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.experiment.adapting import AdaptSettings, adapt
from peft_surgical.extras import accelerator_or_cpu, require
from peft_surgical.training.ledger import Ledger, Run
from peft_surgical.training.search import SELECTION_SEED

Row = tuple[str, str, str]  # method, target, mode
PER_CLASS = 2  # 2,000 images of 1,000 classes: the paper, whose accuracies are multiples of 0.05 %


@lru_cache(maxsize=1)
def class_numbers() -> dict[str, int]:
    """ImageNet-1k's number of each wnid: a part of the folders is enough."""
    info = require("timm.data", "reading ImageNet-C", "timm").ImageNetInfo("imagenet-1k")
    return {info.index_to_label_name(i): i for i in range(info.num_classes())}


@lru_cache(maxsize=4)
def listed(root: str, corruption: str, severity: int) -> tuple[tuple[str, ...], str]:
    """``wnid/file`` of every image, sorted, and a digest of the names."""
    folder = Path(root, corruption, str(severity))
    files = sorted(f"{f.parent.name}/{f.name}" for f in folder.glob("*/*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"no image in {folder}/<wnid>/: --data is the folder with one folder for each corruption")
    if unknown := sorted({file.split("/")[0] for file in files} - class_numbers().keys()):
        raise DataError(f"{folder / unknown[0]} is no class of ImageNet-1k: name the folders by wnid, as published")
    return tuple(files), hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]


def stream_of(args: argparse.Namespace, key: dict[str, Any]) -> Incoming:
    files, _ = listed(args.data, key["corruption"], key["severity"])
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(SELECTION_SEED)).tolist()
    rows, first = drawn[: args.validation_images], args.validation_images
    if args.images is None:  # the first of each class test, and others validate
        tests = set(_first_of_each(files))
        rows = [row for row in drawn if row not in tests][:first]
    if key["part"] == "test":
        rest = sorted(drawn[first:]) if args.images is not None else _first_of_each(files)
        generator = torch.Generator().manual_seed(key["seed"])
        rows = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
    chosen = tuple(files[i] for i in rows[: key["images"]])
    if not chosen:
        raise DataError(f"{len(files)} images are too few for {first} to validate and some to test: bring more")
    place = Path(args.data, key["corruption"], str(key["severity"]))
    labels = torch.tensor([class_numbers()[file.split("/")[0]] for file in chosen])
    return Incoming(chosen, lambda i: (place / chosen[i]).read_bytes(), labels)


def _first_of_each(files: Sequence[str], count: int = PER_CLASS) -> list[int]:
    """The numbers of the first files of every class; ``files`` are sorted."""
    of_class: dict[str, list[int]] = {}
    for number, file in enumerate(files):
        of_class.setdefault(file.split("/")[0], []).append(number)
    return [number for numbers in of_class.values() for number in numbers[:count]]


def run(args: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """One stream, with adaptation and without."""
    start, images = time.perf_counter(), stream_of(args, key)
    base = load_base(args.model, weights="random" if args.random else "pretrained")
    if base.classes != len(class_numbers()):
        raise DataError(f"{args.model} has {base.classes} outputs, ImageNet-1k 1,000 classes: name another model")
    own = ("method", "target", "mode", "lr", "optimizer", "steps", "views", "batch_size", "prior_strength", "seed")
    settings = AdaptSettings(crop="resize", **{name: key[name] for name in own})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # on the record
        found = adapt(base, images, settings, args.device)
    labels, record = torch.as_tensor(images.labels), found.record
    result = {**judged(found.after, labels), "before": judged(found.before, labels)["accuracy"], "n": len(labels)}
    result |= {"skipped": record.skipped, "collapses": list(record.collapses)}
    result |= {"seconds": round(time.perf_counter() - start, 1)}
    named = " ".join(str(key[name]) for name in ("corruption", "severity", "method", "mode", "target", "part", "lr"))
    print(f"{named}: {result['before']:.1%} -> {result['accuracy']:.1%}, {result['seconds']} s", flush=True)
    return result


def chosen(args: argparse.Namespace, ledger: Ledger, row: Row, corruption: str, severity: int) -> list[Run]:
    """The test streams of one cell, one for each seed, at the rate that validates best."""
    method, target, mode = row
    key = {"recipe": "memo_imagenet_c", "model": args.model, "method": method, "target": target, "mode": mode}
    key |= {"optimizer": None, "steps": args.steps, "views": args.views, "batch_size": args.batch_size}
    key |= {"prior_strength": args.prior_strength if method == "memo" else None}
    rates = args.tent_lr if method == "tent" else args.lr if mode == "online" else args.episodic_lr

    def at(lr: float, part: str, seed: int) -> Run:
        on = (args.select_on, args.severity[-1]) if part == "validation" else (corruption, severity)
        images = args.validation_images if part == "validation" else args.images or PER_CLASS * len(class_numbers())
        where = {"lr": lr, "corruption": on[0], "severity": on[1], "part": part, "seed": seed, "images": images}
        return ledger.run(key | where | {"data": listed(args.data, *on)[1]}, partial(run, args))

    return best_validated(rates, args.seeds, at)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="timm id or folder, with 1,000 classes")
    add("--random", action="store_true", help="random weights: to try the recipe out")
    add("--data", required=True, help="folder of <corruption>/<severity>/<wnid>/*.JPEG")
    add("--corruption", nargs="+", required=True)
    add("--severity", type=int, nargs="+", default=[5], choices=range(1, 6))
    add("--target", nargs="+", default=["all", "stem", "block1", "head"], help="of MEMO; TENT adapts norm")
    add("--method", nargs="+", default=["memo"], choices=["memo", "tent"])
    add("--mode", nargs="+", default=["online", "episodic"], choices=["online", "episodic"])
    add("--lr", type=float, nargs="+", default=[1e-5], help="candidates of MEMO online (SGD)")
    add("--episodic-lr", type=float, nargs="+", default=[1e-5], help="candidates of MEMO episodic (AdamW)")
    add("--tent-lr", type=float, nargs="+", default=[1e-4, 1e-3], help="candidates of TENT (Adam)")
    add("--steps", type=int, default=1)
    add("--views", type=int, default=32)
    add("--prior-strength", type=float, help="for BatchNorms; MEMO has 16")
    add("--batch-size", type=int, default=64, help="of TENT")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--images", type=int, help="in a test stream, drawn; default: the first two of each class (paper, A.6)")
    add("--validation-images", type=int, default=200)
    add("--select-on", default="gaussian_noise", help="the corruption whose validation images choose the rate")
    add("--output", default="outputs/memo_imagenet_c")
    add("--markdown", help="also write the table to this file")
    add("--device", default=str(accelerator_or_cpu()))
    args = parser.parse_args(argv)
    ledger = Ledger(Path(args.output, "ledger.jsonl"))
    rows = [("memo", target, mode) for mode in args.mode for target in args.target if "memo" in args.method]
    rows += [("tent", "norm", "online")] if "tent" in args.method else []
    places = [(c, s) for c in args.corruption for s in args.severity]
    lines = []
    for row in rows:
        runs = [chosen(args, ledger, row, *place) for place in places]
        own = [row[0], row[2], row[1], f"{runs[0][0].key['lr']:g}"]
        for name in ("accuracy",) if lines else ("before", "accuracy"):
            cells = (plus_minus([r.result[name] for r in some], some[0].result["n"]) for some in runs)
            lines.append([*(["none", "-", "-", "-"] if name == "before" else own), *cells])
    count = args.images or PER_CLASS * len(class_numbers())
    caption = (
        f"{args.model}, ImageNet-C: accuracy in percent of the predictions along streams of {count} images, ± "
        f"half the 95% interval ({'Wilson over images' if len(args.seeds) == 1 else 'Student over seeds'}); seeds "
        f"{', '.join(map(str, args.seeds))}. Selection: of several learning rates by the accuracy on "
        f"{args.validation_images} validation images of {args.select_on}; nothing was selected on test images."
    )
    table = TextTable(["method", "mode", "target", "lr", *(f"{c} {s}" for c, s in places)], lines, caption)
    table.show()
    if args.markdown:
        table.save(args.markdown)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
