"""The model cards of the recipes' adapters, as ``push_adapter`` would write them, from measured runs.

::

    python hub_cards/render.py            # writes hub_cards/<recipe>.md
    python hub_cards/render.py --check    # says what differs

``inputs/<recipe>.json`` holds what a run left: the adapter's config, its file in numbers and, where they are not in a
committed ledger, its reports. It is made from the outputs of the recipes, which are not committed::

    python recipes/digits.py --output demo-output
    python hub_cards/render.py --collect demo-output outputs/cifar10c

A recipe without an entry in `RECIPES` leaves no adapter, or has not been measured; it has no card. The owner ``me`` and
the licence are examples.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.evaluation import ORACLE, Report, measure
from peft_surgical.hub.card_text import card_rows, moved_of
from peft_surgical.hub.cards import About, card_of, draw_figure
from peft_surgical.training.ledger import Ledger

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from paper.cifar_networks import NETWORKS
from paper.cifar_tables import SELECTION, cell

HERE = Path(__file__).parent
ROOT = HERE.parent
NETWORK, CORRUPTION, TARGET = "resnet32", "gaussian_noise", "block1"
DIGITS = "digits/input"

LOAD_DIGITS = """\
import sys

from peft import PeftModel

sys.path.insert(0, "recipes")  # in a clone of the package: the recipe trains the base, in seconds
import digits
import peft_surgical

source = digits.make_shifts("dim", seed=0)["input"].source
model = PeftModel.from_pretrained(digits.pretrain(source, 12, seed=0), "me/digits-dim-camera").eval()"""

LOAD_CIFAR10C = """\
import sys

from peft import PeftModel

sys.path.insert(0, "recipes")  # in a clone of the package: the recipes hold the network
import peft_surgical
from paper.cifar_networks import load_network, normalise

base = load_network("resnet32", "models")  # models/cifar10_resnet32_bn/model.safetensors
model = PeftModel.from_pretrained(base, "me/cifar10-gaussian-noise").eval()
logits = model(normalise(pixels, "resnet32"))  # pixels: uint8 (n, 3, 32, 32)"""


def recipe(name: str) -> ModuleType:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def inputs(name: str) -> dict[str, Any]:
    """What a run of the recipe left."""
    return json.loads((HERE / "inputs" / f"{name}.json").read_text(encoding="utf-8"))


def digits() -> tuple[Report, list[Report], About]:
    """The demo's adapter for the dim camera; the reports' other columns are of other adapters."""
    reports = {}
    for target, plain in inputs("digits")["reports"].items():
        whole = Report.from_json(json.dumps(plain))
        rates = whole.settings["lr"] or {}
        settings = {"recipe": "digits.py", "lr": rates.get("input"), "epochs": whole.settings["epochs"]}
        seen = [one for one in whole if one.dataset == DIGITS]
        if target == TARGET:
            # The recipe keeps the block that is best on test images, so the number of a block is an oracle's.
            seen = [replace(one, selection=f"{one.selection}; block: {ORACLE}") for one in seen]
        reports[target] = Report(whole.model, target, tuple(seen), settings)
    about = About(
        "me/digits-dim-camera",
        "apache-2.0",
        (),
        "a small ResNet that recipes/digits.py trains on scikit-learn's digits",
        LOAD_DIGITS,
        opens=False,
    )
    return reports.pop(TARGET), list(reports.values()), about


def cifar10c() -> tuple[Report, list[Report], About]:
    """The adapter of the README's table for one corruption, from the committed ledger."""
    module = recipe("cifar10c")
    grid = ["--model", NETWORK, "--lr", "1e-3", "1e-4", "--head-lr", "1e-1", "1e-2", "--seeds", "0", "1", "2"]
    file = ROOT / "docs" / "results" / "cifar10c.jsonl"
    args = module.parse_arguments([*grid, "--table", "--rows", str(file), "--tasks", CORRUPTION])
    rows = Ledger(file).runs()
    shifted = f"CIFAR-10-C {CORRUPTION}, severity {args.severity}"

    def report(target: str) -> Report:
        runs = cell(args, rows, CORRUPTION, target, args.tuning_images[-1])
        key, seeds, n = runs[0].key, [run.key["seed"] for run in runs], runs[0].result["n"]
        measurements = tuple(
            measure(
                "accuracy",
                [run.result[name] for run in runs],
                dataset=dataset,
                n=n,
                seeds=seeds,
                selection="none" if target == "none" else SELECTION,
            )
            for name, dataset in (("test", shifted), ("clean", "clean"))
        )
        left_out = {"network", "method", "seed", "data", "task"}
        settings = {name: value for name, value in key.items() if name not in left_out}
        return Report(NETWORK, target, measurements, {**settings, "recipe": "cifar10c.py", "corruption": key["task"]})

    about = About(
        "me/cifar10-gaussian-noise",
        "apache-2.0",
        (),
        "the ResNet-32 of paper.cifar_networks, pretrained on CIFAR-10",
        LOAD_CIFAR10C,
        opens=False,
    )
    return report(TARGET), [report(target) for target in ("none", "all", "block2", "block3", "head")], about


