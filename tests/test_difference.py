"""Comparing two adapters, by hand and against torch on the concatenated deltas."""

import copy
import io
import json
import math

import pytest
import torch
from peft import get_peft_model
from tiny import CASES, disturb, train

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import Adapter, read_adapter
from peft_surgical.adapters.combination import combine_adapters
from peft_surgical.adapters.difference import diff
from peft_surgical.errors import BaseMismatchError, ConfigError


def adapter(name, scale=1.0, **deltas):
    config = SurgicalConfig(tensor_names=list(deltas), base_fingerprint=dict.fromkeys(deltas, "0" * 16), scale=scale)
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in deltas.items()}
    return Adapter(name, config, tensors, {}, {})


@pytest.fixture(scope="module")
def base():
    return CASES["conv+BN"].network()


def saved(base, folder, target="block1", seed=3, **kwargs):
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, **kwargs))
    disturb(model, seed=seed)
    model.save_pretrained(folder)
    return folder


def test_by_hand():
    a = adapter("one", w=[3.0, 0.0, 4.0, -1.0], only_a=[2.0])
    b = adapter("two", scale=2.0, w=[2.0, 1.0, -1.5, -1.0], only_b=[0.0, 1.5])
    found = diff(a, b)
    rows = {row.name: row for row in found.tensors}
    w = rows["w"]  # (3, 0, 4, -1) and (4, 2, -3, -2)
    assert (w.tuned_by, w.values) == ("both", 4)
    assert w.norm_a == pytest.approx(math.sqrt(26))
    assert w.norm_b == pytest.approx(math.sqrt(33))
    assert w.distance == pytest.approx(math.sqrt(1 + 4 + 49 + 1))
    assert w.cosine == pytest.approx((12 - 12 + 2) / math.sqrt(26 * 33))
    assert w.sign_agreement == pytest.approx(2 / 3)  # of the three values that are zero in neither
    one = rows["only_a"]
    assert (one.tuned_by, one.norm_a, one.norm_b, one.distance, one.cosine, one.sign_agreement) == (
        "a",
        2.0,
        0.0,
        2.0,
        None,
        None,
    )
    assert (rows["only_b"].tuned_by, rows["only_b"].distance) == ("b", 3.0)
    assert found.overall.values == 7
    assert found.overall.distance == pytest.approx(math.sqrt(55 + 4 + 9))
    assert found.overall.cosine == pytest.approx(2 / math.sqrt((26 + 4) * (33 + 9)))
    assert found.overall.sign_agreement == pytest.approx(2 / 3)
    assert not found.same
    assert found.settings == {"scale": (1.0, 2.0)}


def test_overall_is_the_vector_of_all_tensors(base, tmp_path):
    folders = [saved(base, tmp_path / "a", "block1 + head"), saved(base, tmp_path / "b", "all", 4, scale=0.5)]
    found = diff(*folders)
    deltas = [read_adapter(folder).scaled() for folder in folders]
    one, two = (
        torch.cat([part.get(name, torch.zeros_like(delta)).flatten() for name, delta in deltas[1].items()]).double()
        for part in deltas
    )
    assert found.overall.cosine == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)), rel=1e-9)
    assert found.overall.distance == pytest.approx(float(torch.dist(one, two)), rel=1e-9)
    assert found.overall.norm_b == pytest.approx(float(two.norm()), rel=1e-9)
    assert {row.name: row.tuned_by for row in found.tensors}["layer2.0.weight"] == "b"
    assert set(found.settings) == {"target", "scale"}


def test_an_adapter_and_its_negation_are_opposite(base, tmp_path):
    folder = saved(base, tmp_path / "a")
    found = diff(folder, combine_adapters([folder], [-1.0]))
    assert found.overall.cosine == pytest.approx(-1.0)
    assert found.overall.sign_agreement == 0.0
    assert found.overall.distance == pytest.approx(2 * found.overall.norm_a)


