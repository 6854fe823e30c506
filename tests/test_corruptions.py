"""ImageNet-C as data: miniature folders and tables in the published layouts, and networks that keep their head."""

import contextlib
import io
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

from paper.corruptions import CORRUPTIONS, check_cells, open_classifier, read_imagenet_c  # noqa: E402
from peft_surgical.data.labelled import items  # noqa: E402
from peft_surgical.errors import DataError  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def encoded(seed, size=8, shade=0):
    pixels = np.random.default_rng(seed).integers(0, 100, (size, size, 3)) + shade
    buffer = io.BytesIO()
    PIL.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_cell(root, corruption, severity, each=4, wnids=WNIDS, size=8):
    """``<corruption>/<severity>/<WordNet id>/ILSVRC2012_val_00000001.JPEG``; a class is a shade."""
    for label, wnid in enumerate(wnids):
        place = root / corruption / str(severity) / wnid
        place.mkdir(parents=True)
        for image in range(each):
            number = label * each + image
            content = encoded(100 * severity + number, size, shade=150 * label // len(wnids))
            (place / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(content)
    return root


def write_model(folder, classes=4, size=32, **config):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    network = timm.create_model(
        "test_resnet", num_classes=classes, pretrained_cfg_overlay={"input_size": (3, size, size)}
    )
    timm.models.save_for_hf(network, folder, model_config=config or None, safe_serialization=True)
    return folder


def read(source, corruption="frost", severity=5, **options):
    """Without opening an image."""
    opened = AssertionError("an image was opened")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("PIL.Image.open", side_effect=opened))
        stack.enter_context(mock.patch.object(datasets.Image, "decode_example", side_effect=opened))
        return read_imagenet_c(source, corruption, severity, **{"tuning": 4, "validation": 4, "test": 0, **options})


def column(part, name):
    return part.select_columns([name])[name][:]


@pytest.fixture
def folder(tmp_path):
    """Two cells, with notes beside the classes."""
    root = write_cell(tmp_path / "imagenet-c", "frost", 5)
    write_cell(root, "fog", 3)
    (root / "frost" / "5" / "README.txt").touch()
    (root / "frost" / "5" / WNIDS[0] / "notes.txt").touch()
    return root


def test_a_cell_is_drawn_by_class(folder):
    data = read(folder)
    assert {name: len(part) for name, part in data.parts.items()} == {"tuning": 4, "validation": 4, "test": 8}
    assert data.source is data.source_validation is data.source_test is None
    assert data.label_names == WNIDS == tuple(data.tuning.features["label"].names)
    for part, each in (("tuning", 1), ("validation", 1), ("test", 2)):
        rows = data.parts[part]
        assert set(rows.column_names) == {"image", "label", "group", "file"}
        assert Counter(column(rows, "label")) == dict.fromkeys(range(4), each)
        assert set(column(rows, "group")) == {0}
        for file, label in zip(column(rows, "file"), column(rows, "label"), strict=True):
            assert file.startswith(f"frost/5/{WNIDS[label]}/ILSVRC2012_val_")
    files = [file for part in data.parts.values() for file in column(part, "file")]
    assert len(set(files)) == len(files) == 16
    assert data.origin == {
        "tuning": "drawn: seed 0, 1 of each class of frost, severity 5",
        "validation": "drawn: seed 0, 1 of each class of frost, severity 5",
        "test": "the rest of frost, severity 5",
    }


def test_sizes_of_the_paper(tmp_path):
    for wnid in WNIDS:
        (tmp_path / "frost" / "5" / wnid).mkdir(parents=True)
        for image in range(27):
            (tmp_path / "frost" / "5" / wnid / f"{image}.JPEG").touch()
    data = read(tmp_path, tuning=None, validation=None, test=None)
    assert {name: len(part) for name, part in data.parts.items()} == {"tuning": 20, "validation": 40, "test": 40}
    assert data.origin["test"] == "drawn: seed 0, 10 of each class of frost, severity 5"
    data = read(tmp_path, tuning=None, validation=None, test=0)
    assert len(data.test) == 4 * (27 - 15)
    assert data.origin["test"] == "the rest of frost, severity 5"


def test_images_are_those_of_their_files(folder):
    data = read(folder)
    file = column(data.test, "file")[3]
    with PIL.open(folder / file) as image:
        expected = np.asarray(image)
    shown = items(data.test, lambda image: np.asarray(image))[3]
    np.testing.assert_array_equal(shown["pixel_values"], expected)


def test_draws_are_seeded_nested_and_of_the_same_photographs(folder):
    data, again, other = (read(folder, seed=seed) for seed in (1, 1, 2))
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert column(again.tuning, "file") == column(data.tuning, "file") != column(other.tuning, "file")
    more = read(folder, seed=1, tuning=8)
    assert set(column(data.tuning, "file")) < set(column(more.tuning, "file"))
    assert column(more.validation, "file") == column(data.validation, "file")
    fog = read(folder, "fog", 3, seed=1)
    assert fog.fingerprint != data.fingerprint
    for part, rows in data.parts.items():
        photographs = [file.rsplit("/", 1)[1] for file in column(rows, "file")]
        assert photographs == [file.rsplit("/", 1)[1] for file in column(fog.parts[part], "file")]


# The copy on the Hub: parquet files with the columns image and label


def table(names=None, classes=range(4), each=4):
    labels = [label for label in classes for _ in range(each)]
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": kind}))


def test_the_hubs_copy(tmp_path, monkeypatch):
    asked = []

    def load(*given, **options):
        asked.append((given, options))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = read("WNJXYK/TTA-ImageNet-C")
    monkeypatch.undo()
    # The images have the severity that is asked for, and no other.
    (given, options), *more = asked
    assert not more
    assert given == ("WNJXYK/TTA-ImageNet-C",)
    assert options == {"data_files": "data/frost/severity_5/*.parquet", "split": "train"}
    assert {name: len(part) for name, part in hub.parts.items()} == {"tuning": 4, "validation": 4, "test": 8}
    assert hub.label_names == ("0", "1", "2", "3")
    assert column(hub.test, "file")[0].startswith("frost/severity_5 row ")

    place = tmp_path / "data" / "frost" / "severity_5"
    place.mkdir(parents=True)
    for shard in range(2):
        table().shard(2, shard, contiguous=True).to_parquet(place / f"train-0000{shard}-of-00002.parquet")
    local = read(tmp_path)
    assert local.fingerprint == hub.fingerprint
    row = items(local.test, lambda image: np.asarray(image))[0]
    number = int(column(local.test, "file")[0].rsplit(" ", 1)[1])
    np.testing.assert_array_equal(row["pixel_values"], np.asarray(PIL.open(io.BytesIO(encoded(number)))))
    assert row["labels"] == number // 4


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda: table(classes=(0, 1, 3)), "has images of 3 of 4 classes: fetch all of its files"),
        (lambda: table(names=("a", "b", "c", "d", "e")), "has images of 4 of 5 classes"),
        (lambda: table(classes=(-1, 0, 1)), "has images of 3 of 2 classes"),
        (lambda: table().rename_column("label", "wnid"), "say which holds the labels"),
        (
            lambda: table().remove_columns("label").add_column("label", list("abcdabcdabcdabcd")),
            "column 'label' of o/n frost severity_5 holds 'a': the number of a class is needed",
        ),
    ],
)
def test_tables_that_do_not_fit(found, match, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: found())
    with pytest.raises(DataError, match=match):
        read("o/n")


