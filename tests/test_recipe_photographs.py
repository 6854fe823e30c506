"""The recipe of photographs on a miniature of its folder: copies, splits, tables from rows; a short run (slow)."""

import numpy as np
import pytest
from scripts import script

PIL = pytest.importorskip("PIL.Image")
for needed in ("timm", "datasets", "rich", "matplotlib"):
    pytest.importorskip(needed)

from miniatures import cache_changes_nothing  # noqa: E402
from test_corruptions import write_model  # noqa: E402

from paper.choice_tables import COLUMNS, LITE0, TASKS  # noqa: E402
from peft_surgical.errors import DataError  # noqa: E402
from peft_surgical.evaluation import plus_minus  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")
CLASSES = ("ant", "bee", "cow")
PARTS = ("source", "source_test", "tuning", "validation", "test")


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "photographs.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Every domain with 20 images of three classes, and ``model``."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for domain in dict.fromkeys(domain for pair in TASKS.values() for domain in pair):
        for number, name in enumerate(CLASSES):
            folder = root / "photos" / domain / name
            folder.mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 180, (10, 12, 3))
                pixels[..., number] += 70
                PIL.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    write_model(root / "model", classes=10)
    return root


def files(data):
    return {part: set(getattr(data, part)["file"]) for part in PARTS}


def test_prepared_copies_have_a_shorter_side_of_80_pixels(recipe, place, tmp_path, capsys):
    recipe.main(["--prepare", "--data", str(place / "photos"), "--output", str(tmp_path)])
    copies = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg"))
    originals = sorted(path.relative_to(place / "photos") for path in (place / "photos").rglob("*.png"))
    assert [copy.with_suffix(".png") for copy in copies] == originals
    with PIL.open(tmp_path / copies[0]) as copy:
        assert (copy.size, copy.mode) == ((96, 80), "RGB")


def test_parts_are_disjoint_and_all_seeds_have_the_same_test_images(recipe, place):
    by_seed = [files(recipe.read_photographs(str(place / "photos"), "sketch", 5, seed)) for seed in range(3)]
    for found in by_seed:
        assert sum(map(len, found.values())) == len(set.union(*found.values()))
        assert {part: len(found[part]) for part in PARTS} == {
            "source": 3 * 18,
            "source_test": 3 * 2,
            "tuning": 3 * 5,
            "validation": 3 * 3,  # half as many, rounded up
            "test": 3 * 10,  # of 20 images, half are kept to tune on
        }
        for part, domain in (("source", "photo"), ("tuning", "sketch"), ("validation", "sketch"), ("test", "sketch")):
            assert {file.split("/")[1] for file in found[part]} == {domain}
    for part in ("source", "source_test", "test"):
        assert by_seed[0][part] == by_seed[1][part] == by_seed[2][part]
    assert by_seed[0]["tuning"] != by_seed[1]["tuning"]
    # More per class: the test images stay, and so does the order in which a seed draws.
    more = files(recipe.read_photographs(str(place / "photos"), "sketch", 6, 0))
    assert more["test"] == by_seed[0]["test"]
    assert by_seed[0]["tuning"] < more["tuning"]


def test_two_tasks_have_other_images(recipe, place):
    one, other = (recipe.read_photographs(str(place / "photos"), task, 5, 0) for task in ("sketch", "photo"))
    assert one.fingerprint != other.fingerprint
    assert tuple(one.label_names) == CLASSES


def test_what_is_not_there_is_named(recipe, place, tmp_path):
    with pytest.raises(DataError, match=r"pacs/photo holds no class folders with images: --data takes the folder of"):
        recipe.read_photographs(str(tmp_path), "sketch", 5, 0)
    with pytest.raises(SystemExit, match="2"):
        recipe.main(["--output", str(tmp_path)])


def row(ledger, task, method, seed, test, lr=None, size=5, **more):
    key = {"recipe": "photographs", "task": task, "per_class": size, "method": method, "lr": lr, "seed": seed}
    result = {"validation": 0.5, "source": 0.9, "cost": 10.0, "n": 30, **more}
    ledger.append(key, result | ({} if test is None else {"test": test}))


