"""Reading images as people have them: folders, parquet files, the Hub; and everything that can be wrong with them."""

import io
import os
import pickle
import warnings

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.data.images import content, to_rgb  # noqa: E402
from peft_surgical.data.incoming import read_incoming  # noqa: E402
from peft_surgical.data.labelled import collate, items, read_data  # noqa: E402
from peft_surgical.data.splits import allot, draw, level  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def picture(seed, size=8):
    return PIL.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def fill(root, counts, start=0, suffix=".png"):
    """Class folders with this many different images each."""
    seed = start
    for name, n in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / name / f"{i}{suffix}").write_bytes(
                encoded(picture(seed), PIL.registered_extensions()[suffix.lower()])
            )
            seed += 1
    return root


def write_parquet(file, labels, feature=None, start=0, image="image", label="label"):
    rows = {image: [{"bytes": encoded(picture(start + i)), "path": None} for i in range(len(labels))], label: labels}
    features = None if feature is None else datasets.Features({image: datasets.Image(), label: feature})
    if feature is None:
        import pandas

        pandas.DataFrame(rows).to_parquet(file)
    else:
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return file


def labels_of(part):
    return part.select_columns(["label"])["label"][:]


def files_of(part):
    return part.select_columns(["file"])["file"][:]


# What is read


def test_class_folders(tmp_path):
    fill(tmp_path, {"dog": 10, "cat": 10})
    data = read_data(tmp_path)
    assert data.label_names == ("cat", "dog")
    assert {name: len(part) for name, part in data.parts.items()} == {"tuning": 16, "validation": 4}
    assert sorted(labels_of(data.validation)) == [0, 0, 1, 1]
    assert data.test is None
    assert data.origin["validation"] == "drawn: seed 0, class-balanced, 2 per class of the tuning images"
    assert data.tuning[0]["image"].size == (8, 8)
    assert data.tuning.features["label"].names == ["cat", "dog"]
    for row in (data.tuning[0], data.tuning[-1]):
        assert row["file"].split("/")[0] == data.label_names[row["label"]]
    assert "16 images" in str(data)
    assert data.fingerprint in str(data)


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "Val"])
def test_split_folders(tmp_path, validation):
    fill(tmp_path / "train", {"a": 3, "b": 2})
    fill(tmp_path / validation, {"a": 1, "b": 1}, start=100)
    fill(tmp_path / "test", {"b": 2}, start=200)
    data = read_data(tmp_path)
    assert {name: len(part) for name, part in data.parts.items()} == {"tuning": 5, "validation": 2, "test": 2}
    assert set(data.origin.values()) == {"given"}
    assert labels_of(data.test) == [1, 1]


def test_hidden_files_mixed_case_and_deeper_folders(tmp_path):
    fill(tmp_path, {"a": 5, "b": 4, ".cache": 1, "__MACOSX": 1})
    (tmp_path / "b" / "patient1").mkdir()
    (tmp_path / "b" / "patient1" / "X.PnG").write_bytes(encoded(picture(77)))
    (tmp_path / "a" / "._0.png").write_bytes(b"no image")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "Thumbs.db").write_text("x")
    data = read_data(tmp_path, validation=2)
    assert data.label_names == ("a", "b")
    assert "b/patient1/X.PnG" in files_of(data.tuning) + files_of(data.validation)
    assert len(data.tuning) + len(data.validation) == 10


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([0, 1] * 5, datasets.ClassLabel(names=["land", "water"]), ("land", "water")),
        (["w", "l"] * 5, None, ("l", "w")),
        ([0, 1] * 5, None, ("0", "1")),
        ([True, False] * 5, None, ("False", "True")),
    ],
)
def test_parquet_labels(tmp_path, labels, feature, names):
    file = write_parquet(tmp_path / "set.parquet", labels, feature)
    data = read_data(file)
    assert data.label_names == names
    assert sorted(labels_of(data.tuning)) == [0] * 4 + [1] * 4
    rows = {
        int(f.rsplit(" ", 1)[1]): label for f, label in zip(files_of(data.tuning), labels_of(data.tuning), strict=True)
    }
    spelled = labels if feature is None else [feature.names[i] for i in labels]
    assert all(names[number] == str(spelled[row]) for row, number in rows.items())
    assert files_of(data.tuning)[0].startswith("set.parquet row ")


