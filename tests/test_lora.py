"""An adapter as LoRA: exact at full rank, best at any other, and loaded by PEFT in a process without this package."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import _convert_module_to_lora
from safetensors.torch import load_file
from tiny import CASES, ConvNet, clip, disturb, llama, outputs, same, snapshot, train, vit
from torch import nn
from transformers import ViTImageProcessor
from transformers.pytorch_utils import Conv1D

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.adapters.lora import to_lora
from peft_surgical.adapters.low_rank import low_rank
from peft_surgical.errors import AdapterError, BaseMismatchError

INPUTS = CASES["conv+BN"].inputs()


class Mixed(nn.Module):
    """Every kind of module that LoRA reads in its own way, and names of which one is the end of another."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding="same", bias=False)
        self.stage = nn.Sequential(nn.Conv1d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(12))
        self.stage.add_module("conv1", nn.Conv1d(12, 12, 1, bias=False))
        self.grouped = nn.Conv1d(12, 12, 3, padding=1, groups=4)
        self.dilated = nn.Conv1d(12, 12, 3, padding=2, dilation=2)
        self.gpt = Conv1D(6, 12)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stage(self.conv1(self.embed(x).transpose(1, 2)))
        x = torch.tanh(self.dilated(torch.tanh(self.grouped(x)))).mean(2)
        return self.fc(self.norm(self.gpt(x)))