def drawn(recipe, folder, *more):
    asked = ["--table", "--output", str(folder), "--seeds", "0", "1", "--tasks", "sketch", "photo", "--per-class", "5"]
    recipe.main([*asked, "--markdown", str(folder / "table.md"), *more])
    lines = (folder / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_tables_are_drawn_from_rows_alone(recipe, tmp_path, capsys):
    ledger = Ledger(tmp_path / "rows.jsonl")
    # On the test images of both tasks, which the seeds share.
    gains = {"sketch": (0.75, 0.85), "photo": (0.65, 0.75)}
    for task, own in gains.items():
        for seed in (0, 1):
            row(ledger, task, "none", seed, 0.40, cost=0.0)
            timed = {"seconds": 30.0} if task == "sketch" else {}
            row(ledger, task, "auto", seed, own[seed], cost=40.0, chosen="block6 at 0.001, all labels", **timed)
            row(ledger, task, "logistic-head", seed, 0.55)
            row(ledger, task, "head", seed, 0.50, lr=1e-2)
            for place, block in enumerate(LITE0):
                best = {0: "block2", 1: "block3"}[seed]
                row(ledger, task, block, seed, 0.60 + place / 100, lr=1e-3, validation=0.8 if block == best else 0.5)
        # Two rates of all: seed 0 validates the larger one best, and tests it on both seeds.
        row(ledger, task, "all", 0, None, lr=1e-4, validation=0.4)
        for seed in (0, 1):
            row(ledger, task, "all", seed, 0.70, lr=1e-3, seconds=10.0)
    lines = drawn(recipe, tmp_path)
    columns = [name for name in COLUMNS if name not in ("lp-ft", "spd")]  # of which there are no rows
    header = lines.index(["task", "per class", *columns])
    sketch = dict(zip(lines[header], lines[header + 2], strict=True))
    assert sketch["task"] == "sketch"
    assert sketch["auto"] == plus_minus([0.75, 0.85])
    assert sketch["all"] == plus_minus([0.70, 0.70])
    assert sketch["Cross-Val"] == plus_minus([0.61, 0.62])  # block2 and block3
    assert sketch["oracle"] == plus_minus([0.66, 0.66])  # block7
    minus = {line[0]: line for line in lines if len(line) == 5}
    assert minus["all"][1:] == ["10.0", "0.0", plus_minus([0.10, 0.0]), "0.0"]
    assert minus["none"][4] == "30.0"
    (costs,) = [line for line in lines if line[0] == "5 per class, steps"]
    found = dict(zip(columns[2:-1], costs[1:], strict=True))
    assert (found["auto"], found["head"], found["Cross-Val"]) == ("4", "1", "7")  # that of all seven blocks
    (costs,) = [line for line in lines if line[0] == "5 per class, seconds"]
    assert costs[1:] == ["-", "-", "-", "3"]  # of sketch, whose runs were timed
    assert ["photo", "5", "block6 at 0.001", "block6 at 0.001"] in lines
    assert lines[-1][:4] == ["photo", "5", *map(plus_minus, ([0.60, 0.60], [0.61, 0.61]))]  # of every block


@pytest.mark.slow
def test_a_short_study_leaves_rows_and_tables(recipe, place, tmp_path, capsys):
    asked = ["--data", str(place / "photos"), "--model", str(place / "model"), "--output", str(tmp_path), "--cpu"]
    asked += ["--tasks", "webcam", "--per-class", "4", "--seeds", "0", "1", "--epochs", "1", "--source-epochs", "1"]
    asked += ["--target", "all", "head", "--method", "logistic-head", "--all-lr", "1e-3", "--head-lr", "1e-2"]
    recipe.main(asked)
    rows = {(run.key["method"], run.key["seed"]): run.result for run in Ledger(tmp_path / "rows.jsonl")}
    assert set(rows) == {(method, seed) for method in ("none", "all", "head", "logistic-head") for seed in (0, 1)}
    for found in rows.values():
        assert found["n"] == 30
        assert 0 <= found["source"] <= 1
    with pytest.raises(DataError, match=r"no longer has its adapter: name the --rows that it wrote, or another --out"):
        recipe.main([*asked, "--rows", str(tmp_path / "others.jsonl")])
    before = (tmp_path / "rows.jsonl").read_bytes()
    recipe.main(asked)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_cached_prefix_changes_nothing(recipe, place, tmp_path):
    asked = ["--data", str(place / "photos"), "--model", str(place / "model"), "--cpu", "--tasks", "webcam"]
    asked += ["--per-class", "4", "--seeds", "0", "1", "--epochs", "2", "--source-epochs", "1", "--target", "head"]
    cache_changes_nothing(recipe.main, lambda folder: [*asked, "--output", str(folder)], tmp_path)