def test_the_same_change_in_two_ways_of_writing_it(base, tmp_path):
    folder = saved(base, tmp_path / "a", scale=0.5)
    half = combine_adapters([folder], output=tmp_path / "folded")
    found = diff(folder, tmp_path / "folded")
    assert found.same
    assert found.overall.distance == 0
    assert found.settings == {"scale": (0.5, 1.0)}
    assert diff(half, folder).overall.sign_agreement == 1.0


def test_statistics_and_whole_modules_are_values(base, tmp_path):
    def moved(name, **kwargs):
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="bn1", norm_stats="target", **kwargs))
        train(model, torch.randn(6, 3, 8, 8))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    first, second = moved("a"), moved("b", modules_to_save=["fc"])
    found = diff(first, second)
    mean = [read_adapter(folder).statistics["bn1.running_mean"] for folder in (first, second)]
    assert found.values["bn1.running_mean"] == pytest.approx(float((mean[0] - mean[1]).abs().max()))
    assert "bn1.num_batches_tracked" not in found.values  # equal in both
    assert found.values["fc.weight"] is None  # only one carries it
    assert found.settings["modules_to_save"] == (None, ["fc"])
    assert diff(first, first).same
    assert not diff(first, saved(base, tmp_path / "c", "bn1")).same


def test_other_bases_are_named(base, tmp_path):
    other = copy.deepcopy(base)
    other.conv1.weight.data += 1
    found = diff(saved(base, tmp_path / "a"), saved(other, tmp_path / "b"))
    assert found.other_bases == ("conv1.weight",)
    assert found.overall.distance == 0
    assert not found.same


def test_other_shapes_are_refused():
    with pytest.raises(BaseMismatchError, match=r"w has the shape \(2,\) in one, \(1,\) in two"):
        diff(adapter("one", w=[1.0, 2.0]), adapter("two", w=[1.0]))


def test_a_delta_of_zero_has_no_angle():
    found = diff(adapter("one", w=[0.0, -0.0]), adapter("two", w=[1.0, 1.0]))
    assert (found.overall.cosine, found.overall.sign_agreement, found.overall.distance) == (None, None, math.sqrt(2))


def test_it_prints_and_is_json():
    found = diff(adapter("[red]one", w=[1.0, -1.0]), adapter("two", w=[1.0, 1.0], v=[2.0]))
    text = str(found)
    assert "[red]one (a) and two (b)" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["w", "v", "all"]
    rich = pytest.importorskip("rich.console")
    out = io.StringIO()
    rich.Console(file=out, width=100).print(found)
    assert "[red]one" in out.getvalue()
    assert "50.0%" in out.getvalue()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["tensors"][0]["cosine"] == 0.0
    assert plain["same"] is False


@pytest.fixture
def run(capsys):
    typer = pytest.importorskip("typer")
    from peft_surgical_cli.inspect import diff_command as command

    app = typer.Typer()
    app.command()(command)

    def call(*arguments):
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_the_command_prints_what_differs(base, tmp_path, run):
    first = saved(base, tmp_path / "a", "block1 + head")
    second = saved(base, tmp_path / "b", "block1", 4, scale=2.0)
    shown = run(first, second)
    assert "a (a) and b (b)" in shown
    assert "layer1.0.weight" in shown
    assert "scale: 1.0 and 2.0" in shown
    assert "target: block1 + head and block1" in shown
    plain = json.loads(run(first, second, "--json", "--top", "2"))
    assert len(plain["tensors"]) == 2
    assert plain["tensors"][0]["distance"] >= plain["tensors"][1]["distance"]
    assert plain["overall"]["values"] == diff(first, second).overall.values
    assert "they change a base in the same way" in run(first, first)
    other = copy.deepcopy(base)
    other.conv1.weight.data += 1
    assert "of different bases: conv1.weight" in run(first, saved(other, tmp_path / "c"))
    with pytest.raises(ConfigError, match="nothing"):
        run(first, tmp_path / "nothing")