def test_what_cannot_be_loaded_says_which_files_to_bring(monkeypatch):
    def offline(*given, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError,
        match=r"data/frost/severity_5/\*.parquet of 'o/n' cannot be loaded from the Hub \(offline\): check the name, "
        r"or pass a folder with frost/5/<WordNet id>/\*.JPEG",
    ):
        read("o/n")


# What is not there


def test_wrong_names_and_folders(folder, tmp_path):
    with pytest.raises(DataError, match="unknown corruption 'rain': choose one of gaussian_noise, "):
        read(folder, "rain")
    with pytest.raises(DataError, match="severity=6: choose one of 1, 2, 3, 4, 5"):
        read(folder, severity=6)
    with pytest.raises(DataError, match="frost has no folder 2, but 5: unpack the whole archive of frost"):
        read(folder, severity=2)
    with pytest.raises(DataError, match=r"has no folder snow: .* of ImageNet-C's corruptions it has frost, fog"):
        read(folder, "snow")
    with pytest.raises(DataError, match=r"frost lies in .*imagenet-c: pass that"):
        read(tmp_path)
    for inside in (folder / "frost", folder / "frost" / "5"):
        with pytest.raises(DataError, match=r"is one corruption or severity: .* all corruptions, .*imagenet-c$"):
            read(inside)
    with pytest.raises(DataError, match="nowhere does not exist: pass the folder of ImageNet-C's corruptions, or the"):
        read(tmp_path / "nowhere")


def test_missing_images_are_named(folder):
    with pytest.raises(DataError, match=r"frost, severity 5: class 'n01440764' has 4 images to draw from, and 7 are"):
        read(folder, tuning=20)
    with pytest.raises(DataError, match="tuning=5 images do not divide evenly over 4 classes: ask for 4 or 8"):
        read(folder, tuning=5)
    for image in (folder / "frost" / "5" / WNIDS[2]).iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"n01484850 holds no image: unpack the archive again"):
        read(folder)
    (folder / "fog" / "4").mkdir()
    with pytest.raises(DataError, match=r"4 has 0 class folder\(s\): it needs one for every class"):
        read(folder, "fog", 4)
    (folder / "data" / "snow" / "severity_1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"severity_1 holds no parquet file: fetch those of data/snow/severity_1"):
        read(folder, "snow", 1)


def test_cells_are_looked_for_before_the_first_is_run(folder, tmp_path):
    assert check_cells(folder, ["frost"], [5]) == [("frost", 5)]
    with pytest.raises(DataError, match="frost has no folder 3"):
        check_cells(folder, ["frost", "fog"], [5, 3])
    with pytest.raises(DataError, match="nowhere does not exist"):
        check_cells(tmp_path / "nowhere", ["fog"], [1])
    assert len(check_cells("owner/name", CORRUPTIONS, [1, 5])) == 30


# Networks


def test_the_head_is_kept_whatever_the_outputs_are_called(tmp_path):
    pytest.importorskip("timm")
    named = write_model(tmp_path / "named", label_names=["tench", "goldfish", "shark", "tiger shark"])
    base = open_classifier(named, label_names=WNIDS, head="auto", seed=0)
    assert not base.head_is_new
    torch.manual_seed(1)
    import timm

    expected = timm.create_model("test_resnet", num_classes=4, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    found = base.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    random = open_classifier(named, label_names=WNIDS, head="new", weights="random")  # as a dry run does
    assert random.classes == 4


def test_other_numbers_of_classes_are_refused(tmp_path):
    model = write_model(tmp_path / "model", classes=6)
    with pytest.raises(DataError, match=r"model has 6 outputs, and the data has 4 classes: the head is kept, so bring"):
        open_classifier(model, label_names=WNIDS)
    headless = write_model(tmp_path / "headless", classes=0)
    with pytest.raises(DataError, match=r"headless has 0 outputs, .* or a network whose outputs are these 4$"):
        open_classifier(headless, label_names=WNIDS)
