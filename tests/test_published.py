"""Published datasets: miniature copies in each layout, how they are cut and drawn, what broken ones say."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

from miniatures import (  # noqa: E402
    COUNTRIES,
    camelyon_folder,
    camelyon_rows,
    camelyon_tables,
    celeba_folder,
    fmow_folder,
    fmow_rows,
    grouped_rows,
    grouped_tables,
    parquet_folder,
    waterbirds_folder,
    write,
)

from paper.parts import Published  # noqa: E402
from paper.published import RECIPES, read_published  # noqa: E402
from paper.wilds import read_rows  # noqa: E402
from paper.wilds_folders import FMOW_CATEGORIES, REGIONS  # noqa: E402
from peft_surgical.data.labelled import items  # noqa: E402
from peft_surgical.errors import DataError  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@contextlib.contextmanager
def blindfold():
    """Any image that is opened is an error."""
    opened = AssertionError("an image was opened")
    with (
        mock.patch("PIL.Image.open", side_effect=opened),
        mock.patch.object(datasets.Image, "decode_example", side_effect=opened),
    ):
        yield


def read(name, source, **options):
    with blindfold():
        return read_published(name, source, **options)


def column(part, name):
    return part.select_columns([name])[name][:]


def counts(part, name="group"):
    values, n = np.unique(column(part, name), return_counts=True)
    return dict(zip(values.tolist(), n.tolist(), strict=True))


def sizes(data):
    return {name: len(part) for name, part in data.parts.items()}


# Waterbirds and CelebA: groups


@pytest.mark.parametrize("name", ["waterbirds", "celeba"])
def test_groups_in_every_layout(name, tmp_path, monkeypatch):
    folder = (waterbirds_folder if name == "waterbirds" else celeba_folder)(tmp_path / "wilds")
    found = grouped_tables(name)
    files = parquet_folder(tmp_path / "hub", found)
    found.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: found)
    hub = read(name, f"owner/{name}", tuning=16)
    monkeypatch.undo()
    inner = next(folder.iterdir())
    read_all = [read(name, s, tuning=16) for s in (folder, str(inner), found, files, tmp_path / "saved")]
    read_all.append(read(name, sorted((files / "data").iterdir()), tuning=16))
    for data in (hub, *read_all):
        assert isinstance(data, Published)
        assert sizes(data) == {"source": 32, "tuning": 16, "validation": 13, "test": 12}
        assert counts(data.source) == {0: 20, 1: 2, 2: 1, 3: 9}
        assert counts(data.tuning) == {0: 4, 1: 4, 2: 4, 3: 4}
        assert counts(data.validation) == {0: 5, 1: 5, 2: 1, 3: 2}
        assert counts(data.test) == {0: 4, 1: 4, 2: 2, 3: 2}
        assert data.source_validation is data.source_test is None
        assert data.tuning.features["label"].names == list(data.label_names) == list(RECIPES[name].label_names)
        for part in data.parts.values():
            assert set(part.column_names) == {"image", "label", "group", "file"}
            assert [group // 2 for group in column(part, "group")] == column(part, "label")
        # Written in the same order, so that all layouts are the same dataset.
        assert data.fingerprint == hub.fingerprint
    assert hub.origin == {
        "source": "given: the train split",
        "tuning": "drawn: seed 0, 4 of each group of the validation split",
        "validation": "the rest of the validation split",
        "test": "given: the test split",
    }
    assert "tuning: 16 images (drawn: seed 0" in str(hub)


def test_draws_of_groups_by_hand(tmp_path):
    waterbirds_folder(tmp_path)
    data = read("waterbirds", tmp_path, tuning=12, seed=5)
    validation = [(i, 2 * y + place) for i, (split, y, place) in enumerate(grouped_rows()) if split == 1]
    rng = np.random.default_rng(5)
    rows = [rng.permutation([i for i, g in validation if g == group])[:3] for group in range(4)]
    expected = sorted(np.concatenate(rows).tolist())
    assert [int(file.rsplit("_", 1)[1][:-4]) for file in column(data.tuning, "file")] == expected
    again, other = (read("waterbirds", tmp_path, tuning=12, seed=seed) for seed in (5, 6))
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert column(again.tuning, "file") == column(data.tuning, "file") != column(other.tuning, "file")
    few, more = (set(column(read("waterbirds", tmp_path, tuning=n).tuning, "file")) for n in (8, 16))
    assert few < more


def test_parts_are_disjoint_and_validation_can_be_drawn(tmp_path):
    waterbirds_folder(tmp_path)
    data = read("waterbirds", tmp_path, tuning=12, validation=8)
    assert counts(data.validation) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert data.origin["validation"] == "drawn: seed 0, 2 of each group of the validation split"
    files = [column(part, "file") for part in data.parts.values()]
    assert len(set().union(*files)) == sum(map(len, files)) == 32 + 12 + 8 + 12
    whole = read("waterbirds", tmp_path, tuning=12)
    assert len(set().union(*(column(part, "file") for part in whole.parts.values()))) == len(grouped_rows())


def test_sizes_of_the_paper(tmp_path):
    published = [(0, 0, 0)] + [(1, g // 2, g % 2) for g, n in enumerate((467, 466, 133, 133)) for _ in range(n)]
    rows = [*published, (2, 0, 0)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "place": datasets.Value("int64")}
    )
    found = datasets.DatasetDict()
    for number, split in enumerate(("train", "validation", "test")):
        of_split = [(y, place) for n, y, place in rows if n == number]
        columns = {
            "image": [None] * len(of_split),
            "label": [y for y, _ in of_split],
            "place": [p for _, p in of_split],
        }
        found[split] = datasets.Dataset.from_dict(columns, features=features)
    data = read("waterbirds", found)
    assert counts(data.tuning) == {0: 100, 1: 100, 2: 100, 3: 100}
    assert counts(data.validation) == {0: 367, 1: 366, 2: 33, 3: 33}


def test_parquet_stays_on_disk(tmp_path):
    data = read("waterbirds", parquet_folder(tmp_path, grouped_tables("waterbirds")), tuning=16)
    assert all(part.cache_files for part in data.parts.values())
    assert column(data.test, "file")[0] == "data/test-00000-of-00002.parquet row 0"
    row = items(data.test, _as_tensor)[0]
    assert row["pixel_values"].shape == (3, 8, 8)


def _as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_groups_that_are_too_small(tmp_path):
    waterbirds_folder(tmp_path)
    with pytest.raises(
        DataError,
        match=r"group 'waterbird on land' has 5 image\(s\) in the validation split, and 6 are needed "
        r"\(5 for tuning, 1 or more for validation\): ask for fewer",
    ):
        read("waterbirds", tmp_path, tuning=20)
    with pytest.raises(DataError, match=r"tuning=10 images do not divide evenly over 4 groups: ask for 8 or 12"):
        read("waterbirds", tmp_path, tuning=10)
    with pytest.raises(DataError, match=r"tuning=0\.5: give a number of images over all 4 groups, such as 4"):
        read("waterbirds", tmp_path, tuning=0.5)
    with pytest.raises(
        DataError, match=r"'landbird on land' has 9 image.*404 are needed \(400 for validation, 4 for tuning"
    ):
        read("waterbirds", tmp_path, tuning=16, validation=1600)


# Camelyon17


def test_camelyon17_in_every_layout(tmp_path):
    found = camelyon_tables()
    sources = (camelyon_folder(tmp_path), found, parquet_folder(tmp_path / "hub", found))
    for source in sources:
        data = read("camelyon17", source, tuning=8, validation=6)
        assert sizes(data) == {"source": 24, "source_validation": 10, "tuning": 8, "validation": 6, "test": 16}
        assert counts(data.source) == {0: 8, 3: 6, 4: 10}
        assert counts(data.source_validation) == {0: 4, 3: 2, 4: 4}
        for part in (data.tuning, data.validation, data.test):
            assert counts(part) == {2: len(part)}
            assert counts(part, "label") == {0: len(part) // 2, 1: len(part) // 2}
        files = [set(column(part, "file")) for part in data.parts.values()]
        assert len(set().union(*files)) == sum(map(len, files))
        assert data.group_names[2] == "hospital 2"
        assert data.label_names == ("normal", "tumor")
    assert data.origin["tuning"] == "drawn: seed 0, 4 of each class of hospital 2"
    assert data.origin["test"] == "the rest of hospital 2"
    assert data.origin["source"] == "given: the training images of hospitals 0, 3, 4"


def test_images_of_a_folder_are_the_rows(tmp_path):
    camelyon_folder(tmp_path)
    data = read("camelyon17", tmp_path, tuning=8, validation=6)
    by_file = {
        f"patches/patient_{p:03d}_node_{n}/patch_patient_{p:03d}_node_{n}_x_{x}_y_{y}.png": (tumor, center)
        for p, n, x, y, tumor, _, center, _ in camelyon_rows()
    }
    for part in data.parts.values():
        dataset = items(part, _as_tensor)
        for i, file in enumerate(column(part, "file")):
            assert by_file[file] == (column(part, "label")[i], column(part, "group")[i])
            seen = dataset[i]
            picture = np.asarray(PIL.open(tmp_path / "camelyon17_v1.0" / file).convert("RGB"))
            assert seen["labels"] == by_file[file][0]
            assert np.array_equal(seen["pixel_values"].permute(1, 2, 0).numpy(), picture)


def test_camelyon17_with_another_target(tmp_path):
    camelyon_folder(tmp_path, write_images=False)
    data = read("camelyon17", tmp_path, tuning=4, validation=2, center=3)
    assert counts(data.source) == {0: 8, 4: 10}
    assert counts(data.test) == {3: 2}
    data = read("camelyon17", tmp_path, tuning=4, validation=2, center=1)
    assert counts(data.source) == {0: 8, 3: 6, 4: 10}
    assert counts(data.test) == {1: 4}


@pytest.mark.parametrize("form", ["dict", "split", "file"])
def test_camelyon17_from_the_test_split_alone(form, tmp_path):
    test = camelyon_tables()["test"]
    source = {"dict": datasets.DatasetDict({"test": test}), "split": test, "file": tmp_path / "test.parquet"}[form]
    if form == "file":
        test.to_parquet(source)
    data = read("camelyon17", source, tuning=8, validation=6)
    assert sizes(data) == {"tuning": 8, "validation": 6, "test": 16}
    assert data.source is None
    assert set(data.origin) == {"tuning", "validation", "test"}


def test_validation_split_alone_is_not_taken_for_training_images():
    found = datasets.DatasetDict({"validation": camelyon_tables()["validation"]})
    data = read("camelyon17", found, tuning=4, validation=2, center=1)
    assert data.source is None
    assert counts(data.source_validation) == {0: 4, 3: 2, 4: 4}


def test_wrong_hospitals(tmp_path):
    camelyon_folder(tmp_path, write_images=False)
    with pytest.raises(DataError, match=r"center=5 is no hospital of camelyon17: choose one of 0, 1, 2, 3, 4"):
        read("camelyon17", tmp_path, center=5)
    with pytest.raises(DataError, match=r"the dataset has no image of hospital 2, only of 0, 3, 4: bring the split"):
        read("camelyon17", datasets.DatasetDict({"train": camelyon_tables()["train"]}))
    with pytest.raises(
        DataError, match=r"class 'normal' has 15 image\(s\) in hospital 2, and 101 are needed \(50 for val"
    ):
        read("camelyon17", tmp_path)


# FMoW


def test_fmow(tmp_path):
    rows = fmow_rows()
    fmow_folder(tmp_path, rows)
    with pytest.warns(UserWarning, match=r"no image of 1 of the 62 classes \(space_facility\)"):
        data = read("fmow", tmp_path)
    assert data.label_names == tuple(sorted(FMOW_CATEGORIES))
    assert len(data.label_names) == 62
    assert sizes(data) == {
        "source": 62 * 6 - 1,
        "source_validation": 62 * 6 - 1,
        "source_test": 62 * 6 - 1,
        "tuning": 61,
        "validation": 122,
        "test": 61,
    }
    assert set(counts(data.tuning, "label").values()) == {1}
    africa = REGIONS.index("Africa")
    assert set(column(data.test, "group")) == set(column(data.tuning, "group")) == {africa}
    assert set(column(data.source, "group")) == set(range(6))
    spans = {"source": "train", "source_test": "test", "tuning": "test", "test": "test"}  # all others: val
    for name, part in data.parts.items():
        for file, label, group in zip(*(column(part, c) for c in ("file", "label", "group")), strict=True):
            split, category, timestamp, country = rows[int(file.removeprefix("images/rgb_img_").removesuffix(".png"))]
            assert split == spans.get(name, "val")
            assert category == FMOW_CATEGORIES[label]
            assert COUNTRIES[REGIONS[group]] == country
            year = int(timestamp[:4])
            assert year < 2013 if "source" in name else 2013 <= year <= 2015 if name == "validation" else year >= 2016
    assert data.origin["tuning"] == "drawn: seed 0, 1 of each class of the test split in Africa, 2016 on"
    assert data.origin["validation"] == "given: the validation split in Africa, 2013 to 2015"
    assert data.origin["test"] == "the rest of the test split in Africa, 2016 on"
    assert not set(column(data.tuning, "file")) & set(column(data.test, "file"))
    with pytest.warns(UserWarning, match="space_facility"):
        before = read("fmow", tmp_path, tune_on="validation")
    assert [sizes(before)[part] for part in ("tuning", "validation", "test")] == [61, 61, 122]
    assert before.origin["tuning"] == "drawn: seed 0, 1 of each class of the validation split in Africa, 2013 to 2015"
    assert before.origin["test"] == "given: the test split in Africa, 2016 on"
    with pytest.raises(DataError, match=r"tune_on='train': choose test or validation"):
        read("fmow", tmp_path, tune_on="train")


def test_fmow_with_another_region_and_years(tmp_path):
    rows = fmow_rows()
    fmow_folder(tmp_path, rows)
    data = read("fmow", tmp_path, region="Oceania", years=(2012, 2015), validation=62, tune_on="validation")
    assert counts(data.tuning) == counts(data.validation) == {REGIONS.index("Oceania"): 62}
    assert len(data.test) == 62
    assert len(data.source_test) == len(data.source_validation) == 62 * 6 - 1 - 62  # the target's are taken out
    with pytest.raises(
        DataError, match=r"class 'airport' has 2 image\(s\) in the validation split in Asia, 2013 to 2015, a"
    ):
        read("fmow", tmp_path, region="Asia", tuning=62 * 3, tune_on="validation")
    with pytest.raises(DataError, match=r"no image in the validation split in Asia, 2001 to 2001 to draw from"):
        read("fmow", tmp_path, region="Asia", years=(2001, 2001), tune_on="validation")
    with pytest.raises(
        DataError, match=r"no image is left for the validation part of fmow \(the rest of the validation"
    ):
        read("fmow", tmp_path, region="Asia", tuning=124, tune_on="validation")
    with pytest.raises(
        DataError, match=r"region='Antarctica' is no region of fmow: choose one of Asia, Europe, Africa"
    ):
        read("fmow", tmp_path, region="Antarctica")
    with pytest.raises(DataError, match=r"years=\(2016, 2013\): give the first and the last year"):
        read("fmow", tmp_path, years=(2016, 2013))


def test_fmow_of_antarctica_and_broken_tables(tmp_path):
    row = ("val", "airport", "2013-01-01T00:00:00Z", "ATA")
    rows = read_rows("fmow", fmow_folder(tmp_path / "ice", [row]))
    assert rows.facts["region"].tolist() == [REGIONS.index("Other")]
    for column_number, value, match in (
        (0, "dev", r"has the split 'dev': it is train, val, test or seq"),
        (1, "airfield", r"has the category 'airfield', which is none of airport, "),
        (2, "yesterday", r"a timestamp in .*rgb_metadata.csv does not begin with a year \(.*'yest'"),
    ):
        wrong = [value if i == column_number else cell for i, cell in enumerate(row)]
        with pytest.raises(DataError, match=match):
            read("fmow", fmow_folder(tmp_path / value, [wrong]))
    (tmp_path / "ice" / "fmow_v1.1" / "country_code_mapping.csv").unlink()
    with pytest.raises(DataError, match=r"country_code_mapping.csv does not exist: unpack the whole archive"):
        read("fmow", tmp_path / "ice")


# What can be wrong


def test_names_and_options_that_mean_nothing(tmp_path):
    with pytest.raises(
        DataError, match=r"'birds' is no published .*: choose one of waterbirds, celeba, camelyon17, fmow"
    ):
        read("birds", tmp_path)
    with pytest.raises(
        DataError, match=r"region='Asia' means nothing for camelyon17, which knows center: leave it out"
    ):
        read("camelyon17", tmp_path, region="Asia")
    with pytest.raises(DataError, match=r"center=2 means nothing for celeba, which knows no such options"):
        read("celeba", tmp_path, center=2)


def test_sources_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match=r"nowhere does not exist: pass a folder that holds waterbirds_v1.0/metadata.csv, .*"
        r"Hub id grodino/waterbirds",
    ):
        read("waterbirds", tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"holds neither rgb_metadata.csv nor parquet files: pass a folder that holds fmow_v1.1"
    ):
        read("fmow", tmp_path)
    with pytest.raises(
        DataError, match=r"'owner/nothing' is no file or folder here, and cannot be loaded from the Hub"
    ):
        read("celeba", "owner/nothing")
    (tmp_path / "metadata.txt").write_text("x")
    with pytest.raises(DataError, match=r"metadata.txt is no parquet file: pass"):
        read("celeba", tmp_path / "metadata.txt")
    with pytest.raises(DataError, match=r"3 is no data: pass"):
        read("celeba", 3)
    with pytest.raises(DataError, match=r"the dataset has the splits\s+and none is called train"):
        read("celeba", datasets.DatasetDict())
    with pytest.raises(DataError, match=r"the dataset is a table, and no table of fmow is published: pass a folder"):
        read("fmow", grouped_tables("waterbirds"))


def test_tables_that_do_not_fit():
    found = grouped_tables("waterbirds")
    with pytest.raises(
        DataError, match=r"train split of the dataset has no column Blond_Hair, Male, it has image, label, pl"
    ):
        read("celeba", found)
    with pytest.raises(DataError, match=r"the dataset has no validation split: train, validation and test are needed"):
        read("waterbirds", datasets.DatasetDict({"train": found["train"], "test": found["test"]}))
    paths = found["test"].remove_columns("image").add_column("image", ["x"] * len(found["test"]))
    with pytest.raises(DataError, match=r"column 'image' of the test split of the dataset holds no images"):
        read("waterbirds", datasets.DatasetDict({**found, "test": paths}))
    for values, match in (
        ([2] * 12, r"row 0 of the dataset has the label 2: waterbirds knows 0, 1"),
        (["landbird"] * 12, r"column 'label' of the test split of the dataset holds no whole numbers"),
        ([None, *[0] * 11], r"column 'label' of the test split of the dataset has 1 empty cell"),
    ):
        wrong = found["test"].remove_columns("label").add_column("label", values)
        with pytest.raises(DataError, match=match):
            read("waterbirds", datasets.DatasetDict({**found, "test": wrong}))


def test_folders_that_do_not_fit(tmp_path):
    waterbirds_folder(tmp_path / "split", [(3, 0, 0)])
    with pytest.raises(
        DataError, match=r"metadata.csv has the split 3: it is 0 \(train\), 1 \(validation\) or 2 \(test\)"
    ):
        read("waterbirds", tmp_path / "split")
    waterbirds_folder(tmp_path / "place", [(0, 0, 7)])
    with pytest.raises(DataError, match=r"Some_Bird_0000_0.jpg of .* has the place 7: waterbirds knows 0, 1"):
        read("waterbirds", tmp_path / "place")
    camelyon_folder(tmp_path, write_images=False)
    with pytest.raises(
        DataError, match=r"metadata.csv cannot be read \(.*img_filename.*needs the columns img_filename, y, pl"
    ):
        read("waterbirds", tmp_path / "camelyon17_v1.0")
    celeba_folder(tmp_path)
    partition = tmp_path / "celebA_v1.0" / "list_eval_partition.csv"
    write(partition, partition.read_text().splitlines()[:-1])
    with pytest.raises(DataError, match=r"list_attr_celeba.csv and list_eval_partition.csv of .* list other images"):
        read("celeba", tmp_path)
    (fmow_folder(tmp_path, fmow_rows()) / "fmow_v1.1" / "images").rmdir()
    with pytest.raises(DataError, match=r"images does not exist: .* has the list of images without them; unpack them"):
        read("fmow", tmp_path)


def test_image_that_is_missing_or_broken_is_named_when_it_is_read(tmp_path):
    waterbirds_folder(tmp_path)
    data = read("waterbirds", tmp_path, tuning=16)
    gone, broken = column(data.tuning, "file")[:2]
    (tmp_path / "waterbirds_v1.0" / gone).unlink()
    (tmp_path / "waterbirds_v1.0" / broken).write_bytes(b"404")
    dataset = items(read("waterbirds", tmp_path, tuning=16).tuning, _as_tensor)
    with pytest.raises(DataError, match=rf"{gone} cannot be read \(.*No such file"):
        dataset[0]
    with pytest.raises(DataError, match=rf"{broken} cannot be decoded"):
        dataset[1]
    assert dataset[2]["pixel_values"].shape == (3, 8, 8)
