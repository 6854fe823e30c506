"""The MEMO recipes: selection and tables from ledgers that the tests write, streams on tiny data."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scripts import script

from paper import cifar, cifar_networks, cifar_tasks
from peft_surgical.errors import DataError
from peft_surgical.evaluation import wilson_interval
from peft_surgical.experiment import adapting
from peft_surgical.training.ledger import Ledger, canonical

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "memo_cifar10c.py")


@pytest.fixture
def world(recipe, tmp_path, monkeypatch):
    """Untrained weights, and 60 random images in place of every file; splits of 10 to tune and 20 to validate."""
    for name, build in (("resnet26", cifar_networks.ResNet26), ("resnet32", cifar_networks.ResNet32)):
        file = tmp_path / "models" / cifar_networks.NETWORKS[name].checkpoint / "model.safetensors"
        file.parent.mkdir(parents=True)
        save_file(build().state_dict(), file)
    images = cifar.Images(torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(60) % 10)
    cifar_tasks.task_images.cache_clear()
    monkeypatch.setattr(cifar_tasks, "read_images", lambda place, corruption, severity: images)
    monkeypatch.setattr(recipe, "corruptions_in", lambda place: ["clean", "contrast", "fog", "frost"])
    monkeypatch.setattr(recipe, "split", lambda labels, seed, tune, validation: cifar.split(labels, seed, 10, 20))
    yield tmp_path
    cifar_tasks.task_images.cache_clear()  # of a place that is not there


def start(recipe, folder, *extra):
    shared = ["--data", "there", "--models", str(folder / "models"), "--output", str(folder), "--views", "2"]
    shared += ["--validation-images", "20", "--select-on", "frost", "--markdown", str(folder / "table.md")]
    recipe.main([*shared, *extra])
    return (folder / "table.md").read_text()


def rows_of(text, number=0):
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].splitlines()]
    return {tuple(line[:3]): line[3:] for line in lines[2:]}


def test_streams_run_once_and_are_drawn_from_the_ledger_alone(recipe, world, monkeypatch):
    options = ["--target", "head", "stem", "--method", "none", "memo", "tent", "--corruption", "frost", "fog"]
    options += ["--lr", "1e-4", "1e-2", "--episodic-lr", "1e-3", "--head-lr", "1e-3", "--tent-lr", "1e-3"]
    options += ["--images", "4", "--batch-size", "2", "--figure", str(world / "figure.png")]
    text = start(recipe, world, *options)
    runs = Ledger(world / "ledger.jsonl").runs()
    # 6 rows on 2 corruptions, and 2 candidates of one row on as many validation images as the test stream has.
    assert len(runs) == 14
    validated = [run for run in runs if run.key["part"] == "validation"]
    assert {(run.key["corruption"], run.key["target"], run.key["images"]) for run in validated} == {
        ("frost", "stem", 4)
    }
    assert {run.key["lr"] for run in validated} == {1e-4, 1e-2}
    for run in runs:
        assert run.result["accuracy"] == run.result["right"].count("1") / 4
        assert len(run.result["right"]) == run.result["n"] == 4
    assert {run.result["steps"] for run in runs} == {0, 2, 4}
    assert (world / "figure.png").stat().st_size > 1000
    assert list(rows_of(text)) == [
        ("none", "none", "none"),
        ("memo", "online", "head"),
        ("memo", "online", "stem"),
        ("memo", "episodic", "head"),
        ("memo", "episodic", "stem"),
        ("tent", "online", "norm"),
    ]
    monkeypatch.setattr(recipe, "adapt", lambda *arguments: pytest.fail("a finished run was repeated"))
    assert start(recipe, world, *options) == text
    again = [*options, "--table", "--output", str(world), "--markdown", str(world / "again.md")]
    again += ["--validation-images", "20", "--select-on", "frost", "--views", "2"]
    recipe.main(again)
    assert (world / "again.md").read_text() == text


SMALL_RATES = ["--mode", "online", "--lr", "1e-5", "1e-4", "1e-3", "--target", "conv1 + layer1.0.conv1"]
COMMITTED = {
    "memo-resnet26.md": ["--episodic-images", "400"],
    "memo-resnet26-small.md": [*SMALL_RATES, "--corruption", "gaussian_noise", "frost", "brightness", "contrast"],
}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_table_is_drawn_from_the_committed_ledger(recipe, tmp_path, name):
    options = ["--table", "--ledger", str(ROOT / "docs/results/memo.jsonl"), "--markdown", str(tmp_path / "table.md")]
    recipe.main([*options, *COMMITTED[name]])
    assert (tmp_path / "table.md").read_bytes() == (ROOT / "docs/results" / name).read_bytes()


def test_streams_at_once_are_those_of_one_after_the_other(recipe, world):
    options = ["--target", "head", "conv1 + layer1.0.conv1", "--corruption", "frost", "--images", "2"]
    options += ["--lr", "1e-4", "1e-2", "--episodic-lr", "1e-3", "--head-lr", "1e-3", "--width", "2", "--device", "cpu"]
    options += ["--select-on", "frost", "fog", "--mode"]
    found = {}
    for name, own in (("one", []), ("together", ["--streams-at-once"])):
        ledger = world / f"{name}.jsonl"
        start(recipe, world, *options, "online", "episodic", *own, "--ledger", str(ledger))
        found[name] = {canonical(run.key): run.result for run in Ledger(ledger)}
    one, together = found["one"], found["together"]
    assert set(one) == set(together)
    assert len(one) == 9  # five rows, and two candidates of one of them on two corruptions
    for key, result in together.items():
        same = ("right", "accuracy", "n", "steps", "skipped", "collapses")
        assert {name: result[name] for name in same} == {name: one[key][name] for name in same}


def test_test_images_are_those_that_nothing_else_sees(recipe, world):
    args = recipe.argparse.Namespace(data="there", severity=5, validation_images=20)
    key = {"corruption": "frost", "seed": 0, "part": "test", "images": 30}
    images, labels = recipe.stream_of(args, key)
    pixels, targets = recipe.task_images("frost", "there", 5)
    test = cifar.split(targets, 0, 10, 20).test
    found = {tuple((image * 255).round().byte().flatten().tolist()) for image in images}
    assert found == {tuple(image.flatten().tolist()) for image in pixels[test]}
    assert labels.tolist() != targets[test].tolist()  # in an order of their own
    assert torch.equal(recipe.stream_of(args, {**key, "images": 7})[0], images[:7])
    longer = recipe.stream_of(args, {**key, "images": 40})[0]
    assert len(longer) == 40
    validation = recipe.stream_of(args, {**key, "part": "validation", "images": 50})[1]
    assert len(validation) == 50
    assert validation[:20].bincount().tolist() == validation[20:40].bincount().tolist() == [2] * 10


def key_of(recipe, args, row, corruption, part, seed, index):
    return recipe.settings(args, recipe.candidates(args, row)[index], corruption, part, seed)


@pytest.fixture
def parsed(recipe, tmp_path, monkeypatch):
    """The arguments of a table over frost and fog, of seeds 0 and 1."""
    seen = []
    monkeypatch.setattr(recipe, "show", lambda args, ledger: seen.append(args))

    def parse(*extra):
        recipe.main(
            ["--table", "--output", str(tmp_path), "--corruption", "frost", "fog", "--select-on", "frost", *extra]
        )
        return seen[-1]

    return parse


def result(right, collapses=()):
    n = len(right)
    return {"accuracy": right.count("1") / n, "n": n, "right": right, "steps": n, "skipped": 0} | {
        "collapses": list(collapses),
        "seconds": 1.0,
        "cpu_seconds": 1.0,
    }


def test_rates_are_chosen_on_validation_images_of_one_corruption_and_seed(recipe, parsed, tmp_path, monkeypatch):
    args = parsed("--target", "stem", "--mode", "online", "--lr", "1e-4", "1e-3", "--seeds", "0", "1")
    ledger, row, none = Ledger(tmp_path / "ledger.jsonl"), ("memo", "stem", "online"), ("none", "none", "none")
    for index, right in enumerate(("1110", "1111")):
        ledger.append(key_of(recipe, args, row, "frost", "validation", 0, index), result(right))
        for corruption in ("frost", "fog"):
            for seed in (0, 1):
                # On test images the other rate is the better one.
                ledger.append(
                    key_of(recipe, args, row, corruption, "test", seed, index), result("1111" if index == 0 else "1100")
                )
                ledger.append(key_of(recipe, args, none, corruption, "test", seed, 0), result("1000"))
    for corruption in ("frost", "fog"):
        runs = recipe.runs_of(args, ledger, row, corruption)
        assert [(run.key["lr"], run.key["seed"]) for run in runs] == [(1e-3, 0), (1e-3, 1)]
    monkeypatch.undo()
    args.markdown, args.figure = str(tmp_path / "table.md"), None
    recipe.show(args, ledger)
    text = (tmp_path / "table.md").read_text()
    assert rows_of(text)["memo", "online", "stem"] == [
        "50.0 ± 0.0 (76.2)",
        "50.0 ± 0.0",
    ]  # with the paper's, where it is
    assert rows_of(text)["none", "none", "none"][0] == "25.0 ± 0.0 (66.9)"
    assert rows_of(text, 1)["memo", "online", "stem"] == ["+25.0 ± 0.0"] * 2
    assert rows_of(text, 2)["memo", "online", "stem"] == [*("sgd", "0.001 (an end of the grid)", "1", "250", "0", "0")]
    assert "nothing was selected on test images" in text


def test_a_cell_with_a_candidate_that_is_not_validated_is_no_choice(recipe, parsed, tmp_path):
    args = parsed("--target", "stem", "--mode", "online", "--lr", "1e-4", "1e-3")
    ledger, row = Ledger(tmp_path / "ledger.jsonl"), ("memo", "stem", "online")
    ledger.append(key_of(recipe, args, row, "frost", "validation", 0, 0), result("1111"))
    ledger.append(key_of(recipe, args, row, "frost", "test", 0, 0), result("1111"))
    assert recipe.runs_of(args, ledger, row, "frost") == []
    for data in ("one", "other"):
        key = key_of(recipe, args, row, "frost", "validation", 0, 1) | {"data": data}
        ledger.append(key, result("1111"))
    with pytest.raises(DataError, match="holds 2 runs"):
        recipe.runs_of(args, ledger, row, "frost")


def test_gains_are_paired_on_the_images_that_both_have_seen(recipe):
    def run(right):
        return recipe.Run({}, result(right))

    # Differences 0, 1, 0, 1: mean 0.5, standard deviation 0.577.
    assert recipe.gain([run("1101")], [run("100010")]) == f"+50.0 ± {196 * 0.57735 / 2:.1f}"
    two = recipe.gain([run("1100"), run("1110")], [run("1000"), run("1000")])
    assert two.startswith("+37.5 ± ")


def test_a_validation_stream_that_collapses_ends_and_the_rest_is_wrong(recipe, world, monkeypatch):
    class Stub:
        record = recipe.Record()

        def __init__(self, model, **settings):
            pass

        def __call__(self, batch):
            seen = self.record.images + len(batch)
            self.record = recipe.Record(images=seen, collapses=(1,) if seen >= 4 else ())
            return torch.eye(10)[[int(c) for c in labels[seen - len(batch) : seen]]]

    monkeypatch.setattr(adapting, "Tent", Stub)
    options = ["--method", "tent", "--corruption", "frost", "--images", "8", "--batch-size", "2", "--tent-lr", "1e-3"]
    args = recipe.argparse.Namespace(data="there", severity=5, validation_images=20, models=str(world / "models"))
    args.network = "resnet26"
    key = {"network": "resnet26", "method": "tent", "target": "norm", "mode": "online", "lr": 1e-3, "steps": 1}
    key |= {"optimizer": "adam", "batch_size": 2, "views": None, "corruption": "frost", "seed": 0, "images": 8}
    for part, right in (("validation", "11110000"), ("test", "11111111")):
        _, labels = recipe.stream_of(args, {**key, "part": part})
        assert recipe.adapt(args, {**key, "part": part})["right"] == right
    text = start(recipe, world, *options)
    assert rows_of(text, 2)["tent", "online", "norm"][-1] == "1"


def test_shorter_episodic_streams_are_compared_with_the_same_images(recipe, world):
    text = start(
        *(recipe, world, "--target", "head", "--corruption", "frost", "--images", "8", "--episodic-images", "5"),
        *("--episodic-lr", "1e-3", "--head-lr", "1e-3", "--figure", str(world / "figure.png")),
    )
    runs = {(run.key["method"], run.key["mode"]): run.result for run in Ledger(world / "ledger.jsonl")}
    assert {name: result["n"] for name, result in runs.items()} == {
        ("none", "none"): 8,
        ("memo", "online"): 8,
        ("memo", "episodic"): 5,
    }
    share = runs["none", "none"]["right"][:5].count("1") / 5
    assert rows_of(text)["none", "first 5", "none"][0].startswith(f"{wilson_interval(round(share * 5), 5)[0]:.1%}"[:-1])
    both = [[int(right) for right in runs[name]["right"][:5]] for name in (("memo", "episodic"), ("none", "none"))]
    gained = 100 * (sum(both[0]) - sum(both[1])) / 5
    assert rows_of(text, 1)["memo", "episodic", "head"][0].startswith(f"{gained:+.1f} ±")


def test_batch_statistics_alone_are_a_row(recipe, world):
    text = start(
        recipe, world, *("--network", "resnet32", "--method", "none", "bn", "--corruption", "frost"), "--images", "6"
    )
    found = {run.key["method"]: run.result["right"] for run in Ledger(world / "ledger.jsonl")}
    assert found.keys() == {"none", "bn"}
    assert "(" not in rows_of(text)["none", "none", "none"][0]  # the paper has no such network
    assert json.loads((world / "ledger.jsonl").read_text().splitlines()[1])["key"]["batch_size"] == 100


def test_shards_are_the_grid(recipe, world, monkeypatch):
    cells = []
    monkeypatch.setattr(recipe, "runs_of", lambda args, ledger, row, corruption: cells.append((row, corruption)) or [])
    monkeypatch.setattr(recipe, "show", lambda args, ledger: None)
    start_of = ["--data", "there", "--output", str(world)]
    recipe.main(start_of)
    whole, cells[:] = list(cells), []
    for part in ("1/2", "2/2"):
        recipe.main([*start_of, "--shard", part])
    assert sorted(cells) == sorted(whole)
    assert [corruption for _, corruption in whole[::11]] == ["frost", "contrast", "fog"]  # the paper's first
    with pytest.raises(SystemExit):
        recipe.main([*start_of, "--shard", "3/2"])
    with pytest.raises(SystemExit):
        recipe.main(["--output", str(world)])


# --- ImageNet-C ---


@pytest.fixture(scope="module")
def imagenet():
    pytest.importorskip("timm")
    return script("recipes", "memo_imagenet_c.py")


@pytest.fixture
def folders(tmp_path, imagenet):
    """Two corruptions of four photographs, of two of ImageNet's classes."""
    for corruption in ("frost", "fog"):
        for number, wnid in enumerate(("n01440764", "n15075141")):
            for name in ("1.JPEG", "2.JPEG"):
                file = tmp_path / "data" / corruption / "5" / wnid / name
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((40, 36), 60 + number).convert("RGB").save(file, format="JPEG")
    imagenet.listed.cache_clear()
    return tmp_path


