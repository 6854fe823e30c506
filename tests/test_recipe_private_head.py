"""The recipe of the private head: what is public, what its rows are, and its table."""

import io

import pytest
import torch
from safetensors.torch import save_file
from scripts import script

from paper import cifar, cifar_networks
from peft_surgical.errors import DataError
from peft_surgical.evaluation import accuracy, plus_minus
from peft_surgical.training.ledger import Ledger

for needed in ("datasets", "rich", "opacus"):
    pytest.importorskip(needed)
pillow = pytest.importorskip("PIL.Image")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")


def write(file, pixels):
    rows = []
    for image in pixels.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        pillow.fromarray(image).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"img": rows, "label": [i % 10 for i in range(len(rows))]}), file)


@pytest.fixture
def place(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8, generator=generator)
    for name in ("clean", "frost"):
        write(tmp_path / f"{name}.parquet", pixels[:40])
    write(tmp_path / "public.parquet", pixels)
    write(tmp_path / "all_private.parquet", pixels[:40])
    file = tmp_path / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    file.parent.mkdir()
    torch.manual_seed(0)
    save_file(cifar_networks.ResNet26().state_dict(), file)
    return tmp_path


def test_rows_and_table(place, monkeypatch, capsys):
    recipe = script("recipes", "private_head.py")
    for name, value in {"TUNING": 10, "TEST": 20, "STEPS": 100}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "split", lambda labels, seed, test: cifar.split(labels, seed, 10, 10, test))
    rows = place / "rows.jsonl"
    asked = ["--data", str(place), "--models", str(place), "--tasks", "frost", "--rows", str(rows), "--seeds", "0", "1"]
    asked += ["--epsilon", "inf", "4", "--markdown", str(place / "table.md")]
    recipe.main([*asked, "--public", str(place / "public.parquet")])
    runs = Ledger(rows).runs()
    assert len(runs) == 2 * (1 + 4 * 2)
    assert all(run.result["epsilon"] <= 4 for run in runs if run.key["epsilon"] is not None)
    # Untuned, the network itself on the test images.
    network = cifar_networks.load_network("resnet26", place)
    images = cifar.read_images(place, "frost")
    test = cifar.split(images.labels, 0, 10, 10, 20).test
    with torch.no_grad():
        logits = network(cifar_networks.normalise(images.pixels[test], "resnet26"))
    untuned = [run.result["test"] for run in runs if run.key["basis"] == "none"]
    assert untuned[0] == accuracy(logits, images.labels[test])
    text = (place / "table.md").read_text()
    assert text.startswith("| task | features | not tuned | no noise | epsilon 4 |")
    assert f"| frost | PCA | {plus_minus(untuned)} | " in text
    # Nothing is computed twice, and the table needs no data.
    recipe.main(["--table", *asked[4:]])
    assert (place / "table.md").read_text() == text
    assert len(recipe.public_images(str(place / "public.parquet"), str(place)).pixels) == 30
    with pytest.raises(DataError, match=r"all_private\.parquet holds no image that is not also in"):
        recipe.public_images(str(place / "all_private.parquet"), str(place))
