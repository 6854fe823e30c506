"""A diagnosis finds the shift that was made, and says so on a page that stands alone."""

import copy
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from paper import cifar_networks
from peft_surgical import anatomy_of
from peft_surgical.diagnosis.diagnose import diagnose
from peft_surgical.diagnosis.drift import Features, Reference, block_features, distances, energy, permuted_p, pooled
from peft_surgical.diagnosis.page import to_html
from peft_surgical.diagnosis.probe import fitted, folds_of, learning_curve, predicted, probe_right, spread
from peft_surgical.diagnosis.verdict import judged, verdict, with_curve
from peft_surgical.errors import DataError
from peft_surgical.evaluation import wilson_interval

BLOCKS = ("block1", "block2", "head")


@pytest.fixture(scope="module")
def network():
    return tiny.used_batchnorm().eval()


def features(network, labels=True, change=None, where=None):
    rows = tiny.Rows(90)
    part = range(45) if where == "source" else range(45, 90)
    images = rows.images[list(part)]
    images = images if change is None else change(images)
    return block_features(network, anatomy_of(network), images.split(16), rows.classes[list(part)] if labels else None)


# drift


def test_features_are_the_blocks_outputs_pooled_by_hand(network):
    rows = tiny.Rows(90)
    found = features(network, where="source")
    assert tuple(found.blocks) == BLOCKS
    with torch.no_grad():
        first = network.layer1(torch.tanh(network.bn1(network.conv1(rows.images[:45])))).flatten(2)
        torch.testing.assert_close(found.blocks["block1"], torch.cat([first.mean(2), first.std(2)], 1))
        torch.testing.assert_close(found.logits, network(rows.images[:45]))
    assert found.last is found.blocks["block2"]


@pytest.mark.parametrize(("shape", "width"), [((2, 5), 5), ((2, 7, 5), 10), ((2, 5, 4, 4), 10), ((2, 4, 4, 5), 10)])
def test_pooling_by_shape(shape, width):
    assert pooled(torch.rand(shape)).shape == (2, width)


def test_tokens_and_transformers_are_pooled_too():
    torch.manual_seed(0)
    network = tiny.vit().eval()
    found = block_features(network, anatomy_of(network), tiny.images(4).split(2))
    assert tuple(found.blocks) == ("embedding", "block1", "block2", "head")
    assert found.blocks["block2"].shape == (4, 32)


def test_the_energy_distance_by_hand():
    found = distances(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])) * (17 / 6)
    members = torch.tensor([[True, True, False, False]])
    # |x-y|: 3, 5, 2, 4; |x-x'|: 1; |y-y'|: 2. The mean of all six distances is 17 / 6.
    assert float(energy(found, members)) == pytest.approx(2 * 3.5 - 1 - 2)


def test_the_test_holds_its_level_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    ps = []
    for _ in range(60):
        x, y = torch.randn(2, 20, 3, generator=generator)
        ps.append(permuted_p(distances(x, y), 20, 99))
    assert (
        wilson_interval(sum(p <= 0.05 for p in ps), 60).low
        <= 0.05
        <= wilson_interval(sum(p <= 0.05 for p in ps), 60).high
    )
    x, y = torch.randn(2, 20, 3, generator=generator)
    assert permuted_p(distances(x, y + 2), 20, 99) == 0.01


def test_a_reference_is_stored_and_is_of_one_network(network, tmp_path):
    reference = Reference.of(features(network, where="source"), "tiny")
    reference.save(tmp_path / "source.safetensors")
    again = Reference.load(tmp_path / "source.safetensors")
    assert again.model == "tiny"
    for part in ("mean", "deviation", "points"):
        assert tiny.same(getattr(again, part), getattr(reference, part))
    assert torch.equal(again.right, reference.right)
    other = Features({"block1": torch.rand(5, 3), "head": torch.rand(5, 2)})
    with pytest.raises(DataError, match=r"the reference is of tiny, whose blocks are block1, block2, head"):
        again.seen(other)
    (tmp_path / "no.safetensors").write_text("x")
    with pytest.raises(DataError, match="is no reference of source images"):
        Reference.load(tmp_path / "no.safetensors")


# the probe