def test_parquet_folder_with_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test")):
        write_parquet(
            tmp_path / "data" / f"{name}.parquet", [0, 1] * 2, datasets.ClassLabel(num_classes=2), start=10 * i
        )
    data = read_data(tmp_path)
    assert {name: len(part) for name, part in data.parts.items()} == {"tuning": 8, "validation": 4, "test": 4}
    listed = read_data(sorted((tmp_path / "data").iterdir()))
    assert listed.fingerprint == data.fingerprint


def test_splits_that_number_their_classes_differently_meet_by_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1, 0, 1], datasets.ClassLabel(names=["a", "b"]))
    write_parquet(tmp_path / "val.parquet", [0, 0], datasets.ClassLabel(names=["b"]), start=50)
    data = read_data(tmp_path)
    assert data.label_names == ("a", "b")
    assert labels_of(data.validation) == [1, 1]


def test_hub_id_with_config_and_saved_folder(tmp_path, monkeypatch):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [picture(i) for i in range(12)], "label": [0, 1] * 6}
    train = datasets.Dataset.from_dict(rows, features=features)
    asked = []
    found = datasets.DatasetDict({"train": train, "test": train.select([0, 1]), "unlabelled": train.select([2])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or found)
    with pytest.warns(UserWarning, match=r"2 image\(s\) of test are byte for byte in tuning too"):
        data = read_data("owner/flowers:small")
    assert asked == [("owner/flowers", "small")]
    assert {n: len(part) for n, part in data.parts.items()} == {"tuning": 10, "validation": 2, "test": 2}
    assert files_of(data.test)[0] == "owner/flowers:small test row 0"
    train.save_to_disk(tmp_path / "saved")
    assert read_data(tmp_path / "saved").fingerprint == read_data(train).fingerprint


# Splits


def test_draws_are_seeded_balanced_and_nested(tmp_path):
    fill(tmp_path, {"a": 30, "b": 12})
    data = read_data(tmp_path, seed=3)
    again = read_data(str(tmp_path), seed=3)
    assert data.fingerprint == again.fingerprint != read_data(tmp_path, seed=4).fingerprint
    assert np.bincount(labels_of(data.validation)).tolist() == [4, 4]  # a fifth of the average class
    few, more = (read_data(tmp_path, tuning=n, test=4, validation=0.1) for n in (4, 8))
    assert set(files_of(few.tuning)) < set(files_of(more.tuning))
    assert files_of(few.test) == files_of(more.test)
    assert files_of(few.validation) == files_of(more.validation)
    parts = [set(files_of(part)) for part in more.parts.values()]
    assert [len(part) for part in parts] == [8, 4, 4]
    assert len(set.union(*parts)) == 16
    assert more.origin["tuning"] == "drawn: seed 0, class-balanced, 4 per class of 42 given"


def test_subset_of_a_given_part(tmp_path):
    fill(tmp_path / "train", {"a": 6, "b": 6})
    fill(tmp_path / "test", {"a": 6, "b": 4}, start=100)
    data = read_data(tmp_path, test=4)
    assert sorted(labels_of(data.test)) == [0, 0, 1, 1]
    assert data.origin["test"].startswith("2 per class of 10 given")


def test_draw_by_hand():
    labels = np.array([1, 0, 1, 0, 1, 0])
    parts = draw(labels, {"x": 1, "y": 1}, "z", 0, ["a", "b"])
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(6))
    for rows in parts.values():
        assert sorted(labels[rows]) == [0, 1]


@pytest.mark.parametrize(
    ("counts", "options", "match"),
    [
        ({"a": 3, "b": 9}, {}, r"class 'a' has 3 images, too few to split: 5 of every class.*validation=2"),
        ({"a": 9, "b": 9}, {"validation": 17}, "validation=17: only 16 of the 18 images can be drawn for that"),
        ({"a": 9, "b": 9}, {"test": 12, "validation": 5}, "validation=5: only 4 of the 6 images can be drawn"),
        ({"a": 9, "b": 9}, {"tuning": 1}, "tuning=1: there are 2 classes, and each needs an image to tune on"),
        ({"a": 9, "b": 9}, {"validation": 0}, "validation=0: give a number of images, such as 3, or a share"),
        ({"a": 9, "b": 9}, {"test": 1.5}, r"test=1\.5: give a number"),
    ],
)
def test_sizes_that_cannot_be_had(tmp_path, counts, options, match):
    with pytest.raises(DataError, match=match):
        read_data(fill(tmp_path, counts), **options)


