"""Streams of images with and without labels."""

import pytest
import torch
from PIL import Image

from peft_surgical import ConfigError, DataError
from peft_surgical.data.incoming import read_incoming

datasets = pytest.importorskip("datasets")


def write(folder, names, value=0):
    """One image per name, whose grey tells it apart."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value + number,) * 3).save(file)


def greys(stream):
    return [stream.read(i).getpixel((0, 0))[0] for i in range(len(stream))]


def test_a_folder_of_images_is_a_stream_without_labels(tmp_path):
    write(tmp_path, ["b.png", "a.jpeg", ".hidden.png", "c.PNG"], value=100)
    (tmp_path / "notes.txt").write_text("no image")
    stream = read_incoming(tmp_path)
    assert stream.files == ("a.jpeg", "b.png", "c.PNG")
    assert greys(stream) == [101, 100, 103]
    assert (stream.labels, stream.label_names, stream.fingerprint) == (None, None, None)
    assert read_incoming(tmp_path, limit=2).files == ("a.jpeg", "b.png")


def test_subfolders_are_classes_unless_one_says_otherwise(tmp_path):
    write(tmp_path, [f"{day}/{i}.png" for day in ("monday", "tuesday") for i in range(3)])
    assert read_incoming(tmp_path).label_names == ("monday", "tuesday")
    stream = read_incoming(tmp_path, unlabelled=True)
    assert stream.labels is None
    assert stream.files == tuple(f"{day}/{i}.png" for day in ("monday", "tuesday") for i in range(3))
    assert greys(stream) == list(range(6))


def test_labelled_images_come_in_an_order_of_their_own_with_their_labels(tmp_path):
    write(tmp_path, [f"{name}/{i}.png" for name in "ab" for i in range(10)])
    drawn, again, other = (read_incoming(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert drawn.files == again.files != other.files
    assert sorted(greys(drawn)) == list(range(20))
    assert [grey // 10 for grey in greys(drawn)] == drawn.labels.tolist()  # ten greys of each class
    kept = read_incoming(tmp_path, seed=None)
    assert greys(kept) == list(range(20))
    assert torch.equal(kept.labels, torch.arange(20) // 10)
    assert kept.fingerprint == drawn.fingerprint
    assert read_incoming(tmp_path, limit=3).labels.tolist() == drawn.labels[:3].tolist()


def test_rows_of_a_table_keep_their_order():
    images = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in range(24)]
    columns = {"image": images, "label": [grey % 2 for grey in range(24)]}
    stream = read_incoming(datasets.Dataset.from_dict(columns), seed=None)
    assert greys(stream) == list(range(24))
    assert stream.labels.tolist() == columns["label"]


@pytest.mark.parametrize(("part", "value"), [("test", 200), ("val", 100)])
def test_the_part_that_nobody_tunes_on_is_the_stream(tmp_path, part, value):
    for split, start in (("train", 0), (part, value)):
        write(tmp_path / split, [f"{name}/{i}.png" for name in "ab" for i in range(5)], value=start)
    assert sorted(greys(read_incoming(tmp_path))) == list(range(value, value + 10))


def test_what_is_no_stream_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image: add files that end in"):
        read_incoming(tmp_path / "empty", unlabelled=True)
    with pytest.raises(DataError, match="is empty"):
        read_incoming(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no folder: streams without labels"):
        read_incoming(tmp_path / "missing.parquet", unlabelled=True)
    (tmp_path / "empty" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png cannot be decoded"):
        read_incoming(tmp_path / "empty").read(0)


@pytest.mark.parametrize("folder", ["ab", ""])  # with classes, and without
def test_broken_images_of_a_stream(tmp_path, folder):
    names = [f"{name}/{i}.png" for name in folder for i in range(3)] or [f"{i}.png" for i in range(6)]
    write(tmp_path, names)
    (tmp_path / names[1]).write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{names[1]} cannot be decoded .*; on_broken=\"skip\" leaves such images out"):
        read_incoming(tmp_path, seed=None, on_broken="raise")
    with pytest.warns(UserWarning, match=rf"left out 1 image\(s\): {names[1]}"):
        stream = read_incoming(tmp_path, seed=None, on_broken="skip")
    assert stream.files == (names[0], *names[2:])
    assert greys(stream) == [0, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="left out 1"):
        assert len(read_incoming(tmp_path, seed=None, on_broken="skip", limit=4)) == 4
    assert len(read_incoming(tmp_path, seed=None, on_broken="raise", limit=1)) == 1  # the rest is not looked at
    assert len(read_incoming(tmp_path)) == 6
    for name in names:
        (tmp_path / name).write_bytes(f"{name} is no image".encode())
    with pytest.raises(DataError, match="no image is left"):
        read_incoming(tmp_path, on_broken="skip")
    with pytest.raises(ConfigError, match="on_broken='ignore': choose one of raise, skip, later"):
        read_incoming(tmp_path, on_broken="ignore")


def test_classes_as_a_network_numbers_them(tmp_path):
    write(tmp_path, [f"{name}/{i}.png" for name in "ab" for i in range(2)])
    stream = read_incoming(tmp_path, seed=None).among((2, 0), ("b", "x", "a"))
    assert stream.labels.tolist() == [2, 2, 0, 0]
    assert stream.label_names == ("b", "x", "a")
