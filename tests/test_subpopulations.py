"""Living-17 and Entity-30 as data: a miniature ImageNet of their classes, its parts by hand, what broken ones say."""

import contextlib
import io
import itertools
import json
from collections import Counter
from unittest import mock

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

from paper.breeds import BENCHMARKS, ROOT, breeds  # noqa: E402
from paper.subpopulations import imagenet_parts, read_breeds  # noqa: E402
from peft_surgical.data.labelled import items  # noqa: E402
from peft_surgical.errors import DataError  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def write_hierarchy(folder, name):
    """The three files for a benchmark with as few classes as its design allows."""
    design = BENCHMARKS[name]
    # From the root down to the level above the superclasses.
    chain = [ROOT, *[f"dummy{level}" for level in range(1, design.level)]]
    if design.ancestor != ROOT:
        chain[1] = design.ancestor
    edges = [f"{above} {below}" for above, below in itertools.pairwise(chain)]
    names = [f"{node}\tnode {node}" for node in chain]
    for number in range(design.superclasses):
        node = f"n1{number:07d}"
        edges.append(f"{chain[-1]} {node}")
        names.append(f"{node}\tsuper {number}, alias")
        edges += [f"{node} {wnid_of(number * design.subclasses + sub)}" for sub in range(design.subclasses)]
    total = design.superclasses * design.subclasses
    classes = [[number, wnid_of(number), f"class {number}, alias"] for number in range(total)]
    folder.mkdir(parents=True)
    (folder / "dataset_class_info.json").write_text(json.dumps(classes))
    (folder / "class_hierarchy.txt").write_text("".join(f"{edge}\n" for edge in edges))
    (folder / "node_names.txt").write_text("".join(f"{line}\n" for line in names))
    return folder


def wnid_of(number):
    return f"n0{number:07d}"


def write_imagenet(folder, classes, train, val, size=8):
    """``train/n.../n..._1.JPEG`` and ``val/n.../ILSVRC2012_val_00000001.JPEG``, so many of each class."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        for part, count in (("train", train), ("val", val)):
            place = folder / part / wnid_of(number)
            place.mkdir(parents=True)
            for image in range(count):
                buffer = io.BytesIO()
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                PIL.fromarray(pixels).save(buffer, "JPEG")
                file = f"{wnid_of(number)}_{image}" if part == "train" else f"ILSVRC2012_val_{number * val + image:08d}"
                (place / f"{file}.JPEG").write_bytes(buffer.getvalue())
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``modified`` and ``imagenet`` of Living-17: 68 classes with 3 training and 2 validation images each."""
    root = tmp_path_factory.mktemp("living17")
    write_hierarchy(root / "modified", "living17")
    write_imagenet(root / "imagenet", 68, train=3, val=2)
    return root


def read(place, name="living17", **options):
    """Without opening an image."""
    opened = AssertionError("an image was opened")
    train, val = imagenet_parts(place / "imagenet")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("PIL.Image.open", side_effect=opened))
        stack.enter_context(mock.patch.object(datasets.Image, "decode_example", side_effect=opened))
        given = {"hierarchy": place / "modified", "train": train, "val": val, "tuning": 34, "validation": 17}
        return read_breeds(name, **{**given, **options})


def column(part, name):
    return part.select_columns([name])[name][:]


def test_parts_are_the_designs(place):
    data = read(place)
    assert {name: len(part) for name, part in data.parts.items()} == {
        "source": 34 * 3,
        "source_test": 34 * 2,
        "tuning": 34,
        "validation": 17,
        "test": 34 * 2,
    }
    assert data.source_validation is None
    benchmark = breeds(place / "modified", "living17")
    assert data.label_names == tuple(f"super {number}" for number in range(17))
    for part, folder, domain in (
        ("source", "train", "source"),
        ("source_test", "val", "source"),
        ("tuning", "train", "target"),
        ("validation", "train", "target"),
        ("test", "val", "target"),
    ):
        rows = data.parts[part]
        assert set(rows.column_names) == {"image", "label", "group", "file"}
        label_of = benchmark.labels(domain)
        for file, label, group in zip(column(rows, "file"), column(rows, "label"), column(rows, "group"), strict=True):
            where, wnid, _ = file.split("/")
            assert where == folder
            assert label_of[wnid] == label
            assert data.group_names[group] == f"class {int(wnid[1:])} ({int(wnid[1:])})"
    assert Counter(column(data.tuning, "label")) == dict.fromkeys(range(17), 2)
    assert Counter(column(data.validation, "label")) == dict.fromkeys(range(17), 1)
    files = [file for part in data.parts.values() for file in column(part, "file")]
    assert len(set(files)) == len(files)
    # Groups are those of the source first, superclass by superclass.
    first = benchmark.superclasses[0]
    assert [f"({sub.index})" for sub in (*first.source, *first.target)] == [
        name.split()[-1] for name in data.group_names[:4]
    ]
    assert data.origin["tuning"] == (
        "drawn: seed 0, 2 of each superclass of the training images of 34 other subclasses"
    )
    assert str(data).endswith(f"17 classes, 68 groups, fingerprint {data.fingerprint}")