def test_the_probe_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(30, 4, generator=generator), torch.randint(3, (30,), generator=generator)
    weights = fitted(x, labels, 3)
    full = torch.cat([x.double(), torch.ones(30, 1).double()], 1)
    y = nn.functional.one_hot(labels, 3).double()
    unit = float(full.square().sum(1).mean())
    tried = {
        r: torch.linalg.solve(full.T @ full + r * unit * torch.eye(5).double(), full.T @ y)
        for r in (1e-3, 1e-2, 0.1, 1, 10)
    }

    def left_out(ridge):
        errors = []
        for row in range(30):
            rest = [i for i in range(30) if i != row]
            a = full[rest]
            own = torch.linalg.solve(a.T @ a + ridge * unit * torch.eye(5).double(), a.T @ y[rest])
            errors.append((full[row] @ own - y[row]).square().mean())
        return float(sum(errors))

    best = min(tried, key=left_out)
    torch.testing.assert_close(weights, tried[best], rtol=1e-6, atol=1e-8)


def test_probe_folds_curve_and_spread():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(20)
    x = nn.functional.one_hot(labels, 3).float() * 5 + torch.randn(60, 3, generator=generator)
    folds = folds_of(labels)
    assert torch.bincount(folds).tolist() == [12] * 5
    assert probe_right(x, labels, 3).float().mean() > 0.9
    curve = learning_curve(x, labels, 3)
    assert [point.images for point in curve] == [9, 19, 28, 38, 48]
    assert curve[-1].accuracy.value > 0.9
    chosen = spread(x, 3)
    assert {int(labels[row]) for row in chosen} == {0, 1, 2}  # one of each cluster
    assert len({*spread(x, 20)}) == 20
    assert predicted(fitted(x, labels, 3), x).shape == (60,)


# the verdict


@pytest.mark.parametrize(
    ("effects", "p", "expected"),
    [
        ((0.5, 0.3, 0.1), (0.01, 0.01, 0.01), ("input", "block1")),
        ((0.01, 0.3, 0.1), (0.01, 0.01, 0.01), ("feature", "block2")),  # too little of the whole in block1
        ((0.2, 0.3, 0.1), (0.3, 0.01, 0.01), ("feature", "block2")),  # by chance in block1
        ((0.0, 0.0, 0.1), (0.9, 0.9, 0.01), ("output", "head")),
        ((0.0, 0.01, 0.0), (0.9, 0.3, 0.8), ("none", None)),
    ],
)
def test_the_verdict_is_where_the_drift_begins(effects, p, expected):
    assert verdict(dict(zip(BLOCKS, effects, strict=True)), dict(zip(BLOCKS, p, strict=True))) == expected


def test_labels_tell_an_output_level_shift():
    right, probed = torch.arange(100) < 10, torch.arange(100) < 90
    quiet = dict.fromkeys(BLOCKS, 0.0)
    assert verdict(quiet, dict.fromkeys(BLOCKS, 0.9), right, probed, 0.95) == ("output", "head")
    assert verdict(quiet, dict.fromkeys(BLOCKS, 0.9), right, torch.arange(100) < 50, 0.95) == ("none", None)
    assert verdict(quiet, dict.fromkeys(BLOCKS, 0.9), probed, probed, 0.95) == ("none", None)


def damaged(network, *names):
    made = copy.deepcopy(network)
    with torch.no_grad():
        for name in names:
            made.get_submodule(name).weight.mul_(-2)
    return made


def test_a_shift_that_was_made_is_found(network):
    reference = Reference.of(features(network, where="source"))
    found = judged(features(network, labels=False), reference)
    assert (found.kind, found.target) == ("none", None)
    assert found.sure > 0.7
    assert found.notes == ("without labels an output-level shift cannot be seen",)
    found = judged(features(network, change=lambda x: 3 * x + 1), reference)
    assert (found.kind, found.target, found.sure) == ("input", "block1", 1.0)
    assert found.drift[0].p < 0.05
    found = judged(features(damaged(network, "layer2.0"), labels=False), reference)
    assert (found.kind, found.target) == ("feature", "block2")
    assert found.accuracy is None


