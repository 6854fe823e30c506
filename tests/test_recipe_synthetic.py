"""The recipe with noise on one block: what is damaged, by which seed, and what a run leaves."""

import pytest
import torch
from safetensors.torch import save_file
from scripts import script

from paper import cifar, cifar_networks, cifar_tasks
from peft_surgical.evaluation import accuracy, plus_minus
from peft_surgical.training.ledger import Ledger

for needed in ("datasets", "rich", "matplotlib"):
    pytest.importorskip(needed)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "synthetic.py")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Weights of an untrained network, and 50 random images in place of a file."""
    file = tmp_path / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(cifar_networks.ResNet26().state_dict(), file)
    images = cifar.Images(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50) % 10)
    cifar_tasks.task_images.cache_clear()
    monkeypatch.setattr(cifar_tasks, "read_images", lambda place: images)
    return tmp_path


def test_noise_is_drawn_for_one_block_with_a_seed(recipe, models):
    clean = cifar_networks.load_network("resnet26", models).state_dict()
    noisy, again, other = (
        recipe.open_damaged(str(models), 0.5, "block2", "resnet26", seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    changed = {name for name in clean if not torch.equal(clean[name], noisy[name])}
    assert {name.split(".")[0] for name in changed} == {"layer2"}
    assert all(torch.equal(noisy[name], again[name]) for name in clean)
    assert not torch.equal(noisy["layer2.1.conv1.weight"], other["layer2.1.conv1.weight"])
    added = noisy["layer2.1.conv1.weight"] - clean["layer2.1.conv1.weight"]
    size = clean["layer2.1.conv1.weight"].square().mean().sqrt()
    assert added.std().item() == pytest.approx(0.5 * size.item(), rel=0.05)


def test_rows_table_and_figure(recipe, models):
    out = models / "out"
    asked = ["--data", "here", "--models", str(models), "--blocks", "block1", "--target", "block1", "auto-rgn"]
    asked += ["--epochs", "1", "--lr", "1e-3", "--seeds", "0", "1", "--output", str(out), "--cpu", "--noise", "5"]
    recipe.main([*asked, "--tuning-images", "20", "--validation-images", "10", "--batch-size", "10"])
    rows = Ledger(out / "rows.jsonl")
    text = (out / "synthetic-resnet26.md").read_text()
    assert text.startswith("| noise on | none | block1 | auto-rgn | block minus all |")
    assert "in percent on 20 clean images, mean" in text
    assert "| block1 | " in text
    assert (out / "synthetic-resnet26.png").stat().st_size > 5000
    # Every seed has a damage of its own.
    first, second = (run.result["rgn"] for run in rows.runs(method="none"))
    assert list(first) == ["block1", "block2", "block3", "head"]
    assert first != second
    for run in rows.runs(method="none"):
        base = recipe.open_damaged(str(models), 5.0, "block1", "resnet26", seed=run.key["seed"])
        images = cifar_tasks.task_images("clean", "here")
        test = cifar.split(images.labels, run.key["seed"], 20, 10).test
        with torch.no_grad():
            logits = base.model(cifar_networks.normalise(images.pixels[test], "resnet26"))
        assert run.result["test"] == accuracy(logits, images.labels[test])
    found = {method: [run.result["test"] for run in rows.runs(method=method)] for method in ("none", "block1")}
    # 20 images test and 20 tune.
    line = f"| block1 | {plus_minus(found['none'], ratio=1)} | {plus_minus(found['block1'], ratio=1)} | "
    assert line in text
    (out / "synthetic-resnet26.md").unlink()
    recipe.main([*asked, "--tuning-images", "20", "--table"])
    assert (out / "synthetic-resnet26.md").read_text() == text