def test_imagenet_c_folders_are_streamed(imagenet, folders, monkeypatch):
    options = ["--model", "test_resnet", "--random", "--data", str(folders / "data"), "--select-on", "fog"]
    options += ["--corruption", "frost", "fog", "--output", str(folders), "--views", "2", "--validation-images", "2"]
    options += [
        "--images",
        "2",
        "--target",
        "stem",
        "--method",
        "memo",
        "tent",
        "--lr",
        "1e-4",
        "1e-3",
        "--episodic-lr",
        "1e-3",
    ]
    options += ["--tent-lr", "1e-3", "--device", "cpu", "--markdown", str(folders / "table.md")]
    imagenet.main(options)
    runs = Ledger(folders / "ledger.jsonl").runs()
    assert len(runs) == 8  # three rows on two corruptions, and two candidates of one row
    assert sum(run.key["part"] == "validation" for run in runs) == 2
    assert all(run.result["n"] == 2 for run in runs)
    text = (folders / "table.md").read_text()
    assert [line.split(" | ")[:3] for line in text.splitlines()[2:6]] == [
        ["| none", "-", "-"],
        ["| memo", "online", "stem"],
        ["| memo", "episodic", "stem"],
        ["| tent", "online", "norm"],
    ]
    monkeypatch.setattr(imagenet, "run", lambda *arguments: pytest.fail("a finished run was repeated"))
    imagenet.main(options)
    assert (folders / "table.md").read_text() == text