def counts_of(part):
    return np.bincount(labels_of(part)).tolist()


def test_sizes_that_do_not_divide_are_balanced_as_far_as_it_goes(tmp_path):
    fill(tmp_path, {"a": 30, "b": 12, "c": 3})
    data = read_data(tmp_path, tuning=20, validation=4, test=10)
    # c gives at most half of what it has; the one too many comes from the largest class.
    assert counts_of(data.test) == [5, 4, 1]
    assert counts_of(data.validation) == [2, 1, 1]
    assert counts_of(data.tuning) == [12, 7, 1]
    assert (
        data.origin["test"] == "drawn: seed 0, class-balanced as far as it goes, 1 to 5 per class of the tuning images"
    )
    few, more = (set(files_of(read_data(tmp_path, tuning=n, validation=4).tuning)) for n in (5, 18))
    assert few < more
    assert (len(few), len(more)) == (5, 18)


def test_a_part_that_is_smaller_than_asked_for_is_used_whole(tmp_path):
    fill(tmp_path / "train", {"a": 10, "b": 7})
    fill(tmp_path / "test", {"a": 6, "b": 3}, start=100)
    with pytest.warns(UserWarning, match="test=40: there are 9, and all of them are taken"):
        data = read_data(tmp_path, test=40, validation=4)
    assert counts_of(data.test) == [6, 3]
    assert data.origin["test"] == "given, all there are (40 asked for)"
    assert counts_of(read_data(tmp_path, test=7, validation=4).test) == [4, 3]
    with pytest.warns(UserWarning, match="tuning=5000: there are 13"):
        data = read_data(tmp_path, tuning=5000, validation=4)
    assert counts_of(data.tuning) == [8, 5]
    assert data.origin["tuning"].endswith("of 17 given, all there are (5000 asked for)")


def test_draws_that_divide_take_the_same_images_as_ever(tmp_path):
    labels = np.repeat([0, 1, 2], [9, 6, 12])
    sizes = {"test": 2, "validation": 1, "tuning": 3}
    wanted = {split: 3 * n for split, n in sizes.items()}
    each = allot(np.bincount(labels), wanted, rest=False)
    assert {split: n.tolist() for split, n in each.items()} == {split: [n] * 3 for split, n in sizes.items()}
    by_class, by_number = draw(labels, each, None, 7, "abc"), draw(labels, sizes, None, 7, "abc")
    rng = np.random.default_rng(7)
    first = [rng.permutation(np.flatnonzero(labels == label))[:2] for label in range(3)]
    assert by_class["test"].tolist() == np.sort(np.concatenate(first)).tolist()
    assert all(np.array_equal(by_class[split], by_number[split]) for split in sizes)
    # All but one of a class for a part that divides, as before.
    assert allot(np.array([4, 9]), {"validation": 6}, rest=True)["validation"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("size", "room", "found"),
    [(0, [3, 3], [0, 0]), (4, [1, 5], [1, 3]), (3, [2, 5], [1, 2]), (6, [1, 5, 0], [1, 5, 0])],
)
def test_level_by_hand(size, room, found):
    assert level(size, np.array(room)).tolist() == found


def test_three_per_class_with_a_size(tmp_path):
    data = read_data(fill(tmp_path, {"a": 3, "b": 3}), validation=2)
    assert (len(data.tuning), len(data.validation)) == (4, 2)


def test_fingerprint_is_of_content_not_of_places(tmp_path):
    a, b = (fill(tmp_path / name, {"a": 6, "b": 6}) for name in "xy")
    assert read_data(a).fingerprint == read_data(b).fingerprint
    (b / "a" / "0.png").write_bytes(encoded(picture(999)))
    assert read_data(a).fingerprint != read_data(b).fingerprint


# What can be wrong