def test_images_are_those_of_their_files(place):
    data = read(place)
    row = 5
    file = column(data.test, "file")[row]
    with PIL.open(place / "imagenet" / file) as image:
        expected = np.asarray(image)
    shown = items(data.test, lambda image: np.asarray(image))[row]
    np.testing.assert_array_equal(shown["pixel_values"], expected)
    assert shown["labels"] == column(data.test, "label")[row]


def test_draws_are_seeded_and_nested(place):
    data, again, other = (read(place, seed=seed) for seed in (3, 3, 4))
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert column(again.tuning, "file") == column(data.tuning, "file") != column(other.tuning, "file")
    for part in ("source", "source_test", "test"):
        assert column(data.parts[part], "file") == column(other.parts[part], "file")
    few = read(place, seed=3, tuning=17)
    assert set(column(few.tuning, "file")) < set(column(data.tuning, "file"))
    assert column(few.validation, "file") == column(data.validation, "file")


def test_the_fingerprint_does_not_depend_on_the_place(place, tmp_path):
    before = read(place).fingerprint
    (tmp_path / "imagenet").symlink_to(place / "imagenet")
    (tmp_path / "modified").symlink_to(place / "modified")
    assert read(tmp_path).fingerprint == before
    assert read(place, validation=34).fingerprint != before


def test_sizes_of_the_paper(place, tmp_path):
    """50 of each superclass to tune and 50 to validate: 850 and 850 of Living-17."""
    train = tmp_path / "train"
    for number in range(68):
        (train / wnid_of(number)).mkdir(parents=True)
        for image in range(50):
            (train / wnid_of(number) / f"{image}.JPEG").touch()
    data = read(place, train=train, tuning=None, validation=None)
    assert Counter(column(data.tuning, "label")) == dict.fromkeys(range(17), 50)
    assert Counter(column(data.validation, "label")) == dict.fromkeys(range(17), 50)


def test_entity30_has_30_superclasses_of_8_classes(tmp_path):
    write_hierarchy(tmp_path / "modified", "entity30")
    for part in ("train", "val"):
        for number in range(240):
            (tmp_path / "imagenet" / part / wnid_of(number)).mkdir(parents=True)
            (tmp_path / "imagenet" / part / wnid_of(number) / "0.JPEG").touch()
    data = read(tmp_path, "entity30", tuning=60, validation=30)
    assert {name: len(part) for name, part in data.parts.items()} == {
        "source": 120,
        "source_test": 120,
        "tuning": 60,
        "validation": 30,
        "test": 120,
    }
    assert len(data.label_names) == 30
    assert len(data.group_names) == 240


def test_wrong_folders_are_named(place, tmp_path):
    imagenet = place / "imagenet"
    with pytest.raises(DataError, match=r"is the folder above ImageNet's train images: pass .*train$"):
        read(place, train=imagenet)
    with pytest.raises(DataError, match=r"is the folder above ImageNet's val images: pass .*val$"):
        read(place, val=imagenet)
    with pytest.raises(DataError, match="for the training and for the validation images"):
        read(place, val=imagenet / "train")
    with pytest.raises(DataError, match=r"^dataset_class_info.json, .* not in .*nowhere"):
        read(place, hierarchy=tmp_path / "nowhere")
    with pytest.raises(DataError, match="is no folder: pass the one that holds ImageNet's folders"):
        read(place, train=tmp_path / "nowhere")
    with pytest.raises(DataError, match="unknown benchmark 'living-17'"):
        read(place, "living-17")


def test_missing_classes_and_images_are_named(place, tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    for folder in (place / "imagenet" / "train").iterdir():
        if folder.name != wnid_of(7):
            (train / folder.name).symlink_to(folder)
    with pytest.raises(DataError, match=rf"train has no folder for 1 of 68 classes, first {wnid_of(7)}: pass"):
        read(place, train=train)
    with pytest.raises(
        DataError, match=r"imagenet.train: class 'super 0' has 6 images to draw from, and 7 are needed \(1 for val"
    ):
        read(place, tuning=17 * 6)
    with pytest.raises(DataError, match="tuning=20 images do not divide evenly over 17 classes: ask for 17 or 34"):
        read(place, tuning=20)
    with pytest.raises(DataError, match="validation=0: give a number of images"):
        read(place, validation=0)


def test_the_parts_of_imagenet_are_found(place, tmp_path):
    imagenet = place / "imagenet"
    assert imagenet_parts(str(imagenet)) == (imagenet / "train", imagenet / "val")
    kaggle = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    for part in ("train", "val"):
        (kaggle / part).mkdir(parents=True)
    assert imagenet_parts(tmp_path / "kaggle") == (kaggle / "train", kaggle / "val")
    with pytest.raises(DataError, match=r"train is one part of ImageNet: pass the folder above it, .*imagenet$"):
        imagenet_parts(imagenet / "train")
    with pytest.raises(DataError, match="nowhere is no folder: pass the one that holds ImageNet's train/ and val/"):
        imagenet_parts(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no train/ and no val/: both are needed"):
        imagenet_parts(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has no val/: both are needed, each with a folder for every class"):
        imagenet_parts(tmp_path)
