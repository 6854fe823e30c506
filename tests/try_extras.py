"""Try what an installation gets: the wheel, the source distribution, and every extra alone.

    make test-extras        # or: python tests/try_extras.py --uv uv --only timm plots

Builds both distributions, installs each case into an environment of its own and runs its function there, outside
the clone, so that nothing of the clone and of other environments is found. Needs the package index; takes minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-extras"
OPTIONAL = (
    "timm",
    "datasets",
    "evaluate",
    "matplotlib",
    "sklearn",
    "ray",
    "fastapi",
    "onnx",
    "onnxruntime",
    "gradio",
    "opacus",
    "pytest",
)
"""Modules that the core must work without."""


# --- what runs inside the environment of each case ---


def core() -> None:
    """Tune, save, load and look, with nothing but the core; what needs an extra says which one."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from peft_surgical import SurgicalConfig, load_adapted

    present = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    assert not present, f"the core brings {present}"
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=16, num_labels=3)).save_pretrained("vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
    base = ViTForImageClassification.from_pretrained("vit")
    images = torch.randn(2, 3, 32, 32)
    untouched = base(images).logits
    model = get_peft_model(base, SurgicalConfig(target="block1"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.nn.functional.cross_entropy(model.train()(images).logits, torch.tensor([0, 2])).backward()
    optimizer.step()
    model.eval().save_pretrained("adapter")
    tuned = model(images).logits
    assert not torch.equal(tuned, untouched)
    again = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained("vit"), "adapter").eval()
    assert torch.equal(again(images).logits, tuned)
    assert torch.equal(load_adapted("adapter", base="vit")(images).logits, tuned)

    command("--help", says="tune")
    command("blocks", "vit", says="block2")
    command("show", "adapter", says="block1")
    Path("images/daisy").mkdir(parents=True)
    command("score", "vit", "images", code=2, says='pip install "peft-surgical[recipes]"')
    command("app", code=2, says='pip install "peft-surgical[app]"')
    command("blocks", "resnet18", code=2, says='pip install "peft-surgical[timm]"')


def with_timm() -> None:
    """A network of timm, by its blocks, from Python and from the command line."""
    import timm
    import torch
    from peft import PeftModel, get_peft_model

    from peft_surgical import SurgicalConfig, anatomy_of

    network = timm.create_model("resnet10t", num_classes=3).eval()
    assert [block.name for block in anatomy_of(network)][-1] == "head"
    start = {name: value.clone() for name, value in network.state_dict().items()}
    model = get_peft_model(network, SurgicalConfig(target="block1")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained("adapter")
    base = timm.create_model("resnet10t", num_classes=3).eval()
    base.load_state_dict(start)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, "adapter").eval()(images), model(images))
    command("blocks", "resnet10t", "--random", says="block4")


def with_plots() -> None:
    """A figure of scores."""
    from peft_surgical import BlockScores

    scores = BlockScores("rgn", {"block1": 2.0, "head": 1.0}, {"w": 2.0, "v": 1.0}, {"block1": 3, "head": 1}, 32, 1)
    scores.plot().figure.savefig("scores.png")
    assert Path("scores.png").stat().st_size > 1000


def with_recipes() -> None:
    """One's own images, from the command line; and every recipe's help."""
    from PIL import Image

    for number, name in enumerate(("daisy", "rose", "tulip")):
        folder = Path("flowers", name)
        folder.mkdir(parents=True)
        for image in range(12):
            shade = (80 * number + image, 40, 200 - 60 * number)
            Image.new("RGB", (40, 40), shade).save(folder / f"{image}.png")
    command("blocks", "test_resnet", "--random", says="head")
    tune = ["tune", "test_resnet", "flowers", "--random", "--cpu", "--output", "tuned", "--epochs", "1", "--lr", "1e-3"]
    command(*tune, "--target", "block1", says="tuned")
    command("show", "tuned", says="block1")
    for recipe in sorted((ROOT / "recipes").glob("*.py")):
        run([sys.executable, str(recipe), "--help"], says="usage")


def with_ray() -> None:
    """A search whose runs are tasks of a Ray cluster on this machine."""
    import ray

    from peft_surgical.training.engines import on_ray
    from peft_surgical.training.ledger import Ledger
    from peft_surgical.training.search import Candidate, cross_val

    worth = {"block1": 0.5, "head": 0.3}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = cross_val(
            [Candidate(name, 1e-3) for name in worth],
            lambda key: {"validation": worth[key["method"]], "cost": 1.0},
            Ledger(Path("runs.jsonl")),
            engine=on_ray(num_cpus=1),
        )
    finally:
        ray.shutdown()
    assert str(found.chosen) == "block1 at 0.001"


def with_serve() -> None:
    """What a server of sites on Ray Serve imports; the server itself is a recipe, which a clone brings."""
    import python_multipart
    from fastapi import FastAPI
    from ray import serve

    assert callable(serve.ingress(FastAPI))
    assert python_multipart.__version__


def with_onnx() -> None:
    """A base and two adapters for ONNX Runtime."""
    import torch
    from peft import get_peft_model

    from peft_surgical import SurgicalConfig
    from peft_surgical.adapters.export import export_onnx

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3)).eval()
    for number, target in enumerate(("0", "2")):
        model = get_peft_model(network, SurgicalConfig(target=target, blocks={"block1": ["0"], "head": ["2"]}))
        for name, parameter in model.named_parameters():
            if "surgical_delta" in name:
                parameter.data += 0.1
        model.save_pretrained(f"site{number}")
        model.unload()
    sites = {name: name for name in ("site0", "site1")}
    found = export_onnx(network, sites, torch.randn(2, 3, 8, 8), "out", merged=True)
    assert len(found.files) == 5
    assert all(row.difference < 1e-5 for row in found.files)