class Reader(nn.Module):
    """Modules whose weights torch reads without calling them; the final norm has the name that ends all the others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        linear = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": linear[0], "proj": linear[1]})
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer(x)
        return self.fc(self.norm(x + self.block["proj"](self.block["fc"](self.block["norm"](x)))).mean(1))


TOKENS = torch.arange(22).view(2, 11) % 11
SEQUENCES = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
# Target, network and inputs, and what nothing is kept of.
EXACT = {
    "convolutions": ("all", lambda: ConvNet(nn.BatchNorm2d), INPUTS, ()),
    "one block": ("block1", lambda: ConvNet(nn.BatchNorm2d), INPUTS, ()),
    "vit": ("block1 + head", vit, {"pixel_values": INPUTS}, ()),
    "clip": ("block1 + head", clip, {"pixel_values": INPUTS}, ()),
    "llama": ("block1", llama, {"input_ids": TOKENS[:, :5]}, ()),
    "kinds": ("all", Mixed, TOKENS, ()),
    "readers": ("all", Reader, SEQUENCES, ()),
    "raw": ("blocks.0 + head", CASES["root tokens"].make, INPUTS, ("blocks.0.gamma",)),
    "root": ("cls_token + patch_embed", CASES["root tokens"].make, INPUTS, ("cls_token",)),
    "biases": ("*.bias + *.fc1.weight", vit, {"pixel_values": INPUTS}, ()),
}


def tuned(case, folder=None, seed=3, **kwargs):
    """(base, adapted model, inputs, what is left out)."""
    target, make, inputs, left_out = EXACT[case]
    torch.manual_seed(0)
    base = make().eval()
    for name, buffer in base.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, **kwargs)).eval()
    disturb(model, 0.2, seed)
    if folder is not None:
        model.save_pretrained(folder)
    return base, model, inputs, left_out


def as_lora(base, folder):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


# --- factors ---


def test_factors_by_hand():
    # Singular values 4 and 2: of the squared norm 20, the first holds 80%.
    matrix = torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    first, both = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]), matrix
    for settings, wanted in (
        ({"rank": 1}, first),
        ({"rank": 2}, both),
        ({"rank": 9}, both),
        ({"energy": 0.8 - 1e-6}, first),
        ({"energy": 0.8 + 1e-6}, both),
        ({"energy": 1.0}, both),
    ):
        a, b = low_rank(matrix, **settings)
        assert torch.allclose(b @ a, wanted, atol=1e-6)
        assert a.shape[0] == b.shape[1]
    assert low_rank(matrix, rank=1)[0].shape == (1, 3)


@pytest.mark.parametrize("amount", [1, 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_factors_are_peft_s(kind, amount):
    module = nn.Linear(7, 5) if kind == "Linear" else Conv1D(5, 7)
    delta = torch.randn(module.weight.shape)
    layer = SimpleNamespace(get_delta_weight=lambda name: delta, get_base_layer=lambda: module)
    a, b, rank = _convert_module_to_lora(layer, amount)
    ours = low_rank(delta if kind == "Linear" else delta.T, **{"rank" if isinstance(amount, int) else "energy": amount})
    assert rank == len(ours[0])
    assert torch.allclose(ours[1] @ ours[0], b @ a, atol=1e-5)


def test_no_matrix_of_this_rank_is_nearer():
    torch.manual_seed(0)
    matrix = torch.randn(9, 6, dtype=torch.float64)
    a, b = low_rank(matrix, rank=2)
    best = (matrix - b @ a).norm()
    assert best == pytest.approx(torch.linalg.svdvals(matrix)[2:].norm())
    for _ in range(20):
        other = b + 0.1 * torch.randn_like(b), a + 0.1 * torch.randn_like(a)
        assert (matrix - other[0] @ other[1]).norm() > best


# --- at full rank ---


@pytest.mark.parametrize("amount", [{"rank": 1000}, {"energy": 1.0}], ids=["rank", "energy"])
@pytest.mark.parametrize("case", EXACT)
def test_at_full_rank_it_is_the_adapter(case, amount, tmp_path):
    base, model, inputs, left_out = tuned(case, scale=0.5)
    found = to_lora(model, **amount, output=tmp_path)
    assert found.left_out == left_out
    with torch.no_grad():  # what is left out is left out of the comparison, too
        for name, parameter in model.named_parameters():
            path, mark, leaf = name.removeprefix("base_model.model.").rpartition("surgery.surgical_delta.default.")
            if mark and path + leaf in left_out:
                parameter.zero_()
    wanted = outputs(model, inputs)
    lora = as_lora(base, tmp_path)
    assert torch.allclose(outputs(lora, inputs), wanted, atol=1e-5)
    assert not torch.allclose(outputs(base, inputs), wanted, atol=1e-2)
    assert {row.name for row in found.rows if row.kept == "nothing"} == set(left_out)
    assert all(row.error < 1e-5 for row in found.rows if row.kept != "nothing")
    if not left_out:
        assert found.error < 1e-5
    with lora.disable_adapter():
        assert torch.equal(outputs(lora, inputs), outputs(base, inputs))


@pytest.mark.parametrize("case", ["convolutions", "vit", "llama"])
def test_it_merges_as_peft_merges_lora(case, tmp_path):
    base, model, inputs, _ = tuned(case)
    to_lora(model, rank=1000, output=tmp_path)
    merged = as_lora(base, tmp_path).merge_and_unload()
    assert torch.allclose(outputs(merged, inputs), outputs(model, inputs), atol=1e-5)


def test_what_is_kept_how():
    _, model, _, _ = tuned("kinds")
    found = to_lora(model, rank=2)
    kept = {row.name: row.kept for row in found.rows}
    whole = ("grouped", "dilated", "norm", "stage.1", "gpt", "fc")
    assert {name for name, how in kept.items() if how == "whole"} == {
        f"{path}.{leaf}" for path in whole for leaf in ("weight", "bias")
    }
    assert {name for name, how in kept.items() if how == "factors"} == {
        "embed.weight", "conv1.weight", "stage.0.weight", "stage.conv1.weight",
    }  # fmt: skip
    ranks = {row.name: (row.rank, row.full_rank) for row in found.rows if row.kept == "factors"}
    assert ranks["embed.weight"] == (2, 8)
    assert ranks["stage.conv1.weight"] == (2, 12)
    # One path is the end of another, so the targets are a pattern of whole paths.
    assert isinstance(found.config.target_modules, str)
    assert set(found.config.modules_to_save) == set(whole)


def test_modules_whose_weights_are_read_elsewhere_are_kept_whole():
    _, model, _, _ = tuned("readers")
    found = to_lora(model, energy=0.9)
    assert set(found.config.modules_to_save) == {
        "layer.self_attn", "layer.linear1", "layer.linear2", "layer.norm1", "layer.norm2",
        "norm", "block.norm", "fc", "block.fc",
    }  # fmt: skip


def test_a_bias_is_the_bias_of_lora_b_where_all_targets_have_one(tmp_path):
    base, model, inputs, _ = tuned("vit")
    found = to_lora(model, rank=2, output=tmp_path)
    assert found.config.lora_bias
    kept = {row.name: row.kept for row in found.rows}
    assert kept["classifier.bias"] == "bias"
    held = load_file(tmp_path / "adapter_model.safetensors")
    delta = read_adapter(model).deltas["classifier.bias"]
    assert torch.equal(held["base_model.model.classifier.lora_B.bias"], delta)
    assert found.config.modules_to_save is None or "classifier" not in found.config.modules_to_save
    assert outputs(as_lora(base, tmp_path), inputs).isfinite().all()


def test_of_targets_with_and_without_a_bias_the_lesser_part_is_kept_whole(tmp_path):
    for sizes, whole in (((4, 16), ["0"]), ((32, 2), ["2"])):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, sizes[0], bias=False), nn.Tanh(), nn.Linear(sizes[0], sizes[1]))
        model = get_peft_model(copy.deepcopy(network), SurgicalConfig(target=["0", "2"]))
        disturb(model, 0.2)
        found = to_lora(model, rank=100, output=tmp_path / whole[0])
        assert found.config.modules_to_save == whole
        assert found.config.lora_bias is (whole == ["0"])
        x = torch.randn(3, 4)
        assert torch.allclose(outputs(as_lora(network, tmp_path / whole[0]), x), outputs(model, x), atol=1e-5)


def test_a_bias_alone_has_factors_of_zero(tmp_path):
    base, model, inputs, _ = tuned("biases")
    found = to_lora(model, rank=4, output=tmp_path)
    lora = as_lora(base, tmp_path)
    q_proj = "vit.layers.0.attention.q_proj"
    assert found.config.rank_pattern["^" + q_proj.replace(".", r"\.")] == 1
    assert not found.tensors[f"base_model.model.{q_proj}.lora_B.weight"].any()
    assert found.tensors[f"base_model.model.{q_proj}.lora_B.bias"].any()
    assert outputs(lora, inputs).isfinite().all()


# --- at lower rank ---


def test_the_error_is_that_of_the_deltas_that_peft_reads(tmp_path):
    base, model, _, _ = tuned("convolutions", scale=2.0)
    found = to_lora(model, rank=2, output=tmp_path)
    lora = as_lora(base, tmp_path).get_base_model()
    squared, total = 0.0, 0.0
    for row in found.rows:
        delta = 2 * read_adapter(model).deltas[row.name]
        assert row.norm == pytest.approx(float(delta.norm()))
        total += float(delta.norm()) ** 2
        if row.kept == "factors":
            layer = lora.get_submodule(row.name.removesuffix(".weight"))
            wrong = float((layer.get_delta_weight("default") - delta).norm())
            assert row.error == pytest.approx(wrong / float(delta.norm()), rel=1e-3)
            assert 0.01 < row.error < 1
            squared += wrong**2
        else:
            assert row.kept in ("whole", "bias")
            assert row.error == 0.0
    assert found.error == pytest.approx((squared / total) ** 0.5, rel=1e-3)


def test_energy_gives_each_delta_the_rank_that_it_needs(tmp_path):
    base, model, _, _ = tuned("vit")
    network = model.get_base_model()
    simple = network.vit.layers[0].mlp.fc1.surgery.delta("default", "weight")
    simple.data = torch.outer(torch.randn(16), torch.randn(16))
    found = to_lora(model, energy=0.9, output=tmp_path)
    rows = {row.name: row for row in found.rows}
    assert rows["vit.layers.0.mlp.fc1.weight"].rank == 1
    assert rows["vit.layers.0.mlp.fc2.weight"].rank > 3
    assert all(row.error**2 <= 0.1 + 1e-6 for row in found.rows)
    lora = as_lora(base, tmp_path)
    assert lora.get_base_model().vit.layers[0].mlp.fc1.r["default"] == 1
    assert lora.get_base_model().vit.layers[0].mlp.fc1.scaling["default"] == 1.0


def test_a_higher_rank_is_nearer():
    _, model, _, _ = tuned("convolutions")
    errors = [to_lora(model, rank=rank).error for rank in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_a_delta_of_zero_needs_nothing():
    base = vit()
    model = get_peft_model(base, SurgicalConfig(target="block1"))
    with pytest.raises(AdapterError, match="tunes nothing that has factors"):
        to_lora(model, rank=2)
    model.get_base_model().vit.layers[0].mlp.fc1.surgery.delta("default", "weight").data.add_(1)
    found = to_lora(model, rank=2)
    assert {row.name for row in found.rows if row.kept == "factors"} == {"vit.layers.0.mlp.fc1.weight"}
    assert (found.left_out, found.error < 1e-6) == ((), True)
    assert not found.config.lora_bias


# --- without what LoRA cannot express ---


def test_factors_only(tmp_path):
    base, model, inputs, _ = tuned("convolutions")
    found = to_lora(model, rank=1000, keep=False, output=tmp_path)
    assert set(found.left_out) == {"bn1.weight", "bn1.bias", "layer1.1.weight", "layer1.1.bias", "layer1.0.bias",
        "layer2.0.bias", "layer2.1.weight", "layer2.1.bias", "fc.bias"}  # fmt: skip
    assert found.config.modules_to_save is None
    assert not found.config.lora_bias
    assert all(".lora_" in key for key in found.tensors)
    lost = sum(row.norm**2 for row in found.rows if row.kept == "nothing") / sum(row.norm**2 for row in found.rows)
    assert found.error == pytest.approx(lost**0.5, rel=1e-4)
    for name in found.left_out:
        path, _, leaf = name.rpartition(".")
        model.get_base_model().get_submodule(path).surgery.delta("default", leaf).data.zero_()
    assert torch.allclose(outputs(as_lora(base, tmp_path), inputs), outputs(model, inputs), atol=1e-5)


def test_a_tied_tensor_is_left_out():
    case = CASES["tied"]
    model = get_peft_model(case.network(), SurgicalConfig(target="embed + mid"))
    disturb(model)
    found = to_lora(model, rank=2)
    assert found.left_out == ("embed.weight",)
    assert found.error > 0.1
    with pytest.raises(AdapterError, match="tunes nothing that has factors"):
        to_lora(get_peft_model(case.network(), SurgicalConfig(target="embed")), rank=2)


# --- values ---


def test_moved_statistics_come_with_their_norms(tmp_path):
    base, _, _, _ = tuned("convolutions")
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", norm_stats="all"))
    train(model, torch.randn(6, 3, 8, 8))
    disturb(model)
    model.save_pretrained(tmp_path / "own")
    to_lora(tmp_path / "own", base, rank=1000, output=tmp_path / "lora")
    assert torch.allclose(outputs(as_lora(base, tmp_path / "lora"), INPUTS), outputs(model, INPUTS), atol=1e-5)
    found = to_lora(model, rank=1000, keep=False)
    assert {"bn1.running_mean", "layer2.1.running_var"} < set(found.left_out)
    model.set_scale("default", 0.5)
    to_lora(model, rank=1000, output=tmp_path / "half")
    assert torch.allclose(outputs(as_lora(base, tmp_path / "half"), INPUTS), outputs(model, INPUTS), atol=1e-5)


def test_a_new_head_comes_along(tmp_path):
    base, _, _, _ = tuned("convolutions")
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", modules_to_save=["fc"]))
    train(model, INPUTS)
    disturb(model)
    model.save_pretrained(tmp_path / "own")
    found = to_lora(tmp_path / "own", base, rank=1000, output=tmp_path / "lora")
    assert found.config.modules_to_save[0] == "fc"
    assert torch.allclose(outputs(as_lora(base, tmp_path / "lora"), INPUTS), outputs(model, INPUTS), atol=1e-5)


# --- the front door ---


def test_a_folder_and_a_live_model_give_the_same_and_leave_the_base(tmp_path):
    base, model, _, _ = tuned("kinds", tmp_path / "own")
    model.add_adapter("other", SurgicalConfig(target="fc"))
    disturb(model, seed=9)
    model.save_pretrained(tmp_path / "own")
    before, kept = snapshot(base), snapshot(model)
    live, held = to_lora((model, "default"), rank=2), to_lora(tmp_path / "own", base, rank=2)
    assert same(dict(live.tensors), dict(held.tensors))
    assert live.rows == held.rows
    assert live.config.to_dict() == held.config.to_dict()
    assert same(snapshot(base), before)
    assert same(snapshot(model), kept)
    assert [type(module) for module in base.modules()] == [type(module) for module in Mixed().modules()]


def test_the_cost_is_measured_by_the_caller_s_metric(tmp_path):
    base, model, inputs, _ = tuned("convolutions")
    wanted = outputs(model, inputs)
    seen = []

    def distance(network):
        assert not network.training
        seen.append(type(network).__name__)
        return float((outputs(network, inputs) - wanted).abs().max())

    found = to_lora(model, rank=1, evaluate=distance, output=tmp_path)
    assert found.metric_before == 0.0
    assert found.metric_after == pytest.approx(float((outputs(as_lora(base, tmp_path), inputs) - wanted).abs().max()))
    assert found.metric_after > 0.001
    assert len(seen) == 2
    assert torch.equal(outputs(model, inputs), wanted)
    full = to_lora(model, rank=1000, evaluate=distance)
    assert full.metric_after < 1e-5
    plain = json.loads(json.dumps(full.to_dict()))
    assert plain["metric_after"] == full.metric_after
    assert len(plain["tensors"]) == len(full.rows)
    assert plain["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in full.tensors.values())


WITHOUT = """
import sys
sys.modules["peft_surgical"] = None  # importing it would fail
import torch
from peft import PeftModel
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from tiny import ConvNet
network = ConvNet(torch.nn.BatchNorm2d)
network.load_state_dict(torch.load(folder + "/base.pt", weights_only=True))
model = PeftModel.from_pretrained(network, folder + "/lora").eval()
images, wanted = torch.load(folder + "/outputs.pt", weights_only=True)
with torch.no_grad():
    found = model(images)
    merged = model.merge_and_unload()(images)
