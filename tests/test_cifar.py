"""The CIFAR networks, readers and split, on tiny data written here in the exact layouts."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from paper import cifar, cifar_networks
from peft_surgical import extras
from peft_surgical.errors import DataError

SHARED = Path(os.environ.get("PEFT_SURGICAL_SHARED", Path(__file__).parents[2] / "shared"))


def draw(n=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 4


def write_parquet(file, pixels, labels, image_column="img"):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    features = datasets.Features({image_column: datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    rows = {image_column: [], "label": labels.tolist()}
    for array in pixels:
        buffer = io.BytesIO()
        pillow.fromarray(array).save(buffer, format="PNG")
        rows[image_column].append({"bytes": buffer.getvalue(), "path": None})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_round_trip(tmp_path, column):
    pixels, labels = draw()
    write_parquet(tmp_path / "frost.parquet", pixels, labels, column)
    for images in (
        cifar.read_images(tmp_path, "frost"),
        cifar.read_images(tmp_path / "frost.parquet"),
    ):
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), pixels)
        assert np.array_equal(images.labels.numpy(), labels)
    assert cifar.corruptions_in(tmp_path) == ["frost"]


def test_published_npy_rows_of_a_severity(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "PUBLISHED_ROWS", 8)
    pixels, labels = draw(40)
    np.save(tmp_path / "snow.npy", pixels)
    np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
    for severity in (1, 3, 5):
        images = cifar.read_images(tmp_path, "snow", severity)
        rows = slice((severity - 1) * 8, severity * 8)
        assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), pixels[rows])
        assert np.array_equal(images.labels.numpy(), labels[rows])
    assert torch.equal(cifar.read_images(tmp_path, "snow").pixels, cifar.read_images(tmp_path, "snow", 5).pixels)
    assert torch.equal(cifar.read_images(tmp_path / "snow.npy", severity=2).labels, torch.tensor(labels[8:16]))
    assert cifar.corruptions_in(tmp_path) == ["snow"]
    with pytest.raises(DataError, match="severity 6 does not exist: CIFAR-10-C has 1 to 5"):
        cifar.read_images(tmp_path, "snow", 6)
    np.save(tmp_path / "snow.npy", pixels[:39])
    with pytest.raises(DataError, match=r"has 39 rows.*a partial file cannot be used"):
        cifar.read_images(tmp_path, "snow")
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"labels\.npy is missing"):
        cifar.read_images(tmp_path, "snow")


def test_hub_id_takes_the_test_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    pixels, labels = draw(4)
    data = datasets.Dataset.from_dict(
        {"img": [pillow.fromarray(array) for array in pixels], "label": labels.tolist()},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)}),
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, split: asked.append((repo, split)) or data)
    images = cifar.read_images("uoft-cs/cifar10")
    assert asked == [("uoft-cs/cifar10", "test")]
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), pixels)

    def offline(repo, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"cannot load 'uoft-cs/cifar10' from the Hub \(offline\): pass a local"):
        cifar.read_images("uoft-cs/cifar10")


def test_what_cannot_be_read_says_what_is_there(tmp_path):
    pixels, labels = draw()
    write_parquet(tmp_path / "frost.parquet", pixels, labels)
    with pytest.raises(DataError, match=r"no fog\.parquet and no fog\.npy in .*: it holds frost"):
        cifar.read_images(tmp_path, "fog")
    with pytest.raises(DataError, match="say which corruption to read, one of frost"):
        cifar.read_images(tmp_path)
    for missing in (tmp_path / "nowhere", "data/missing.parquet", "./cifar10c"):
        with pytest.raises(DataError, match="does not exist: pass a parquet file"):
            cifar.read_images(missing)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"torn\.parquet is not a readable parquet file"):
        cifar.read_images(tmp_path, "torn")
    write_parquet(tmp_path / "odd.parquet", pixels, labels, "picture")
    with pytest.raises(DataError, match="has the columns picture, label: an image column"):
        cifar.read_images(tmp_path, "odd")
    write_parquet(tmp_path / "large.parquet", np.zeros((4, 64, 64, 3), np.uint8), labels[:4])
    with pytest.raises(DataError, match=r"uint8 images of shape \(64, 64, 3\), not uint8 \(32, 32, 3\)"):
        cifar.read_images(tmp_path, "large")


def test_missing_extra_names_the_install(tmp_path, monkeypatch):
    pixels, labels = draw(4)
    write_parquet(tmp_path / "frost.parquet", pixels, labels)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    with pytest.raises(DataError, match=r'needs pyarrow\.parquet: pip install "peft-surgical\[recipes\]"'):
        cifar.read_images(tmp_path, "frost")


def test_split_is_disjoint_total_balanced_and_seeded():
    labels = torch.arange(10).repeat(200)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    parts = cifar.split(labels, seed=0)
    assert [len(part) for part in parts] == [1000, 200, 800]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(2000))
    for part, per_class in zip(parts, (100, 20, 80), strict=True):
        assert labels[part].bincount().tolist() == [per_class] * 10
    # The rule in words: one generator, class by class, the first 100 of a permutation to tune, the next 20 to validate.
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(np.flatnonzero(labels.numpy() == c)) for c in range(10)]
    assert parts.tune.tolist() == sorted(np.concatenate([d[:100] for d in drawn]))
    assert parts.validation.tolist() == sorted(np.concatenate([d[100:120] for d in drawn]))
    assert all(torch.equal(a, b) for a, b in zip(parts, cifar.split(labels, seed=0), strict=True))
    assert not torch.equal(parts.test, cifar.split(labels, seed=1).test)


def test_test_images_that_are_the_same_for_every_seed():
    labels = torch.arange(40) % 4
    one, two = (cifar.split(labels, seed, tune=8, validation=4, test=16) for seed in (0, 1))
    assert torch.equal(one.test, two.test)
    assert labels[one.test].bincount().tolist() == [4] * 4
    assert not torch.equal(one.tune, two.tune)
    for parts in (one, two):
        assert [len(part) for part in parts] == [8, 4, 16]
        assert len(torch.cat(list(parts)).unique()) == 28
    with pytest.raises(DataError, match=r"8 tuning and 4 validation and 3 test images do not divide evenly over 4"):
        cifar.split(labels, 0, tune=8, validation=4, test=3)
    with pytest.raises(DataError, match=r"class 0 has 2 images: 2 to tune and 1 to validate"):
        cifar.split(labels, 0, tune=8, validation=4, test=32)
    assert len(cifar.split(labels, 0, tune=8, validation=4, test=28).test) == 28  # the others all tune or validate


def test_split_refuses_what_it_cannot_draw():
    labels = torch.arange(4).repeat(6)
    assert [len(part) for part in cifar.split(labels, 0, tune=8, validation=4)] == [8, 4, 12]
    with pytest.raises(DataError, match="do not divide evenly over 4 classes"):
        cifar.split(labels, 0, tune=10, validation=4)
    with pytest.raises(DataError, match="class 0 has 6 images: 5 to tune and 1 to validate leave none to test on"):
        cifar.split(labels, 0, tune=20, validation=4)


@pytest.mark.parametrize("name", cifar_networks.NETWORKS)
def test_normalise(name):
    entry = cifar_networks.NETWORKS[name]
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    out = cifar_networks.normalise(pixels, name)
    assert out.dtype == torch.float32
    for channel, value in enumerate((0, 128 / 255, 1)):
        expected = (value - entry.mean[channel]) / entry.std[channel]
        torch.testing.assert_close(out[:, channel], torch.full((2, 32, 32), expected))
    with pytest.raises(DataError, match=r"must be uint8 in 0\.\.255, got torch\.float32"):
        cifar_networks.normalise(pixels.float(), name)
    with pytest.raises(DataError, match="unknown network 'vgg': choose one of resnet26, resnet32"):
        cifar_networks.normalise(pixels, "vgg")


@pytest.mark.parametrize(("name", "count", "head"), [("resnet26", 366_938, "fc"), ("resnet32", 464_154, "linear")])
def test_networks(tmp_path, monkeypatch, name, count, head):
    torch.manual_seed(0)
    entry = cifar_networks.NETWORKS[name]
    network = entry.build()
    assert sum(p.numel() for p in network.parameters()) == count
    blocks = ["layer1", "layer2", "layer3"]
    assert [n for n, _ in network.named_children() if not n.startswith("bn")] == ["conv1", *blocks, head]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = network.eval()(pixel_values=images)
    assert expected.shape == (3, 10)

    # As the published files have it: no counters of batches seen.
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    (tmp_path / "models" / entry.checkpoint).mkdir(parents=True)
    file = tmp_path / "models" / entry.checkpoint / "model.safetensors"
    save_file(state, file)
    monkeypatch.setenv("PEFT_SURGICAL_SHARED", str(tmp_path))
    for folder in (None, tmp_path, tmp_path / "models"):
        loaded = cifar_networks.load_network(name, folder)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(images), expected)

    del state["conv1.weight"]
    save_file(state, file)
    with pytest.raises(DataError, match=rf"does not hold the weights of '{name}'.*\n.*conv1\.weight"):
        cifar_networks.load_network(name, tmp_path)


def test_shortcuts_without_parameters():
    x = torch.rand(2, 16, 32, 32)
    networks = cifar_networks.ResNet26().eval(), cifar_networks.ResNet32().eval()
    for network in networks:
        for conv in (network.layer2[0].conv2, network.layer1[1].conv2):
            torch.nn.init.zeros_(conv.weight)
    with torch.no_grad():
        pooled, subsampled = (network.layer2[0](x) for network in networks)
        assert all(torch.equal(network.layer1[1](x), x) for network in networks)
    expected = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(pooled, torch.cat([expected, torch.zeros_like(expected)], 1))
    zeros = torch.zeros(2, 8, 16, 16)
    assert torch.equal(subsampled, torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1))


def test_load_network_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_SURGICAL_SHARED", raising=False)
    with pytest.raises(DataError, match="unknown network 'vgg': choose one of resnet26, resnet32"):
        cifar_networks.load_network("vgg", tmp_path)
    with pytest.raises(DataError, match="no folder with the weights of 'resnet26': pass one, or set PEFT_SURGICAL"):
        cifar_networks.load_network("resnet26")
    with pytest.raises(DataError, match=r"no weights for 'resnet32': put them at .*cifar10_resnet32_bn"):
        cifar_networks.load_network("resnet32", tmp_path)


NO_ADAPTATION = {
    "clean": (90.75, 93.85),
    "gaussian_noise": (53.10, 24.45),
    "glass_blur": (53.00, 39.70),
    "zoom_blur": (76.10, 59.85),
    "frost": (67.90, 58.70),
    "pixelate": (56.55, 40.75),
    "jpeg_compression": (72.75, 72.85),
    "brightness": (85.10, 87.90),
    "contrast": (70.30, 28.55),
}


@pytest.mark.slow
@pytest.mark.parametrize("corruption", NO_ADAPTATION)
def test_accuracy_without_adaptation_to_the_digit(corruption):
    folder = SHARED / "data" / "cifar10c"
    if not folder.is_dir():
        pytest.skip("no CIFAR-10-C data: set PEFT_SURGICAL_SHARED to the folder that holds data/ and models/")
    pixels, labels = cifar.read_images(folder, corruption)
    found = []
    for name in ("resnet26", "resnet32"):
        network = cifar_networks.load_network(name, SHARED)
        with torch.no_grad():
            logits = torch.cat([network(batch) for batch in cifar_networks.normalise(pixels, name).split(500)])
        found.append(round(100 * (logits.argmax(1) == labels).double().mean().item(), 2))
    assert tuple(found) == NO_ADAPTATION[corruption]
