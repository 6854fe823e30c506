"""The source step: what it trains on, that its checkpoint reloads, that it is done once and refuses to be mistaken."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from paper import pretraining  # noqa: E402
from paper.parts import Published  # noqa: E402
from paper.pretraining import SourceTraining, train_source  # noqa: E402
from peft_surgical.bases import load_base, save_checkpoint  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402
from peft_surgical.evaluation import Report  # noqa: E402
from peft_surgical.training.fitting import FitSettings  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")

TRAINING = SourceTraining(FitSettings(lr=1e-2, epochs=2, batch_size=10, use_cpu=True), reference="a paper")


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    pixels = rng.integers(0, 60, (n, 16, 16, 3)) + 180 * label[:, None, None, None]
    rows = {"image": [PIL.fromarray(p.astype(np.uint8)) for p in pixels], "label": label.tolist()}
    rows["file"] = [f"{i}.png" for i in range(n)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds | {"file": datasets.Value("string")}))


def data(**parts):
    given = {"source": images(40), "source_validation": images(20, 1), "source_test": None} | parts
    few = images(4, 2)
    names = ("dark", "bright")
    return Published(
        "tiny",
        **given,
        tuning=few,
        validation=few,
        test=few,
        label_names=names,
        group_names=("a",),
        origin={},
        fingerprint="0" * 16,
    )


@pytest.fixture
def network(tmp_path):
    """A folder of timm's: a real class, small images, three classes so that the head has to be new."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=3)
    size = {"input_size": (3, 32, 32)}
    timm.models.save_for_hf(model, tmp_path / "network", safe_serialization=True, data_config=size)
    return str(tmp_path / "network")


@pytest.mark.parametrize("method", ["full", "lp-ft"])
def test_a_source_step(method, network, tmp_path):
    training = dataclasses.replace(TRAINING, method=method)
    folder = train_source(network, data(source_test=images(30, 3)), training, tmp_path / "source")
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "source.json"}
    found = load_base(folder, label_names=("dark", "bright"))
    assert not found.head_is_new
    report = Report.load(folder / "source.json")
    assert report.target == method
    assert report.settings["reference"] == "a paper"
    held_out, test = report.measurements
    assert (held_out.n, test.n) == (20, 30)
    assert "these very ones" in held_out.selection
    assert "these very ones" not in test.selection
    inputs = torch.stack([found.transform_eval(row["image"].convert("RGB")) for row in images(30, 3)])
    with torch.no_grad():
        right = found.model(inputs).argmax(1) == torch.tensor(images(30, 3)[:]["label"])
    assert test.value == right.float().mean().item()
    # Everything was trained, the statistics of norms included.
    before = load_base(network).model.state_dict()
    after = found.model.state_dict()
    same = [name for name, value in after.items() if name in before and torch.equal(value, before[name])]
    assert all(name.endswith("num_batches_tracked") for name in same)


def test_done_once(network, tmp_path, monkeypatch):
    folder = train_source(network, data(), TRAINING, tmp_path / "source")
    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretraining, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert train_source(network, data(), TRAINING, folder) == folder
    longer = dataclasses.replace(TRAINING, fitting=dataclasses.replace(TRAINING.fitting, epochs=3))
    with pytest.raises(ConfigError, match="trained on the source with epochs 2 instead of 3: name another folder"):
        train_source(network, data(), longer, folder)
    with pytest.raises(ConfigError, match=r"images \{'source': 40, 'held_out': 20\} instead of \{'source': 12"):
        train_source(network, data(source=images(12)), TRAINING, folder)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_tenth_is_held_out_where_nothing_is(network, tmp_path, monkeypatch):
    seen = {}

    def looks(model, method, tuning, validation, settings, **how):
        seen.update(tuning=tuning, validation=validation, how=how)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "fit", looks)
    with pytest.raises(KeyboardInterrupt):
        train_source(network, data(source_validation=None), TRAINING, tmp_path / "source")
    assert (len(seen["tuning"]), len(seen["validation"])) == (36, 4)
    assert sorted(seen["validation"].labels) == [0, 0, 1, 1]
    files = {part: set(seen[part].items.part.select_columns(["file"])["file"][:]) for part in ("tuning", "validation")}
    assert not files["tuning"] & files["validation"]
    assert len(files["tuning"] | files["validation"]) == 40
    assert seen["how"]["config"] == {"norm_stats": "all"}


def test_without_a_source(network, tmp_path):
    with pytest.raises(DataError, match="tiny has no source images here: give a checkpoint"):
        train_source(network, data(source=None), TRAINING, tmp_path / "source")


def test_only_methods_that_train_everything():
    with pytest.raises(ConfigError, match="'linear-probe' leaves a part of the network untrained"):
        SourceTraining(TRAINING.fitting, method="linear-probe")


PLAIN = """
import sys
assert not any(name.startswith("peft_surgical") for name in sys.modules)
from safetensors.torch import load_file, save_file
import torch
if sys.argv[1] == "timm":
    import timm
    model = timm.create_model("local-dir:" + sys.argv[2], pretrained=True)
else:
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    AutoImageProcessor.from_pretrained(sys.argv[2])
    model = AutoModelForImageClassification.from_pretrained(sys.argv[2])
with torch.no_grad():
    found = model.eval()(load_file(sys.argv[3])["x"])
save_file({"y": getattr(found, "logits", found)}, sys.argv[3] + ".out")
assert not any(name.startswith("peft_surgical") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_checkpoints_are_plain(library, network, tmp_path):
    """Another process that never imports this package gets the same logits."""
    from safetensors.torch import load_file, save_file

    if library == "transformers":
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**small, image_size=32, patch_size=16, num_labels=2)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
        network = str(tmp_path / "vit")
    base = load_base(network, label_names=("dark", "bright"), head="new", seed=3)
    folder = save_checkpoint(
        library, base.model, tmp_path / "plain", label_names=base.label_names, transform=base.transform_eval
    )
    again = load_base(folder)
    assert (again.label_names, again.head_is_new, again.library) == (("dark", "bright"), False, library)
    x = torch.rand(2, 3, 32, 32)
    save_file({"x": x}, tmp_path / "x")
    subprocess.run([sys.executable, "-c", PLAIN, library, str(folder), str(tmp_path / "x")], check=True, timeout=300)
    with torch.no_grad():
        found = base.model(x)
    assert torch.equal(load_file(tmp_path / "x.out")["y"], getattr(found, "logits", found))
    if library == "timm":
        assert json.loads((folder / "config.json").read_text())["label_names"] == ["dark", "bright"]


def test_networks_of_no_library(tmp_path):
    with pytest.raises(DataError, match="a network of 'mine' has no plain checkpoint"):
        save_checkpoint("mine", torch.nn.Linear(2, 2), tmp_path)


def test_too_few_to_hold_out(network, tmp_path):
    with pytest.raises(DataError, match="a tenth of the 6 source images cannot be held out by class"):
        train_source(network, data(source=images(6), source_validation=None), TRAINING, tmp_path / "source")