assert torch.allclose(found, wanted, atol=1e-5), (found - wanted).abs().max()
assert torch.allclose(merged, wanted, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_peft_loads_it_in_a_process_without_this_package(tmp_path):
    base, model, inputs, _ = tuned("convolutions")
    to_lora(model, energy=1.0, output=tmp_path / "lora")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    torch.save((inputs, outputs(model, inputs)), tmp_path / "outputs.pt")
    command = [sys.executable, "-W", "error::UserWarning", "-c", WITHOUT, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_what_cannot_be_converted(tmp_path):
    base, model, _, _ = tuned("convolutions", tmp_path / "own")
    for settings, match in (
        ({}, "rank=None and energy=None: give one of them"),
        ({"rank": 2, "energy": 0.5}, "rank=2 and energy=0.5: give one"),
        ({"rank": 0}, "rank=0: give a whole number from 1 up"),
        ({"rank": 2.0}, r"rank=2.0: give a whole number"),
        ({"energy": 0.0}, r"energy=0.0: give a share .* in \(0, 1\]"),
        ({"energy": 1.5}, r"energy=1.5"),
    ):
        with pytest.raises(AdapterError, match=match):
            to_lora(model, **settings)
    with pytest.raises(AdapterError, match=r"No base: .* Pass it as to_lora\(adapter, base"):
        to_lora(tmp_path / "own", rank=2)
    other = copy.deepcopy(base)
    other.conv1.weight.data += 1
    with pytest.raises(BaseMismatchError, match=r"first conv1\.weight"):
        to_lora(tmp_path / "own", other, rank=2)
    with pytest.raises(AdapterError, match="exists and is not empty"):
        to_lora(model, rank=2, output=tmp_path / "own")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged into this model"):
        to_lora(model, rank=2)
    with pytest.raises(AdapterError, match="has no surgical adapter"):
        to_lora(get_peft_model(vit(), LoraConfig(target_modules=["q_proj"])), rank=2)
    norms = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="bn1"))
    disturb(norms)
    with pytest.raises(AdapterError, match="tunes nothing that has factors"):
        to_lora(norms, rank=2)