def test_without_a_source_the_scores_suggest(network):
    found = judged(features(network, labels=False), None, scores={"block1": 1.0, "head": 2.0})
    assert (found.kind, found.target, found.sure) == ("unknown", "head", None)
    assert judged(features(network, labels=False), None).target is None
    new = judged(features(network), Reference.of(features(network, where="source")), new_head=True)
    assert (new.kind, new.target, new.accuracy) == ("output", "head", None)
    assert "head" not in [one.name for one in new.drift]
    scored = judged(features(network), None, new_head=True, scores={"block1": 1.0, "head": 2.0})
    assert (scored.target, scored.scores) == ("block1", {"block1": 1.0})  # the score of a random head says nothing


def test_the_page_stands_alone(network):
    reference = Reference.of(features(network, where="source"))
    found = judged(features(network, change=lambda x: 3 * x + 1), reference, model="<b>", scores={"block1": 2.0})
    found = with_curve(found, features(network))
    page = to_html(found)
    assert "&lt;b&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("<svg") == 2
    # On a telephone: text of readable size, and what is wider is scrolled by itself.
    assert '<meta name="viewport" content="width=device-width">' in page
    assert page.count('<div class="wide"><svg') == 2
    assert page.count('<div class="wide"><table>') == page.count("<table>")
    assert json.loads(json.dumps(found.to_dict()))["kind"] == "input"
    assert not any(math.isnan(one.effect) for one in found.drift)


# the command


@pytest.fixture
def place(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(1)
    overlay = {"input_size": (3, 32, 32)}
    made = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(made, tmp_path / "base", safe_serialization=True)
    for part, shade in (("source", 40), ("new", 160)):
        for label in range(2):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            for n in range(12):
                noise = image.effect_noise((32, 32), 40).point(lambda v, s=shade: min(255, v // 2 + s))
                noise.convert("RGB").save(tmp_path / part / f"class{label}" / f"{n}.png")
    return tmp_path


def test_the_command(place, capsys):
    from peft_surgical_cli import app as cli

    def run(*words):
        code = cli.run([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    reference, page = place / "source.safetensors", place / "page.html"
    given = ("diagnose", place / "base", place / "new", "--cpu")
    code, out, err = run(*given, "--source", place / "source", "--save-reference", reference, "--html", page)
    assert (code, err) == (0, "")
    assert "an input-level shift" in out
    assert "suggested target: block1" in out
    assert page.read_text(encoding="utf-8").count("<img") == 12
    code, out, err = run(*given, "--source", reference, "--json", "--unlabelled", "--label-next", 3)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["kind"], found["target"], found["accuracy"]) == ("input", "block1", None)
    assert len(found["label_next"]) == 3
    code, _, err = run(*given, "--save-reference", reference)
    assert (code, "give them as --source" in err) == (2, True)


def test_some_of_many_images_without_labels_are_drawn(place):
    """The first by name may be of one class, or of one day."""
    flat = place / "flat"
    flat.mkdir()
    for label in range(2):
        for file in (place / "new" / f"class{label}").iterdir():
            file.rename(flat / f"{label}-{file.name}")
    _, seen = diagnose(place / "base", flat, images=20, cpu=True)
    assert len(seen.images.files) == 20
    assert sorted(seen.images.files) != sorted(file.name for file in flat.iterdir())[:20]
    _, again = diagnose(place / "base", flat, images=20, cpu=True)
    assert again.images.files == seen.images.files


@pytest.mark.slow
def test_the_benchmark_counts_what_was_said(tmp_path):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    weights = tmp_path / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    weights.parent.mkdir(parents=True)
    save_file(cifar_networks.ResNet26().state_dict(), weights)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 200, (80, 32, 32, 3), dtype=np.uint8)
    for number, name in enumerate(("clean", "contrast", "gaussian_noise")):
        cells = []
        for array in pixels + np.uint8(27 * number):
            buffer = io.BytesIO()
            pillow.fromarray(array).save(buffer, format="PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        rows = {"img": cells, "label": [i % 10 for i in range(80)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{name}.parquet")
    file = Path(__file__).parents[1] / "benchmarks" / "diagnose.py"
    given = ["--data", tmp_path / "data", "--models", tmp_path / "models", "--images", 40, "--seeds", 1]
    command = [sys.executable, file, *given, "--networks", "resnet26", "--markdown", tmp_path / "table.md"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=600)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    counted = [list(map(int, line.split("|")[3:7])) for line in lines[2:9]]
    assert [sum(row) for row in counted] == [1, 3, 2, 1, 3, 2, 1]  # none, input, feature; and output with labels alone
    assert "| block1 damaged | " in "\n".join(lines)