def test_folders_that_are_wrong(tmp_path):
    with pytest.raises(DataError, match="is empty: it needs one folder"):
        read_data(tmp_path)
    fill(tmp_path / "flat", {"": 2})
    with pytest.raises(DataError, match=r"2 images in .*flat have no labels: put each into a folder"):
        read_data(tmp_path / "flat")
    fill(tmp_path / "hollow", {"a": 5, "b": 0})
    (tmp_path / "hollow" / "b" / "x.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"class folder .*b holds no image \(1 \.heic\).*\.png"):
        read_data(tmp_path / "hollow")
    fill(tmp_path / "one", {"a": 5})
    with pytest.raises(DataError, match=r"one class only \(a\)"):
        read_data(tmp_path / "one")
    fill(tmp_path / "half", {"val/a": 1, "val/b": 1})
    with pytest.raises(DataError, match=r"has val/ but no train/"):
        read_data(tmp_path / "half")
    fill(tmp_path / "odd", {"train/a": 5, "train/b": 5, "extra/a": 1})
    with pytest.raises(DataError, match=r"extra holds images but is none of the splits"):
        read_data(tmp_path / "odd")
    fill(tmp_path / "two", {"val/a": 1, "valid/b": 1})
    with pytest.raises(DataError, match="both look like the validation split"):
        read_data(tmp_path / "two")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes as POSIX has them")
def test_links_that_lead_back_and_files_that_are_none(tmp_path):
    """A link to a folder above listed its images 40 levels deep, and a pipe was waited for without end."""
    root = tmp_path / "root"
    fill(root, {"a/deep": 5, "b": 5})
    for name, goal in (("a/back", "."), ("a/deep/up", "a"), ("b/self", "b")):
        (root / name).symlink_to(root / goal, target_is_directory=True)
    os.mkfifo(root / "a" / "pipe.png")
    (root / "b" / "null.jpg").symlink_to("/dev/null")
    left_out = r"left out of .*1 \.jpg that are no regular files, 1 \.png that are no regular files"
    with pytest.warns(UserWarning, match=left_out):
        data = read_data(root, on_broken="later")
    assert sum(map(len, data.parts.values())) == 10
    with pytest.warns(UserWarning, match=left_out):
        assert len(read_incoming(root, unlabelled=True)) == 10
    with pytest.raises(ValueError, match=r"pipe\.png' is no regular file"):
        content({"bytes": None, "path": str(root / "a" / "pipe.png")})


def test_names_that_are_not_utf8(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.png"))
    for reading in (read_data, lambda place: read_incoming(place, unlabelled=True)):
        with pytest.raises(DataError, match=r"udcff\.png' has a name that is not UTF-8: rename it"):
            reading(tmp_path)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "x" * 5000, "\udcff"])
def test_names_that_lead_nowhere(name):
    for reading in (read_data, read_incoming):
        with pytest.raises(DataError, match="does not exist"):
            reading(name)
    with pytest.raises(DataError, match="unknown base"):
        load_base(name)


def test_superscripts_are_no_numbers_to_sort_by(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "3²4.png")
    assert any(file.endswith("3²4.png") for file in read_incoming(tmp_path).files)


def test_files_that_are_left_out_are_named(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "x.dcm").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out of .*1 \.dcm"):
        read_data(tmp_path)
    (tmp_path / "a" / "x.dcm").unlink()
    fill(tmp_path, {"": 1}, start=50)
    with pytest.warns(UserWarning, match=r"1 image\(s\) lie beside the class folders"):
        read_data(tmp_path)


def test_class_that_no_tuning_image_has(tmp_path):
    fill(tmp_path / "train", {"cat": 2, "dog": 2})
    fill(tmp_path / "test", {"Cat": 1}, start=100)
    with pytest.raises(DataError, match=r"test/Cat/0.png in the test split.*'Cat' \(did you mean 'cat'\?\)"):
        read_data(tmp_path, validation=2)
    write_parquet(tmp_path / "train.parquet", [0, 1] * 5, datasets.ClassLabel(names=["a", "b", "c"]))
    write_parquet(tmp_path / "val.parquet", [2], datasets.ClassLabel(names=["a", "b", "c"]), start=50)
    with pytest.raises(DataError, match=r"val.parquet row 0 in the validation split has the class 'c'"):
        read_data([tmp_path / "train.parquet", tmp_path / "val.parquet"])


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0.5, 1.0], r"holds 0\.5 for x\.parquet row 0: floats name no classes.*astype\(int\)"),
        (["a", None], r"holds None for x\.parquet row 1: every image needs a label"),
        ([[0], [1]], r"one class per image is needed"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, match):
    with pytest.raises(DataError, match=match):
        read_data(write_parquet(tmp_path / "x.parquet", labels))