# --- the command ---


@pytest.fixture
def run(capsys):
    typer = pytest.importorskip("typer")
    from peft_surgical_cli.adapters import to_lora_command as command

    app = typer.Typer()
    app.command()(command)

    def call(*arguments):
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_the_command_finds_the_base_and_prints_what_it_cost(tmp_path, run):
    torch.manual_seed(0)
    base = vit().eval()
    base.save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1 + embedding"))
    disturb(model, 0.2)
    model.save_pretrained(tmp_path / "own")
    shown = run(tmp_path / "own", "--base", tmp_path / "base", "--rank", 2, "--output", tmp_path / "lora")
    found = to_lora(tmp_path / "own", base, rank=2)
    assert f"relative error of all deltas: {found.error:.2%}" in shown
    assert "left out: vit.embeddings.cls_token, vit.embeddings.position_embeddings" in shown
    assert same(load_file(tmp_path / "lora" / "adapter_model.safetensors"), dict(found.tensors))
    arguments = (tmp_path / "own", "--base", tmp_path / "base", "--energy", 1.0, "--factors-only", "--json")
    plain = json.loads(run(*arguments, "--output", tmp_path / "other"))
    assert {row["kept"] for row in plain["tensors"]} == {"factors", "nothing"}
    assert all(row["error"] < 1e-5 or row["kept"] == "nothing" for row in plain["tensors"])
    with pytest.raises(AdapterError, match="exists and is not empty"):
        run(*arguments, "--output", tmp_path / "other")
