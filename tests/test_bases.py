"""Bases by name: folders of both libraries, their transforms and heads, and every name that leads nowhere."""

import contextlib
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")

import transformers  # noqa: E402
from peft import get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical import SurgicalConfig  # noqa: E402
from peft_surgical.bases import load as bases  # noqa: E402
from peft_surgical.bases import load_base, load_model, save_checkpoint  # noqa: E402
from peft_surgical.bases.classes import HeadFit, fit_head  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402

NAMES = ("cat", "dog", "owl", "rat")
IMAGE = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=4)
    # timm's own initialisation makes it blind: the head and half of every block are zero.
    with torch.no_grad():
        model.head.weight.normal_()
    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(model, folder, model_config={"label_names": NAMES}, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("transformers")
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(params=["timm", "transformers"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def head_of(base):
    return base.model.head if base.library == "timm" else base.model.classifier


def logits(base, images):
    with torch.no_grad():
        found = base.model(images)
    return getattr(found, "logits", found)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_folder_of_either_library(folder, request):
    base = load_base(folder)
    assert base.library == request.node.callspec.params["folder"]
    assert (base.classes, base.label_names, base.head_is_new) == (4, NAMES, False)
    assert not base.model.training
    if base.library == "timm":
        own = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        own = transformers.ViTForImageClassification.from_pretrained(folder)
    assert same(base.model, own)
    images = base.transform_eval(IMAGE)[None]
    assert images.dtype == torch.float32
    assert logits(base, images).shape == (1, 4)
    assert torch.equal(base.transform_train(IMAGE), base.transform_eval(IMAGE))
    assert same(load_model(str(folder)), base.model)


def test_the_forms_of_timm_folders(timm_folder, monkeypatch):
    monkeypatch.chdir(timm_folder.parent)
    for name in (f"local-dir:{timm_folder}", timm_folder.name, f"./{timm_folder.name}"):
        assert load_base(name).label_names == NAMES


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_augmentation(folder, augment):
    base = load_base(folder, augment=augment)
    plain = base.transform_eval(IMAGE)
    torch.manual_seed(0)
    found = [pickle.loads(pickle.dumps(base.transform_train))(IMAGE) for _ in range(12)]
    assert {tuple(image.shape) for image in found} == {tuple(plain.shape)}
    mirrored = base.transform_eval(IMAGE.transpose(PIL.Transpose.FLIP_LEFT_RIGHT))
    near = [any(torch.allclose(image, other, atol=0.1) for other in (plain, mirrored)) for image in found]
    if augment == "flip":
        assert all(near)
        assert len({image.sum().item() for image in found}) <= 2
        assert not all(torch.equal(image, plain) for image in found)
    else:
        assert not any(near)
        # Still normalised: a crop of noise has the mean and spread of all of it.
        assert torch.stack(found).mean() == pytest.approx(plain.mean().item(), abs=0.1)


def test_processor_normalises_as_transformers_does(transformers_folder):
    base = load_base(transformers_folder)
    white = base.transform_eval(PIL.new("RGB", (10, 20), "white"))
    assert torch.equal(white, torch.ones(3, 32, 32))  # (1 - 0.5) / 0.5


def test_new_head(folder):
    base, again, other = load_base(folder, 3), load_base(folder, 3), load_base(folder, 3, seed=1)
    old = load_base(folder)
    assert (base.classes, base.label_names, base.head_is_new) == (3, None, True)
    assert head_of(base).weight.shape[0] == 3
    assert torch.equal(head_of(base).weight, head_of(again).weight)
    assert not torch.equal(head_of(base).weight, head_of(other).weight)
    body = {n: v for n, v in base.model.state_dict().items() if not n.startswith(("head", "classifier"))}
    assert body
    assert all(torch.equal(value, old.model.state_dict()[name]) for name, value in body.items())
    named = load_base(folder, label_names=["x", "y", "z"])
    assert (named.classes, named.label_names) == (3, ("x", "y", "z"))


def test_a_new_head_leaves_the_generator_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_base(folder, 3)
    assert torch.equal(torch.rand(1), expected)


def test_names_that_are_the_checkpoints_keep_the_head(folder):
    old = load_base(folder)
    assert (old.outputs, old.head_note) == (None, "kept")
    for names in (NAMES, ("0", "1", "2", "3")):
        kept = load_base(folder, label_names=names)
        assert not kept.head_is_new
        assert same(kept.model, old.model)
        assert (kept.label_names, kept.outputs, kept.head_note) == (NAMES, None, "kept")


@pytest.mark.parametrize(
    ("names", "outputs", "note"),
    [
        (("owl", "cat"), (2, 0), r"kept: the data has 2 of the 4 classes of .*, found by name$"),
        (NAMES[::-1], (3, 2, 1, 0), r"kept: the data has the classes of .* in another order, found by name$"),
        (("Cat ", "DOG", "owl", "rat"), None, "kept$"),
    ],
)
def test_classes_are_found_by_name(folder, names, outputs, note):
    said = contextlib.nullcontext() if outputs is None else pytest.warns(UserWarning, match=note[:-1])
    with said:
        base = load_base(folder, label_names=names)
    assert same(base.model, load_base(folder).model)
    assert (base.classes, base.label_names, base.outputs, base.head_is_new) == (4, NAMES, outputs, False)
    assert re.match(note, base.head_note)
    again = load_base(folder, label_names=names, head="keep")  # asked for, so without a warning
    assert (again.outputs, again.head_note) == (base.outputs, base.head_note)
    with_new = load_base(folder, label_names=names, head="new")
    assert (with_new.classes, with_new.label_names, with_new.outputs) == (len(names), tuple(names), None)
    assert (with_new.head_is_new, with_new.head_note) == (True, "new, as asked for")


def test_other_classes_get_a_new_head(folder):
    with pytest.warns(
        UserWarning, match=r"1 of 4 classes that .* does not know: 'yak'\. It knows 'cat', .*head=\"new\""
    ):
        new = load_base(folder, label_names=("cat", "dog", "owl", "yak"))
    assert (new.head_is_new, new.outputs, new.label_names) == (True, None, ("cat", "dog", "owl", "yak"))
    assert not torch.equal(head_of(new).weight, head_of(load_base(folder)).weight)
    with pytest.warns(UserWarning, match=r"1 of 2 classes .*'dogs' \(did you mean 'dog'\?\)"):
        load_base(folder, label_names=("cat", "dogs"))
    with pytest.warns(UserWarning, match=r'or say head="keep" to take class n of the data for class n'):
        load_base(folder, label_names=("w", "x", "y", "z"))
    kept = load_base(folder, label_names=("w", "x", "y", "z"), head="keep")
    assert (kept.head_is_new, kept.outputs, kept.label_names) == (False, None, NAMES)
    assert kept.head_note.startswith("kept: class n of the data is taken for class n of")
    none = load_base(folder, label_names=("x", "y"))  # nothing in common: a new head surprises nobody
    assert none.head_note.startswith("new: the data has 2 of 2 classes that")
    for names in (("cat", "yak"), ("x", "y"), ("cat", "dog", "owl", "yak")):
        with pytest.raises(ConfigError, match=r'head="keep": the data has .* does not know: .*say head="new"'):
            load_base(folder, label_names=names, head="keep")


def test_words_may_be_joined_in_other_ways_but_nothing_is_guessed():
    known = ("red cell", "White_Cell", "owl", "OWL")
    found = fit_head(4, known, ("white-cell", "Red_Cell"), None, False, "m")
    assert found.outputs == (1, 0)
    assert found.note.endswith("; spelled differently, 'white-cell' is 'White_Cell', 'Red_Cell' is 'red cell'")
    assert fit_head(4, known, ("owl", "OWL"), None, False, "m").outputs == (2, 3)
    ambiguous = fit_head(4, known, ("red cell", "Owl"), None, False, "m")
    assert (ambiguous.outputs, ambiguous.warning) == (None, True)
    assert "'Owl' (which could be more than one of them)" in ambiguous.note
    assert "'Red Cell' (as another class)" in fit_head(4, known, ("red cell", "Red Cell"), None, False, "m").note
    # Twice the same name, as ImageNet's lists have "crane".
    assert fit_head(3, ("crane", "crane", "owl"), ("crane", "owl"), None, False, "m").outputs is None


def test_heads_whose_classes_have_no_names():
    assert fit_head(1000, None, ("a", "b"), None, False, "m") == HeadFit(
        2, None, "new: m has 1000 classes, whose names it does not say, and the data 2"
    )
    assert fit_head(2, None, ("a", "b"), None, False, "m").outputs == (0, 1)
    assert fit_head(3, NAMES[:3], ("0", "1"), None, False, "m").outputs is None
    numbered = fit_head(4, NAMES, ("3", "1"), None, True, "m")
    assert (numbered.outputs, numbered.note) == ((3, 1), "kept: the classes of the data are numbers of m's")
    for given, wanted in ((("a", "b"), None), (("7", "9"), None), (None, 2)):
        with pytest.raises(
            ConfigError, match='head="keep": m has 4 classes, whose names it does not say, and the data 2'
        ):
            fit_head(4, None, given, wanted, True, "m")
    assert fit_head(4, None, None, None, True, "m").outputs == (0, 1, 2, 3)


def test_names_of_a_transformers_config(transformers_folder, tmp_path):
    shutil.copytree(transformers_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(4)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_base(tmp_path).label_names == NAMES  # of label2id
    del config["label2id"], config["id2label"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 4}))
    unnamed = load_base(tmp_path, label_names=NAMES[::-1])
    assert (unnamed.outputs, unnamed.label_names) == (None, NAMES[::-1])
    headless = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(headless, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_base(tmp_path, label_names=NAMES).head_note == f"new: {tmp_path} comes without a head"
    with pytest.raises(ConfigError, match=r'head="keep": .* comes without a head'):
        load_base(tmp_path, label_names=NAMES, head="keep")


def test_names_reach_the_config_of_transformers(transformers_folder):
    base = load_base(transformers_folder, label_names=["a", "b"])
    assert base.model.config.id2label == {0: "a", 1: "b"}
    assert base.model.config.num_labels == 2


@pytest.mark.parametrize("name", ["test_vit", "timm/test_vit.r160_in1k", "folder"])
def test_random_weights(name, transformers_folder):
    name = transformers_folder if name == "folder" else name
    a, b, c = (load_model(name, 4, weights="random", seed=seed) for seed in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)
    base = load_base(name, weights="random")
    assert base.head_is_new
    assert base.classes == (4 if name == transformers_folder else 1000)


def test_an_adapter_knows_its_base(folder, tmp_path):
    model = get_peft_model(load_base(folder).model, SurgicalConfig(target="block1"))
    model.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert same(load_base(named).model, load_base(folder).model)


def test_timm_network_saved_by_transformers(tmp_path):
    config = transformers.TimmWrapperConfig.from_dict(
        {"architecture": "test_vit", "num_classes": 3, "label_names": list("abc")}
    )
    transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert (base.library, base.classes, base.head_is_new) == ("transformers", 3, False)
    assert logits(base, base.transform_eval(IMAGE)[None]).shape == (1, 3)


def test_weights_in_a_file_become_a_folder(tmp_path):
    """The line of Python of docs/cli.md."""
    torch.manual_seed(3)
    own = timm.create_model("test_efficientnet", num_classes=4)
    save_file(own.state_dict(), tmp_path / "model.safetensors")
    network = timm.create_model(
        "test_efficientnet",
        num_classes=4,
        checkpoint_path=tmp_path / "model.safetensors",
        pretrained_cfg_overlay={"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    )
    save_checkpoint("timm", network, tmp_path / "base", label_names=NAMES)
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["config.json", "model.safetensors"]
    base = load_base(tmp_path / "base")
    assert (base.library, base.label_names, base.head_is_new) == ("timm", NAMES, False)
    assert same(base.model, own)
    assert torch.equal(base.transform_eval(PIL.new("RGB", (70, 90), "white")), torch.ones(3, 64, 64))
    assert same(timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True), own)


# Names and folders that lead nowhere


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "resnet5O",
            r"unknown base 'resnet5O': tried the folder /.*/resnet5O \(none\), and timm's models .*'resnet50'",
        ),
        ("owner/nothing", r"unknown base 'owner/nothing': tried the folder /.*and its config.json on the Hub \(.+\)"),
        ("hf-hub:owner/nothing", r"cannot load 'hf-hub:owner/nothing' with timm: "),
        ("test_vit.r160_in1k", r"cannot load 'test_vit.r160_in1k' with timm: "),
        ("test_vit.wrong", r"cannot load 'test_vit.wrong' with timm: .*wrong"),
        ("gcvit_tiny.in1k", r"published as a pickle only \(https://.*\)"),
        ("local-dir:nowhere", r"nowhere has no config\.json: pass the folder that save_pretrained"),
    ],
)
def test_unknown_names(name, match):
    with pytest.raises(DataError, match=match):
        load_base(name)


def test_folders_that_are_no_base(timm_folder, transformers_folder, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is no JSON"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="names neither timm's architecture nor transformers' model_type"):
        load_base(tmp_path)
    shutil.copy(timm_folder / "config.json", tmp_path)
    with pytest.raises(DataError, match=r"has no model\.safetensors, and nothing else is read"):
        load_base(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"has no model\.safetensors"):
        load_base(tmp_path)
    shutil.copy(transformers_folder / "config.json", tmp_path)
    with pytest.raises(DataError, match=r"with transformers: .*model\.safetensors"):
        load_base(tmp_path)
    shutil.copy(transformers_folder / "model.safetensors", tmp_path)
    assert load_model(tmp_path, 2) is not None
    with pytest.raises(DataError, match=r"has no preprocessor_config\.json"):
        load_base(tmp_path)


def test_a_checkpoint_that_is_not_whole(transformers_folder, tmp_path):
    shutil.copytree(transformers_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"does not hold vit\.layernorm\.weight"):
        load_base(tmp_path)


def test_choices(timm_folder):
    for options, match in (
        ({"weights": "none"}, "weights='none': choose one of pretrained, random"),
        ({"augment": "mixup"}, "augment='mixup': choose one of none, flip, crop"),
        ({"head": "old"}, "head='old': choose one of auto, keep, new"),
        ({"num_classes": 0}, "num_classes=0: a classifier"),
        ({"num_classes": 3, "label_names": ["a", "b"]}, "num_classes=3 but 2 label_names"),
        ({"num_classes": 3, "head": "keep"}, 'head="keep": .* has 4 classes, and the data 3'),
    ):
        with pytest.raises(ConfigError, match=match):
            load_base(timm_folder, **options)


def test_without_timm(monkeypatch):
    def missing(module, purpose, extra="recipes"):
        raise DataError(f'{purpose} needs {module}: pip install "peft-surgical[{extra}]"')

    monkeypatch.setattr(bases, "require", missing)
    with pytest.raises(DataError, match=r"and timm, which is not installed: pip install \"peft-surgical\[timm\]\""):
        load_base("resnet50")


# The size of images


def test_images_of_another_size(tmp_path):
    save_for_hf(timm.create_model("test_resnet", num_classes=4), tmp_path / "timm", safe_serialization=True)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=4)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path / "resnet")
    for name in ("timm", "resnet"):
        for augment in ("none", "flip", "crop"):
            base = load_base(tmp_path / name, image_size=24, augment=augment)
            assert base.transform_eval(IMAGE).shape == base.transform_train(IMAGE).shape == (3, 24, 24)
            assert logits(base, base.transform_eval(IMAGE)[None]).shape == (1, 4)


def test_a_network_of_one_image_size_takes_no_other(folder):
    own = load_base(folder).transform_eval(IMAGE).shape[-1]
    assert load_base(folder, image_size=own).transform_eval(IMAGE).shape == (3, own, own)
    with pytest.raises(ConfigError, match="an image size of 24: this network does not take images of 24 pixels"):
        load_base(folder, image_size=24)


def test_a_plain_checkpoint_of_timm_opens_in_transformers_too(tmp_path):
    """Arguments of the architecture, such as an image size, are kept; the number of classes is given once."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    folder = save_checkpoint("timm", network, tmp_path / "plain", label_names=("a", "b", "c"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        for_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        for_transformers = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(for_timm(images), expected)
        assert torch.equal(for_transformers(images).logits, expected)
    assert load_base(folder).label_names == ("a", "b", "c")