def test_what_validates_on_imagenet_c_is_tested_nowhere(imagenet, folders):
    args = imagenet.argparse.Namespace(data=str(folders / "data"), validation_images=2, images=2)
    key = {"corruption": "fog", "severity": 5, "part": "validation", "seed": 0, "images": 2}
    validates = set(imagenet.stream_of(args, key).files)
    assert len(validates) == 2
    for corruption in ("frost", "fog"):
        for seed in (0, 1, 2):
            stream = imagenet.stream_of(args, {**key, "corruption": corruption, "seed": seed, "part": "test"})
            assert not validates & set(stream.files)
            assert stream.labels.tolist() == [0 if name.startswith("n01440764") else 999 for name in stream.files]
            assert stream.read(0).size == (40, 36)


def test_without_a_number_the_first_images_of_each_class_test_and_others_validate(imagenet, folders, monkeypatch):
    monkeypatch.setattr(imagenet._first_of_each, "__defaults__", (1,))
    args = imagenet.argparse.Namespace(data=str(folders / "data"), validation_images=2, images=None)
    key = {"corruption": "fog", "severity": 5, "part": "test", "seed": 0, "images": 2000}
    assert sorted(imagenet.stream_of(args, key).files) == ["n01440764/1.JPEG", "n15075141/1.JPEG"]
    key |= {"part": "validation", "images": 2}
    assert sorted(imagenet.stream_of(args, key).files) == ["n01440764/2.JPEG", "n15075141/2.JPEG"]


def test_folders_that_are_not_imagenet_c_are_refused(imagenet, folders):
    args = imagenet.argparse.Namespace(data=str(folders / "data"), validation_images=4, images=2)
    key = {"corruption": "fog", "severity": 5, "part": "test", "seed": 0, "images": 2}
    with pytest.raises(DataError, match="4 images are too few for 4 to validate"):
        imagenet.stream_of(args, key)
    with pytest.raises(DataError, match=r"no image in .*snow"):
        imagenet.stream_of(args, {**key, "corruption": "snow"})
    (folders / "data" / "fog" / "5" / "n15075141").rename(folders / "data" / "fog" / "5" / "mushroom")
    imagenet.listed.cache_clear()
    with pytest.raises(DataError, match=r"mushroom is no class of ImageNet-1k"):
        imagenet.stream_of(args, key)
