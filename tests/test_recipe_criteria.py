"""What a criterion's choice is worth, from rows made by hand on the miniature of CIFAR-10-C."""

import pytest
from miniatures import cifar10c_files
from scripts import script

from paper import cifar, cifar_networks
from peft_surgical import score_blocks
from peft_surgical.choosing import CRITERIA
from peft_surgical.errors import DataError
from peft_surgical.training.ledger import Ledger

pytestmark = pytest.mark.usefixtures("own_datasets_cache")

ACCURACY = {"block1": 0.7, "block2": 0.8, "block3": 0.6, "head": 0.4}
VALIDATION = {"block1": 0.9, "block2": 0.5, "block3": 0.5, "head": 0.95}


@pytest.fixture(scope="module")
def criteria():
    return script("recipes", "criteria.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return cifar10c_files(tmp_path_factory.mktemp("world"))


def rows_in(folder):
    rows = Ledger(folder / "rows.jsonl")
    sizes = {"tuning_images": 20, "validation_images": 10, "test_images": 10}
    for method, test in ACCURACY.items():
        key = {"recipe": "cifar10c", "network": "resnet26", "task": "frost", "method": method, "seed": 0, **sizes}
        # The smaller rate validates better, and is the one that was tested.
        rows.append({**key, "lr": 1e-3}, {"validation": VALIDATION[method], "test": test})
        rows.append({**key, "lr": 1e-1}, {"validation": VALIDATION[method] / 2})
    return rows.file


def test_the_choice_of_every_criterion_is_looked_up(criteria, world, tmp_path):
    asked = ["--rows", str(rows_in(tmp_path)), "--networks", "resnet26", "--markdown", str(tmp_path / "table.md")]
    criteria.main([*asked, "--data", str(world / "data"), "--models", str(world)])
    (scores,) = [run.result for run in Ledger(tmp_path / "criteria.jsonl")]
    assert set(scores) == set(CRITERIA)

    # By hand: the same 20 images as one batch.
    images = cifar.read_images(world / "data", "frost")
    tuned = cifar.split(images.labels, 0, 20, 10, 10).tune
    pixels = cifar_networks.normalise(images.pixels[tuned], "resnet26")
    base = cifar_networks.load_network("resnet26", world)
    by_hand = score_blocks(base, [(pixels, images.labels[tuned])], "rgn")
    assert scores["rgn"] == pytest.approx(dict(by_hand), rel=1e-4)

    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) > 4}
    best = max(scores["rgn"], key=scores["rgn"].get)
    assert table["rgn"][0] == f"{100 * (ACCURACY[best] - 0.8):.1f}"
    assert table["Cross-Val"][0] == "-10.0"  # block1 validates best of the blocks
    assert table["Cross-Val with head"][0] == "-40.0"
    assert table["Cross-Val with head"][2:] == ["0 of 1", "head 1"]
    criteria.main(asked)  # what is known needs no images


def test_what_lacks_is_said(criteria, world, tmp_path, capsys):
    file = rows_in(tmp_path)
    with pytest.raises(SystemExit):
        criteria.main(["--rows", str(file)])
    assert "resnet26 on frost is not in" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"has no task with rows of block1, block2, block3, head for seeds \[0, 1\]"):
        criteria.main(["--rows", str(file), "--seeds", "0", "1"])