def test_numbers_that_are_no_class_numbers(tmp_path):
    with pytest.warns(UserWarning, match="labels 3, 7 are numbered anew"):
        data = read_data(write_parquet(tmp_path / "x.parquet", [3, 7] * 5))
    assert data.label_names == ("3", "7")
    with pytest.raises(DataError, match=r"holds -1 for y\.parquet row 2.*unlabelled"):
        read_data(write_parquet(tmp_path / "y.parquet", [0, 1, -1], datasets.ClassLabel(num_classes=2)))


def test_unlabelled_test_split_is_left_out(tmp_path):
    feature = datasets.ClassLabel(num_classes=2)
    write_parquet(tmp_path / "train.parquet", [0, 1] * 5, feature)
    write_parquet(tmp_path / "test.parquet", [-1, -1], feature, start=50)
    with pytest.warns(UserWarning, match="test split has no labels"):
        assert read_data(tmp_path).test is None


def test_columns(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", ["a", "b"] * 5, image="scan", label="finding")
    with pytest.raises(DataError, match=r"columns scan \(bytes and path\), finding \(.*string\): say.*image_column="):
        read_data(file)
    with pytest.raises(DataError, match=r"the labels by label_column="):
        read_data(file, image_column="scan")
    with pytest.raises(DataError, match=r"label_column='diagnosis': .* has no such column"):
        read_data(file, image_column="scan", label_column="diagnosis")
    with pytest.raises(DataError, match=r"column 'finding' of .* no images"):
        read_data(file, image_column="finding", label_column="finding")
    assert read_data(file, image_column="scan", label_column="finding").label_names == ("a", "b")


def test_sources_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist: pass an image folder"):
        read_data(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"'owner/nothing' is no file or folder here, and cannot be loaded from the Hub"
    ):
        read_data("owner/nothing")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(DataError, match=r"x\.csv is no parquet file"):
        read_data(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_text("a")
    with pytest.raises(DataError, match=r"x\.parquet is no readable parquet file"):
        read_data(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="3 is no data"):
        read_data(3)
    with pytest.raises(ConfigError, match="on_broken='ignore': choose one of raise, skip, later"):
        read_data(tmp_path, on_broken="ignore")


def test_parquet_names_that_say_a_split_only_sometimes(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "more.parquet", [0, 1])
    with pytest.raises(DataError, match=r"more\.parquet says no split by its name, but .*train\.parquet does"):
        read_data(tmp_path)


def test_broken_images(tmp_path):
    fill(tmp_path, {"a": 6, "b": 6})
    whole = encoded(picture(5, 64), "JPEG")
    (tmp_path / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "text.png").write_text("not found")
    with pytest.raises(DataError, match=r"a/cut\.jpg cannot be decoded \(.*b/text\.png.*on_broken=\"skip\""):
        read_data(tmp_path, validation=0.5)
    with pytest.warns(UserWarning, match=r"left out 2 image\(s\): a/cut\.jpg"):
        data = read_data(tmp_path, on_broken="skip", validation=2)
    assert len(data.tuning) + len(data.validation) == 12
    later = read_data(tmp_path, on_broken="later", validation=2)
    dataset = items(later.tuning, lambda image: torch.zeros(3, *image.size))
    with pytest.raises(DataError, match=r"(cut\.jpg|text\.png) cannot be decoded"):
        [dataset[i] for i in range(len(dataset))]


def test_image_that_is_gone(tmp_path):
    data = read_data(fill(tmp_path, {"a": 5, "b": 5}))
    dataset = items(data.tuning, lambda image: torch.zeros(3))
    (tmp_path / files_of(data.tuning)[0]).unlink()
    with pytest.raises(DataError, match=r"cannot be read \(.*No such file"):
        dataset[0]


def test_duplicates_across_parts(tmp_path):
    fill(tmp_path / "train", {"a": 5, "b": 5})
    fill(tmp_path / "test", {"a": 1, "b": 1}, start=100)
    (tmp_path / "test" / "a" / "copy.png").write_bytes((tmp_path / "train" / "b" / "0.png").read_bytes())
    with pytest.warns(UserWarning, match=r"1 image\(s\) of test .* such as test/a/copy\.png and train/b/0\.png"):
        read_data(tmp_path, validation=2, seed=1)


# Single images and batches


def modes():
    rgb = picture(1)
    grey16 = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    alpha = rgb.copy()
    alpha.putalpha(PIL.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4))))
    palette = rgb.quantize(4)
    clear = palette.copy()
    clear.info["transparency"] = bytes([0, 128, 255, 255])
    scaled = np.repeat(np.round(grey16 / 257)[..., None], 3, 2).astype(np.uint8)
    grey = np.asarray(rgb.convert("L"))
    return [
        ("grey", rgb.convert("L"), np.repeat(grey[..., None], 3, 2), "PNG"),
        ("black and white", rgb.convert("1"), np.asarray(rgb.convert("1").convert("RGB")), "PNG"),
        ("palette", palette, np.asarray(palette.convert("RGB")), "PNG"),
        ("transparent palette", clear, np.asarray(palette.convert("RGB")), "PNG"),
        ("RGBA", alpha, np.asarray(rgb), "PNG"),
        ("16 bit", PIL.fromarray(grey16), scaled, "PNG"),
        ("16 bit TIFF", PIL.fromarray(grey16), scaled, "TIFF"),
        ("32 bit", PIL.fromarray(grey16.astype(np.int32)), scaled, "TIFF"),
        ("CMYK", rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB")), "TIFF"),
        ("YCbCr", rgb.convert("YCbCr"), np.asarray(rgb.convert("YCbCr").convert("RGB")), None),
    ]


@pytest.mark.parametrize(("image", "expected", "form"), [pytest.param(*row[1:], id=row[0]) for row in modes()])
def test_modes_become_rgb(tmp_path, image, expected, form):
    found = to_rgb(image)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), expected)
    if form:
        from peft_surgical.data.images import decode, fault

        assert np.array_equal(np.asarray(decode(encoded(image, form), "x")), expected)
        assert fault(encoded(image, form), "x") is None