RECIPES: dict[str, Callable[[], tuple[Report, list[Report], About]]] = {"cifar10c": cifar10c, "digits": digits}


def render(name: str) -> str:
    """The card of a recipe's adapter."""
    report, comparison, about = RECIPES[name]()
    config, weights = read(name)
    known = {"base_parameters": inputs(name)["base_parameters"], "figure": f"{name}.png"}
    about = replace(about, comparison=tuple(comparison), **known)
    return str(card_of(config, report, weights, about))


def read(name: str) -> tuple[SurgicalConfig, dict[str, Any]]:
    """The config of a recipe's adapter, and the summary of its file."""
    found = inputs(name)
    config = SurgicalConfig(**{key: value for key, value in found["config"].items() if key != "peft_type"})
    return config, found["weights"]


def figure(name: str) -> None:
    """Draw the card's figure; its bytes depend on matplotlib's version, so that it is not compared."""
    report, comparison, _ = RECIPES[name]()
    draw_figure(card_rows(report, comparison), read(name)[1], moved_of(report), HERE / f"{name}.png")


def collect(demo: Path, runs: Path) -> None:
    """Write ``inputs`` from what the recipes left."""
    module = recipe("digits")
    network = module.pretrain(module.make_shifts("dim", seed=0)["input"].source, 0, seed=0)
    targets = ("none", *module.TARGETS)
    reports = {target: json.loads((demo / f"report-{target}.json").read_text(encoding="utf-8")) for target in targets}
    tests = {target: reports[target]["measurements"][0]["value"] for target in module.BLOCKS}
    asked = {"asked": "the block that is best on test images", "split": "test", "test": tests}
    _write("digits", demo / f"input-{TARGET}", network, selection=asked, reports=reports)
    key = {
        "network": NETWORK,
        "corruption": CORRUPTION,
        "target": TARGET,
        "lr": 1e-3,
        "seed": 0,
        "norm_stats": "frozen",
    }
    (run,) = Ledger(ROOT / "docs" / "results" / "cifar10c.jsonl").runs(**key)
    _write("cifar10c", runs / "adapters" / run.result["adapter"], NETWORKS[NETWORK].build())


def _write(name: str, folder: Path, network: Any, selection: dict[str, Any] | None = None, **more: Any) -> None:
    adapter = read_adapter(folder)
    weights = {name: value for name, value in adapter.summary().items() if name != "folder"}
    base_parameters = sum(p.numel() for p in network.parameters())
    plain = {"config": adapter.config.to_dict(), "weights": weights, "base_parameters": base_parameters, **more}
    plain["config"] |= {"selection": selection, "weights_sha256": adapter.config.weights_sha256}
    (HERE / "inputs").mkdir(exist_ok=True)
    text = json.dumps(plain, indent=1, sort_keys=True) + "\n"
    (HERE / "inputs" / f"{name}.json").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write the cards, or check them; 1 if a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    parser.add_argument("--collect", nargs=2, type=Path, metavar=("DEMO", "CIFAR10C"), help="outputs of the recipes")
    args = parser.parse_args(argv)
    if args.collect:
        collect(*args.collect)
    stale = []
    for name in RECIPES:
        file, text = HERE / f"{name}.md", render(name)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not args.check:
                file.write_text(text, encoding="utf-8")
        if not args.check and (name in stale or not (HERE / f"{name}.png").is_file()):
            figure(name)
    verb = "differs" if args.check else "written"
    print("\n".join(f"{name}.md {verb}" for name in stale) or "all cards are as measured")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