def with_app() -> None:
    """The page in the browser, built and not served, and the command that serves it."""
    from peft_surgical_app.page import build_page
    from peft_surgical_app.workspace import AppSettings

    page, handlers = build_page(AppSettings(Path("root")), Path("cache"))
    assert page.title
    assert handlers.status("") is None
    command("app", "--folders", "nowhere", code=2, says="--folders nowhere is no folder")


def with_dp() -> None:
    """A head under differential privacy."""
    import torch

    from peft_surgical.training.private import private_moves

    features, labels = torch.randn(20, 6).double(), torch.arange(20) % 3
    *moves, told = private_moves(features, labels, torch.randn(3, 6).double(), torch.zeros(3).double(), epsilon=2.0)
    assert [tuple(move.shape) for move in moves] == [(3, 6), (3,)]
    assert told["epsilon"] <= 2.0


CASES: dict[str, Callable[[], None]] = {
    "wheel": core,
    "sdist": core,
    "timm": with_timm,
    "plots": with_plots,
    "recipes": with_recipes,
    "ray": with_ray,
    "serve": with_serve,
    "onnx": with_onnx,
    "app": with_app,
    "dp": with_dp,
}


def command(*arguments: str, says: str, code: int = 0) -> None:
    """Run ``peft-surgical`` of this environment."""
    run([str(Path(sys.executable).with_name("peft-surgical")), *arguments], says, code)


def run(arguments: list[str], says: str, code: int = 0) -> None:
    """Run a program and look for its exit code and for a text in what it prints."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    message = f"{arguments} ended with {done.returncode}:\n{printed}"
    assert done.returncode == code, message
    assert says in printed, message


# --- what makes the environments ---


def install(uv: str, case: str, distributions: Path) -> Path:
    """An empty environment with one of the distributions and at most one extra; returns its Python."""
    kind = "*.tar.gz" if case == "sdist" else "*.whl"
    (file,) = distributions.glob(kind)
    extra = "" if case in ("wheel", "sdist") else f"[{case}]"
    python = ENVIRONMENT / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(ENVIRONMENT)], check=True)
    what = ["--constraints", str(ROOT / "constraints.txt"), f"peft-surgical{extra} @ {file.as_uri()}"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *what], check=True)
    return python


def main() -> None:
    """Build, install and try, case by case; stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uv", default="uv", help="the uv to build and install with")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases")
    parser.add_argument("--inside", choices=CASES, help=argparse.SUPPRESS)  # this environment is the case's own
    given = parser.parse_args()
    if given.inside:
        import peft_surgical

        assert Path(peft_surgical.__file__).is_relative_to(sys.prefix), "another copy of the package was found"
        CASES[given.inside]()
        return
    uv = str(Path(given.uv).resolve()) if Path(given.uv).is_file() else given.uv
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as scratch:
        distributions = Path(scratch, "dist")
        # The wheel is built from the source distribution, not from the clone.
        subprocess.run([uv, "build", "--quiet", "--out-dir", str(distributions), str(ROOT)], check=True)
        for case in given.only:
            python = install(uv, case, distributions)
            place = Path(scratch, case)
            place.mkdir()
            subprocess.run([str(python), __file__, "--inside", case], check=True, cwd=place, env=clean)
            print(f"{case}: works", flush=True)
    shutil.rmtree(ENVIRONMENT)


if __name__ == "__main__":
    main()