def test_modes_without_a_range(tmp_path):
    for image, match in (
        (PIL.fromarray(np.full((4, 4), 0.5, np.float32)), "x.tif holds floating-point values"),
        (PIL.fromarray(np.full((4, 4), 70000, np.int32)), "x.tif holds 32-bit values from 70000 to 70000"),
    ):
        with pytest.raises(DataError, match=match):
            to_rgb(image, "x.tif")
    fill(tmp_path, {"a": 5, "b": 5})
    PIL.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a" / "f.tif")
    with pytest.raises(DataError, match=r"a/f\.tif holds floating-point values"):
        read_data(tmp_path)


def test_orientation_of_a_camera(tmp_path):
    from peft_surgical.data.images import decode

    image = PIL.new("RGB", (8, 4))
    exif = PIL.Exif()
    exif[0x0112] = 6
    assert decode(encoded(image, "JPEG", exif=exif), "x").size == (4, 8)


def test_items_and_collate(tmp_path):
    data = read_data(fill(tmp_path, {"a": 5, "b": 5}))
    dataset = items(data.tuning, _as_tensor)
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert batch["pixel_values"].shape == (8, 3, 8, 8)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == labels_of(data.tuning)
    first = np.asarray(PIL.open(tmp_path / files_of(data.tuning)[0]))
    assert np.array_equal(batch["pixel_values"][0].permute(1, 2, 0).numpy(), first)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["pixel_values"], batch["pixel_values"][0])
    with pytest.raises(DataError, match=r"shapes \[\(3, 1, 1\), \(3, 2, 2\)\]: the transform"):
        collate([{"pixel_values": torch.zeros(3, n, n), "labels": 0} for n in (1, 2)])


def _as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_nothing_is_said_about_sound_data(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_data(fill(tmp_path, {"a": 5, "b": 5}, suffix=".JPG"))
