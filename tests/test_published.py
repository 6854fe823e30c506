"""Published datasets: miniature copies in each layout, how they are cut and drawn, what broken ones say."""

import contextlib
import io
from unittest import mock

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

from peft_surgical.data import items  # noqa: E402
from peft_surgical.errors import DataError  # noqa: E402
from peft_surgical.published import RECIPES, Published, read_published  # noqa: E402
from peft_surgical.wilds_layouts import FMOW_CATEGORIES, REGIONS, read_rows  # noqa: E402


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


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


def encoded(seed, mode="RGB"):
    bands = {"RGB": (8, 8, 3), "RGBA": (8, 8, 4), "L": (8, 8)}[mode]
    buffer = io.BytesIO()
    PIL.fromarray(np.random.default_rng(seed).integers(0, 256, bands, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def column(part, name):
    return part.select_columns([name])[name][:]


def counts(part, name="group"):
    values, n = np.unique(column(part, name), return_counts=True)
    return dict(zip(values.tolist(), n.tolist(), strict=True))


def sizes(data):
    return {name: len(part) for name, part in data.parts.items()}


def write(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def bytes_of(n):
    return [{"bytes": encoded(i), "path": None} for i in range(n)]


# Waterbirds and CelebA: groups

# Rows of each group (label, attribute) = (0, 0), (0, 1), (1, 0), (1, 1) of each split, skewed as published.
GROUPS = {"train": (20, 2, 1, 9), "validation": (9, 9, 5, 6), "test": (4, 4, 2, 2)}


def grouped_rows():
    """(split number, label, attribute), split by split, with groups mixed."""
    rows = []
    for number, of_split in enumerate(GROUPS.values()):
        mixed = [(number, group // 2, group % 2) for group, n in enumerate(of_split) for _ in range(n)]
        rows += [mixed[i] for i in np.random.default_rng(number).permutation(len(mixed))]
    return rows


def waterbirds_folder(root, rows=None, name="waterbirds_v1.0"):
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for i, (split, label, place) in enumerate(rows or grouped_rows()):
        file = f"00{label + 1}.Some_Bird/Some_Bird_{i:04d}_{i}.jpg"
        (root / name / file).parent.mkdir(parents=True, exist_ok=True)
        (root / name / file).write_bytes(encoded(i))
        lines.append(f"{i + 1},{file},{label},{split},{place},/o/ocean/{i:08d}.jpg")
    write(root / name / "metadata.csv", lines)
    return root


def celeba_folder(root):
    folder = root / "celebA_v1.0"
    rows = grouped_rows()
    (folder / "img_align_celeba").mkdir(parents=True)
    for i in range(len(rows)):
        (folder / "img_align_celeba" / f"{i + 1:06d}.jpg").write_bytes(encoded(i))
    attributes = [f"{i + 1:06d}.jpg,-1,{2 * y - 1},{2 * m - 1},1" for i, (_, y, m) in enumerate(rows)]
    write(folder / "list_attr_celeba.csv", ["image_id,5_o_Clock_Shadow,Blond_Hair,Male,Young", *attributes])
    parts = [f"{i + 1:06d}.jpg,{split}" for i, (split, _, _) in enumerate(rows)]
    write(folder / "list_eval_partition.csv", ["image_id,partition", *parts])
    return root


def grouped_tables(name):
    """A DatasetDict as the Hub's copy: grodino/waterbirds, flwrlabs/celeba."""
    if name == "waterbirds":
        features = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["landbird", "waterbird"]),
            "place": datasets.ClassLabel(names=["land", "water"]),
        }
    else:
        attributes = ("5_o_Clock_Shadow", "Blond_Hair", "Male", "Young")
        features = {
            "image": datasets.Image(),
            "celeb_id": datasets.Value("int64"),
            **{attribute: datasets.Value("bool") for attribute in attributes},
        }
    found = datasets.DatasetDict()
    for number, split in enumerate(("train", "validation" if name == "waterbirds" else "valid", "test")):
        rows = [(label, attribute) for n, label, attribute in grouped_rows() if n == number]
        label, attribute = map(list, zip(*rows, strict=True))
        columns = {"image": bytes_of(len(rows))}
        if name == "waterbirds":
            columns |= {"label": label, "place": attribute}
        else:
            columns |= {"celeb_id": [7] * len(rows), "Blond_Hair": map(bool, label), "Male": map(bool, attribute)}
            columns |= {"5_o_Clock_Shadow": [False] * len(rows), "Young": [True] * len(rows)}
        columns = {key: list(values) for key, values in columns.items()}
        found[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return found


def parquet_folder(root, found):
    """As the Hub stores them: data/train-00000-of-00002.parquet and so on."""
    (root / "data").mkdir(parents=True)
    for split, dataset in found.items():
        for shard in range(2):
            part = dataset.shard(2, shard, contiguous=True)
            part.to_parquet(root / "data" / f"{split}-0000{shard}-of-00002.parquet")
    return root


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

# (hospital, split number) -> images of each class; the file numbers those of hospitals 1 and 2, too.
CENTERS = {(0, 0): 4, (0, 1): 2, (3, 0): 3, (3, 1): 1, (4, 0): 5, (4, 1): 2, (1, 0): 3, (1, 1): 2, (2, 0): 9, (2, 1): 6}


def camelyon_rows():
    """(patient, node, x, y, tumor, slide, center, split number), slide by slide."""
    rows = []
    for slide, ((center, split), n) in enumerate(CENTERS.items()):
        rows += [(4 + slide, slide % 5, 3328 + 32 * i, 21792, i % 2, slide, center, split) for i in range(2 * n)]
    return rows


def camelyon_folder(root, write_images=True):
    folder = root / "camelyon17_v1.0"
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i, (patient, node, x, y, tumor, slide, center, split) in enumerate(camelyon_rows()):
        lines.append(f"{i},{patient:03d},{node},{x},{y},{tumor},{slide},{center},{split}")
        stem = f"patient_{patient:03d}_node_{node}"
        (folder / "patches" / stem).mkdir(parents=True, exist_ok=True)
        if write_images:
            file = folder / "patches" / stem / f"patch_{stem}_x_{x}_y_{y}.png"
            file.write_bytes(encoded(i, "RGBA" if i % 3 else "L"))
    write(folder / "metadata.csv", lines)
    return root


def camelyon_tables():
    """A DatasetDict as wltjr1007/Camelyon17-WILDS: the validation split holds hospitals 0, 3, 4 and 1."""
    kinds = {"image_id": "uint32", "patient": "uint8", "node": "uint8", "x_coord": "uint16", "y_coord": "uint16"}
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["normal", "tumor"]),
        "center": datasets.ClassLabel(
            names=["train-center1", "val-center", "test-center", "train-center2", "train-center3"]
        ),
        **{name: datasets.Value(kind) for name, kind in kinds.items()},
        "slide": datasets.Value("uint8"),
    }
    found = {"train": [], "validation": [], "test": []}
    for i, row in enumerate(camelyon_rows()):
        center, split = row[6:]
        name = {1: "validation", 2: "test"}.get(center, ("train", "validation")[split])
        found[name].append((i, *row))
    tables = datasets.DatasetDict()
    for split, rows in found.items():
        number, patient, node, x, y, tumor, slide, center, _ = map(list, zip(*rows, strict=True))
        columns = {"image": bytes_of(len(rows)), "label": tumor, "center": center, "image_id": number}
        columns |= {"patient": patient, "node": node, "x_coord": x, "y_coord": y, "slide": slide}
        tables[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return tables


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

COUNTRIES = {"Africa": "NAM", "Asia": "JPN", "Europe": "FRA", "Americas": "USA", "Oceania": "AUS", "Other": "XKX"}


def fmow_rows(missing=("space_facility",)):
    """(split, category, timestamp, country): in Africa, no image at all of some classes."""
    rows = []
    for i, category in enumerate(FMOW_CATEGORIES):
        for country in COUNTRIES.values():
            if country == "NAM" and category in missing:
                continue
            rows.append(("train", category, f"{2002 + i % 11}-06-28T08:21:33Z", country))
            rows.append(("seq", category, "2016-01-01T00:00:00Z", country))
            rows.append(("val", category, "2012-12-31T23:59:59Z", country))
            rows.append(("val", category, "2013-01-01T00:00:00Z", country))
            rows.append(("val", category, "2015-12-31T23:59:59Z", country))
            rows.append(("test", category, "2012-03-05T10:00:00Z", country))
            rows.append(("test", category, "2016-01-01T00:00:00Z", country))
            rows.append(("test", category, "2017-08-09T10:00:00Z", country))
            rows.append(("train", category, "2016-05-05T10:00:00Z", country))
    return rows


def fmow_folder(root, rows):
    folder = root / "fmow_v1.1"
    (folder / "images").mkdir(parents=True)
    lines = [f'{s},{c}_{i}_rgb.jpg,"POLYGON ((1 2, 3 4))",{c},{t},{k}' for i, (s, c, t, k) in enumerate(rows)]
    write(folder / "rgb_metadata.csv", ["split,img_filename,polygon,category,timestamp,country_code", *lines])
    write(
        folder / "country_code_mapping.csv",
        [
            "name,alpha-2,alpha-3,country-code,iso_3166-2,region,sub-region,intermediate-region,region-code,"
            "sub-region-code,intermediate-region-code",
            'Antarctica,AQ,ATA,010,ISO 3166-2:AQ,"","","","","",""',
            'Australia,AU,AUS,036,ISO 3166-2:AU,Oceania,Australia and New Zealand,"",009,053,""',
            'France,FR,FRA,250,ISO 3166-2:FR,Europe,Western Europe,"",150,155,""',
            'Japan,JP,JPN,392,ISO 3166-2:JP,Asia,Eastern Asia,"",142,030,""',
            "Namibia,NA,NAM,516,ISO 3166-2:NA,Africa,Sub-Saharan Africa,Southern Africa,002,202,018",
            'United States of America,US,USA,840,ISO 3166-2:US,Americas,Northern America,"",019,021,""',
        ],
    )
    return root


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
        "validation": 61,
        "test": 122,
    }
    assert set(counts(data.tuning, "label").values()) == {1}
    africa = REGIONS.index("Africa")
    assert set(column(data.test, "group")) == set(column(data.tuning, "group")) == {africa}
    assert set(column(data.source, "group")) == set(range(6))
    spans = {"source": "train", "source_validation": "val", "source_test": "test", "tuning": "val", "test": "test"}
    for name, part in data.parts.items():
        for file, label, group in zip(*(column(part, c) for c in ("file", "label", "group")), strict=True):
            split, category, timestamp, country = rows[int(file.removeprefix("images/rgb_img_").removesuffix(".png"))]
            assert split == spans.get(name, "val")
            assert category == FMOW_CATEGORIES[label]
            assert COUNTRIES[REGIONS[group]] == country
            year = int(timestamp[:4])
            assert year < 2013 if "source" in name else year >= 2016 if name == "test" else 2013 <= year <= 2015
    assert data.origin["tuning"] == "drawn: seed 0, 1 of each class of the validation split in Africa, 2013 to 2015"
    assert data.origin["test"] == "given: the test split in Africa, 2016 on"


def test_fmow_with_another_region_and_years(tmp_path):
    rows = fmow_rows()
    fmow_folder(tmp_path, rows)
    data = read("fmow", tmp_path, region="Oceania", years=(2012, 2015), validation=62)
    assert counts(data.tuning) == counts(data.validation) == {REGIONS.index("Oceania"): 62}
    assert len(data.test) == 62
    assert len(data.source_test) == len(data.source_validation) == 62 * 6 - 1 - 62  # the target's are taken out
    with pytest.raises(
        DataError, match=r"class 'airport' has 2 image\(s\) in the validation split in Asia, 2013 to 2015, a"
    ):
        read("fmow", tmp_path, region="Asia", tuning=62 * 3)
    with pytest.raises(DataError, match=r"no image in the validation split in Asia, 2001 to 2001 to draw from"):
        read("fmow", tmp_path, region="Asia", years=(2001, 2001))
    with pytest.raises(
        DataError, match=r"no image is left for the validation part of fmow \(the rest of the validation"
    ):
        read("fmow", tmp_path, region="Asia", tuning=124)
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
