"""Push, pull, load, merge and list, over real HTTP against a hub on the loopback interface."""

import copy
import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import READ, WRITE, hub  # noqa: F401 (a fixture)
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save, save_file

timm = pytest.importorskip("timm")
PIL = pytest.importorskip("PIL.Image")

import tiny  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical import SurgicalConfig, config  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.errors import (  # noqa: E402
    AdapterError,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    DataError,
    SurgicalError,
)
from peft_surgical.evaluation import Report, measure  # noqa: E402
from peft_surgical.hub import (  # noqa: E402
    load_adapted,
    merge_to,
    open_adapted,
    pull,
    push_adapter,
    pushing,
)
from peft_surgical.hub.pushing import redirected  # noqa: E402
from peft_surgical_cli import stored  # noqa: E402
from peft_surgical_cli.stored import adapters_in, by_base, cached_adapters  # noqa: E402

NAMES = ("cat", "dog", "owl", "rat")
IMAGE = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
GIVEN = {"license": "apache-2.0", "datasets": []}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "lab/base"


def files_in(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The files of a base for each library."""
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=4)
    with torch.no_grad():
        network.fc.weight.normal_()
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(network, folder, model_config={"label_names": NAMES}, safe_serialization=True)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    other = tmp_path_factory.mktemp("transformers")
    transformers.ViTForImageClassification(config).save_pretrained(other)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(other)
    return {"timm": files_in(folder), "transformers": files_in(other)}


@pytest.fixture(params=["timm", "transformers"])
def library(request, hub, checkpoints):  # noqa: F811
    hub.add(BASE, checkpoints[request.param])
    return request.param


@pytest.fixture
def base(hub, checkpoints):  # noqa: F811
    """A base of timm's on the hub."""
    hub.add(BASE, checkpoints["timm"])
    return BASE


def tuned(name=BASE, seed=3, opening=None, **config):
    """A base from the hub with an adapter that is not the identity."""
    network = load_base(name, **(opening or {})).model
    model = get_peft_model(network, SurgicalConfig(**{"target": "block1", **config}))
    tiny.disturb(model, seed=seed)
    return model.eval()


def logits(model, size=32):
    inputs = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    return tiny.outputs(model, inputs.to(next(model.parameters()).dtype))


def report(**settings):
    rule = "learning rate and epoch by validation accuracy"
    rows = (
        measure("accuracy before", [0.5], dataset="test", n=40, seeds=[0], selection="none"),
        measure("accuracy", [0.75], dataset="test", n=40, seeds=[0], selection=rule),
    )
    return Report(BASE, "block1", rows, settings)


def commits(server, repo="me/frost"):
    return server.repos[repo].messages if repo in server.repos else []


# Push and load


def test_what_is_pushed_is_what_is_loaded(hub, library):  # noqa: F811
    model = tuned()
    done = push_adapter(model, "me/frost", report=report(), **GIVEN)
    repo = hub.repos["me/frost"]
    assert commits(hub) == ["initial commit", "Upload a surgical adapter"]
    assert (done.oid, done.revision, done.pr_url) == (repo.refs["main"], "main", None)
    assert done.url == f"{hub.url}/me/frost/commit/{done.oid}"
    there = repo.files()
    assert set(done.files) == set(there) - {".gitattributes"}
    assert set(done.files) >= {"README.md", CONFIG, WEIGHTS, "base.json", "report.json"}
    again = load_adapted("me/frost")
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    adapted = open_adapted("me/frost")
    assert adapted.label_names == NAMES
    assert (adapted.record.library, adapted.record.id) == (library, BASE)
    one, two = adapted.logits(IMAGE), adapted.logits(IMAGE, IMAGE)
    assert one.shape == (4,)
    assert torch.allclose(two[1], one, atol=1e-5)
    expected = tiny.outputs(model, load_base(BASE).transform_eval(IMAGE)[None])[0]
    assert torch.equal(one, expected)


def test_peft_loads_it_by_its_id_and_revision(hub, library):  # noqa: F811
    first, second = tuned(seed=3), tuned(seed=4)
    old = push_adapter(first, "me/frost", **GIVEN)
    push_adapter(second, "me/frost", **GIVEN)
    for revision, expected in ((None, second), (old.oid, first)):
        model = PeftModel.from_pretrained(load_base(BASE).model, "me/frost", revision=revision).eval()
        assert torch.equal(logits(model), logits(expected))
        assert torch.equal(logits(load_adapted("me/frost", revision=revision)), logits(expected))


def test_the_lines_of_the_card_run(hub, library, tmp_path, monkeypatch, capsys):  # noqa: F811
    model = tuned()
    push_adapter(model, "me/frost", **GIVEN)
    card = hub.repos["me/frost"].files()["README.md"].decode()
    lines = card.split("```python\n")[1].split("```")[0]
    IMAGE.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").rename("photo.jpg")
    exec(lines, {})
    expected = tiny.outputs(model, load_base(BASE).transform_eval(IMAGE)[None])[0]
    assert capsys.readouterr().out.strip() == NAMES[expected.argmax()]
    assert len(lines.strip().splitlines()) <= 6


def test_pushing_again_makes_no_commit_and_removes_what_is_stale(hub, base):  # noqa: F811
    model = tuned()
    first = push_adapter(model, "me/frost", report=report(), **GIVEN)
    hub.add("me/frost", {"adapter_model.bin": b"an older adapter", "notes.txt": b"mine"})
    second = push_adapter(model, "me/frost", **GIVEN)
    # The report and the pickle were of other adapters; what this package did not write stays.
    assert set(hub.repos["me/frost"].files()) == {".gitattributes", "notes.txt", *second.files}
    assert "report.json" in first.files
    assert "report.json" not in second.files
    third = push_adapter(model, "me/frost", **GIVEN)
    assert third.oid == second.oid


def test_a_branch_is_made_and_main_left_alone(hub, base):  # noqa: F811
    first, second = tuned(seed=3), tuned(seed=4)
    push_adapter(first, "me/frost", **GIVEN)
    done = push_adapter(second, "me/frost", revision="next", **GIVEN)
    assert done.revision == "next"
    assert torch.equal(logits(load_adapted("me/frost")), logits(first))
    assert torch.equal(logits(load_adapted("me/frost", revision="next")), logits(second))


def test_a_pull_request(hub, base):  # noqa: F811
    first, second = tuned(seed=3), tuned(seed=4)
    push_adapter(first, "me/frost", **GIVEN)
    done = push_adapter(second, "me/frost", create_pr=True, commit_message="A colder one", **GIVEN)
    assert (done.revision, done.pr_url) == ("refs/pr/1", f"{hub.url}/me/frost/discussions/1")
    assert commits(hub)[-1] == "A colder one"
    assert torch.equal(logits(load_adapted("me/frost")), logits(first))
    assert torch.equal(logits(load_adapted("me/frost", revision="refs/pr/1")), logits(second))


def test_a_pull_request_to_somebody_elses_repository(hub, base):  # noqa: F811
    first, second = tuned(seed=3), tuned(seed=4)
    push_adapter(first, "lab/frost", **GIVEN)
    done = push_adapter(second, "lab/frost", create_pr=True, token=READ, **GIVEN)
    assert torch.equal(logits(load_adapted("lab/frost", revision=done.revision)), logits(second))
    with pytest.raises(AdapterError, match="cannot push to lab/frost: the token has no permission"):
        push_adapter(second, "lab/frost", token=READ, **GIVEN)
    assert torch.equal(logits(load_adapted("lab/frost")), logits(first))


def test_a_hub_without_lfs(hub, base):  # noqa: F811
    hub.lfs = ()
    model = tuned()
    push_adapter(model, "me/frost", **GIVEN)
    assert hub.asked("PUT") == 0
    assert torch.equal(logits(load_adapted("me/frost")), logits(model))


@pytest.mark.parametrize(
    ("opening", "config", "head"),
    [
        ({}, {}, "keep"),
        ({}, {"target": "all", "norm_stats": "all"}, "keep"),
        ({"label_names": ("x", "y", "z"), "head": "zero"}, {"target": "head"}, "zero"),
        ({"label_names": ("x", "y", "z")}, {"modules_to_save": ["fc"]}, "new"),
    ],
)
def test_every_kind_of_head_is_built_again(hub, base, opening, config, head):  # noqa: F811
    model = tuned(opening=opening, **config)
    if head == "new":
        with torch.no_grad():
            model.base_model.model.fc.modules_to_save["default"].weight.normal_()
    if config.get("norm_stats") == "all":
        tiny.train(model, torch.randn(4, 3, 32, 32))
    push_adapter(model, "me/frost", report=report(open={**opening, "head": head, "weights": "pretrained"}), **GIVEN)
    record = json.loads(hub.repos["me/frost"].files()["base.json"])
    assert record["head"] == head
    assert ("fc.weight" in record["fingerprint"]) == (head != "new")
    assert record["num_classes"] == (3 if opening else 4)
    adapted = open_adapted("me/frost")
    assert torch.equal(logits(adapted.model), logits(model))
    assert adapted.label_names == (("x", "y", "z") if opening else NAMES)


def test_a_base_in_half_precision_is_opened_in_it(hub, base):  # noqa: F811
    network = load_base(BASE).model.to(torch.bfloat16)
    model = get_peft_model(network, SurgicalConfig(target="block1", delta_dtype="bfloat16"))
    tiny.disturb(model)
    push_adapter(model, "me/frost", **GIVEN)
    adapted = open_adapted("me/frost")
    assert adapted.record.dtype == "bfloat16"
    stored = load_file(adapted.folder / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert adapted.logits(IMAGE).dtype == torch.bfloat16


def test_a_folder_that_tune_wrote(hub, base, tmp_path):  # noqa: F811
    opening = {"label_names": ["x", "y", "z"], "head": "zero", "weights": "pretrained", "seed": 0}
    model = tuned(opening={"label_names": ("x", "y", "z"), "head": "zero"}, target="head")
    model.save_pretrained(tmp_path / "tuned")
    report(open=opening).save(tmp_path / "tuned" / "report.json")
    (tmp_path / "tuned" / "figure.png").write_bytes(b"\x89PNG a figure")
    done = push_adapter(tmp_path / "tuned", "me/frost", **GIVEN)
    there = hub.repos["me/frost"].files()
    assert there["figure.png"] == b"\x89PNG a figure"
    assert "](figure.png)" in there["README.md"].decode()
    assert "| **block1** | accuracy | test | 75.0 |" in there["README.md"].decode()
    assert "report.json" in done.files
    assert torch.equal(logits(load_adapted("me/frost")), logits(model))
    # Without the Hub's record, the folder is opened by its report.
    assert torch.equal(logits(load_adapted(tmp_path / "tuned")), logits(model))


def test_an_adapter_of_another_image_size_is_used_with_it(hub, base, tmp_path):  # noqa: F811
    opening = {"label_names": list(NAMES), "head": "keep", "weights": "pretrained", "seed": 0, "image_size": 64}
    tuned().save_pretrained(tmp_path / "tuned")
    report(open=opening).save(tmp_path / "tuned" / "report.json")
    push_adapter(tmp_path / "tuned", "me/frost", **GIVEN)
    push_adapter(tuned(), "me/live", report=report(open=opening), **GIVEN)
    for place in (tmp_path / "tuned", "me/frost", "me/live"):
        adapted = open_adapted(place)
        assert (adapted.record.image_size, adapted.transform(IMAGE).shape[1:]) == (64, (64, 64))
    given = open_adapted("me/frost", base={"name": BASE, "image_size": 96})
    assert given.transform(IMAGE).shape[1:] == (96, 96)


def test_what_is_pushed_names_no_place_on_this_machine(hub, base, checkpoints, tmp_path):  # noqa: F811
    home = tmp_path / "home of me"
    local = home / "base"
    local.mkdir(parents=True)
    for name, content in checkpoints["timm"].items():
        (local / name).write_bytes(content)
    opening = {"label_names": list(NAMES), "head": "keep", "weights": "pretrained", "seed": 0}
    settings = {
        "open": opening,
        "model": str(local),
        "data_from": str(home / "photos"),
        "source_from": str(home / "old"),
    }
    settings["caption"] = f"{local}: accuracy in percent; logs in /var/log/x, and C:\\Users\\me\\y"
    rows = tuple(replace(row, dataset=f"source {home / 'old'}, test") for row in report())
    tuned().save_pretrained(home / "tuned")
    numbers = Report(str(local), "block1", rows, settings)
    numbers.save(home / "tuned" / "report.json")
    numbers.save(home / "other.json")
    push_adapter(home / "tuned", "me/frost", base=BASE, comparison=[home / "other.json"], **GIVEN)
    there = hub.repos["me/frost"].files()
    for name, content in there.items():
        for place in (str(home), str(tmp_path), "/var/log", "Users"):
            assert place.encode() not in content, name
    pushed = Report.from_json(there["report.json"].decode())
    assert (pushed.model, pushed.settings["model"]) == (BASE, BASE)
    assert (pushed.settings["data_from"], pushed.settings["source_from"]) == ("photos", "old")
    assert pushed.settings["caption"] == f"{BASE}: accuracy in percent; logs in x, and y"
    assert [row.dataset for row in pushed] == ["source old, test"] * 2
    assert [row.value for row in pushed] == [row.value for row in rows]
    # What stays on the machine still says where everything is.
    assert Report.load(home / "tuned" / "report.json") == numbers


def test_one_of_several_adapters(hub, base):  # noqa: F811
    model = tuned()
    model.add_adapter("fog", SurgicalConfig(target="block2"))
    tiny.disturb(model, seed=5)
    done = push_adapter(model, "me/fog", adapter_name="fog", **GIVEN)
    assert WEIGHTS in done.files
    model.set_adapter("fog")
    assert torch.equal(logits(load_adapted("me/fog")), logits(model))
    with pytest.raises(AdapterError, match=r"no surgical adapter 'snow'; it has default, fog"):
        push_adapter(model, "me/fog", adapter_name="snow", **GIVEN)
    model.base_model.set_adapter(["default", "fog"])
    with pytest.raises(AdapterError, match=r"2 adapters are active: pass .* adapter_name= where"):
        push_adapter(model, "me/fog", **GIVEN)


def test_the_live_model_stays_as_it_is(hub, base):  # noqa: F811
    model = tuned()
    before, names = tiny.snapshot(model), [name for name, _ in model.named_modules()]
    push_adapter(model, "me/frost", **GIVEN)
    assert tiny.same(before, tiny.snapshot(model))
    assert names == [name for name, _ in model.named_modules()]


def test_timms_own_name_for_a_base(hub, checkpoints):  # noqa: F811
    hub.add("timm/test_resnet.r160_in1k", checkpoints["timm"])
    network = load_base("hf-hub:timm/test_resnet.r160_in1k").model
    network.name_or_path = None  # as timm.create_model leaves it
    model = get_peft_model(network, SurgicalConfig(target="block1"))
    tiny.disturb(model)
    push_adapter(model, "me/frost", **GIVEN)
    adapted = open_adapted("me/frost")
    assert adapted.record.id == "timm/test_resnet.r160_in1k"
    assert torch.equal(logits(adapted.model), logits(model.eval()))


def test_push_to_hub_goes_the_same_way(hub, base, monkeypatch, tmp_path):  # noqa: F811
    own = []

    def push_to_hub(self, repo_id, **kwargs):
        return redirected(lambda model, repo, **_: own.append(repo), self, repo_id, **kwargs)

    monkeypatch.setattr(PeftModel, "push_to_hub", push_to_hub)
    model = tuned()
    url = model.push_to_hub("me/frost", private=True, commit_message="Mine", tags=["frost"], **GIVEN)
    assert url == f"{hub.url}/me/frost/commit/{hub.repos['me/frost'].refs['main']}"
    assert hub.repos["me/frost"].private
    assert commits(hub)[-1] == "Mine"
    card = hub.repos["me/frost"].files()["README.md"].decode()
    assert "- frost\n" in card
    assert "library_name: peft" in card
    # As tutorials of PEFT have it: what is not known is missing on the card, and a warning says how to give it.
    with pytest.warns(UserWarning, match=r"the card of me/other says nothing of license= and datasets=: pass them"):
        model.push_to_hub("me/other")
    there = hub.repos["me/other"].files()
    assert not {"license", "datasets"} & set(ModelCard(there["README.md"].decode()).data.to_dict())
    assert "No licence was given" in there["README.md"].decode()
    assert torch.equal(logits(load_adapted("me/other")), logits(model))
    lora = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"]))
    lora.push_to_hub("me/lora")
    assert own == ["me/lora"]


def test_push_to_hub_of_a_network_that_nobody_can_open(hub, checkpoints, tmp_path):  # noqa: F811
    model = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d).eval(), SurgicalConfig(target="block1"))
    tiny.disturb(model)
    with pytest.warns(
        UserWarning, match=r"does not name the base, and others have to bring it: nothing says which base"
    ):
        model.push_to_hub("me/own", **GIVEN)
    card = hub.repos["me/own"].files()["README.md"].decode()
    scope = {"base": copy.deepcopy(model).unload()}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert torch.equal(tiny.outputs(scope["model"], tiny.images()), tiny.outputs(model, tiny.images()))
    for name, content in checkpoints["timm"].items():
        (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"the base is the folder .*, which nobody else has"):
        tuned(tmp_path).push_to_hub("me/folder", **GIVEN)
    assert not [n for n, content in hub.repos["me/folder"].files().items() if str(tmp_path).encode() in content]


def test_trainers_own_push_has_our_card_and_the_record_of_the_base(hub, checkpoints, tmp_path):  # noqa: F811
    hub.add(BASE, checkpoints["transformers"])  # Trainer itself cannot push networks without a config
    model = tuned()
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), hub_model_id="me/frost", report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments)
    with pytest.warns(UserWarning, match=r"the card of owner/out says nothing of license= and datasets="):
        trainer.push_to_hub(blocking=True)
    there = hub.repos["me/frost"].files()
    card = ModelCard(there["README.md"].decode())
    assert (card.data.library_name, card.data.base_model, card.data.load_with) == ("peft", BASE, "import peft_surgical")
    assert "Deltas of `block1` for [lab/base]" in card.text
    assert "## Training procedure" in card.text
    assert "ore information needed" not in card.text
    assert json.loads(there["base.json"])["id"] == BASE
    assert torch.equal(logits(load_adapted("me/frost")), logits(model))
    trainer.push_to_hub(blocking=True, license="mit", dataset="Mine", dataset_tags="me/photos")
    card = ModelCard(hub.repos["me/frost"].files()["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("mit", ["me/photos"])
    model.save_pretrained(tmp_path / "out")  # the page of an older adapter does not outlive it
    assert "weights_sha256" not in (tmp_path / "out/README.md").read_text()


# Who may do what


def test_private_repositories(hub, base, monkeypatch):  # noqa: F811
    model = tuned()
    push_adapter(model, "me/secret", private=True, **GIVEN)
    assert hub.repos["me/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match=r"cannot pull me/secret: there is no such repository, or it is private"):
        load_adapted("me/secret")
    assert torch.equal(logits(load_adapted("me/secret", token=READ)), logits(model))


def test_a_public_repository_is_not_pushed_to_as_private(hub, base):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    before = len(commits(hub))
    with pytest.raises(AdapterError, match=r"me/frost exists and is public, and private=True.*nothing was pushed"):
        push_adapter(tuned(seed=4), "me/frost", private=True, **GIVEN)
    assert len(commits(hub)) == before


def test_gated_repositories(hub, base, monkeypatch):  # noqa: F811
    push_adapter(tuned(), "me/gated", **GIVEN)
    hub.repos["me/gated"].gated = True
    monkeypatch.setenv("HF_TOKEN", READ)
    with pytest.raises(AdapterError, match=r"access to me/gated is granted by its owner\. Ask for it"):
        pull("me/gated", force=True)
    assert pull("me/gated", token=WRITE).commit == hub.repos["me/gated"].refs["main"]


def test_a_token_that_may_not_write(hub, base):  # noqa: F811
    with pytest.raises(AdapterError, match=r"cannot push to me/frost: the token has no permission for this"):
        push_adapter(tuned(), "me/frost", token=READ, **GIVEN)
    assert "me/frost" not in hub.repos
    with pytest.raises(AdapterError, match=r"cannot pull lab/base: the token is not known to the Hub"):
        pull(BASE, token="hf_wrong")


# Offline


def test_what_was_pulled_loads_offline(hub, base, monkeypatch):  # noqa: F811
    model = tuned()
    push_adapter(model, "me/frost", **GIVEN)
    load_adapted("me/frost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert torch.equal(logits(load_adapted("me/frost")), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(BASE).model, "me/frost").eval()), logits(model))
    assert len(hub.requests) == asked
    with pytest.raises(AdapterError, match=r"cannot pull me/other: .*not in the cache.*HF_HUB_OFFLINE"):
        load_adapted("me/other")


def test_a_hub_that_is_away_leaves_the_cache(hub, base):  # noqa: F811
    model = tuned()
    push_adapter(model, "me/frost", **GIVEN)
    load_adapted("me/frost")
    hub.stop()
    assert torch.equal(logits(load_adapted("me/frost")), logits(model))


# Refused before anything is sent


def test_what_the_card_lacks_is_said_before_anything_is_done(hub):  # noqa: F811
    with pytest.raises(ConfigError, match=r"lacks license, .*; datasets, "):
        push_adapter("nowhere", "me/frost")
    with pytest.raises(ConfigError, match=r"lacks base, "):
        push_adapter("nowhere", "me/frost", loading="model = ...", **GIVEN)
    with pytest.raises(ConfigError, match=r"'frost': it is neither a folder here nor owner/name"):
        pull("frost")
    with pytest.raises(ConfigError, match=r"neither a folder here nor owner/name"):
        load_adapted("no such/folder at all")
    assert hub.asked("POST") == 0


def test_a_card_that_the_hub_refuses_makes_no_repository(hub, base):  # noqa: F811
    with pytest.raises(ConfigError, match=r'the Hub refuses the card of me/frost: .*"license.*must be one of'):
        push_adapter(tuned(), "me/frost", license="my-own", datasets=[])
    assert "me/frost" not in hub.repos


def test_a_network_that_nobody_can_open(hub, tmp_path):  # noqa: F811
    model = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d).eval(), SurgicalConfig(target="block1"))
    tiny.disturb(model)
    with pytest.raises(ConfigError, match=r"nothing says which base .*say base=.*PeftModel.from_pretrained.*loading="):
        push_adapter(model, "me/own", **GIVEN)
    assert "me/own" not in hub.repos
    lines = "from peft import PeftModel\nmodel = PeftModel.from_pretrained(build(), 'me/own')"
    done = push_adapter(model, "me/own", base="our own network", loading=lines, **GIVEN)
    assert "base.json" not in done.files
    there = hub.repos["me/own"].files()
    assert json.loads(there[CONFIG])["base_model_name_or_path"] == "our own network"
    scope = {"build": lambda: copy.deepcopy(model).unload()}
    exec(there["README.md"].decode().split("```python\n")[1].split("```")[0], scope)
    assert torch.equal(tiny.outputs(scope["model"].eval(), tiny.images()), tiny.outputs(model, tiny.images()))
    with pytest.raises(ConfigError, match="nothing says which base"):
        load_adapted("me/own")


def test_a_base_in_a_folder_has_to_be_named_for_others(hub, base, checkpoints, tmp_path):  # noqa: F811
    for name, content in checkpoints["timm"].items():
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(content)
    model = tuned(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"the base is the folder .*/base, which nobody else has: push it too"):
        push_adapter(model, "me/frost", **GIVEN)
    private = {"data": str(tmp_path / "photos"), "source": f"source {tmp_path}/old, test", "ratio": "1 / 2"}
    numbers = dataclasses.replace(report(**private), model=str(tmp_path / "base"))
    model.peft_config["default"].selection = {"parents": [{"adapter": str(tmp_path / "one"), "weight": 1.0}]}
    done = push_adapter(model, "me/frost", base=BASE, report=numbers, **GIVEN)
    there = hub.repos["me/frost"].files(done.oid)
    assert not [name for name, content in there.items() if str(tmp_path).encode() in content]
    pushed = Report.from_json(there["report.json"].decode())
    assert (pushed.model, pushed.measurements) == (BASE, numbers.measurements)
    assert pushed.settings == {"data": "photos", "source": "source old, test", "ratio": "1 / 2"}
    assert json.loads(there[CONFIG])["selection"] == {"parents": [{"adapter": "one", "weight": 1.0}]}
    assert torch.equal(logits(load_adapted("me/frost")), logits(model))
    # Where the adapter stays, the folder will do.
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_adapted(tmp_path / "adapter")), logits(model))
    with pytest.raises(DataError, match=r"is the folder .*/moved, which is not on this machine"):
        load_adapted(tmp_path / "adapter", base=str(tmp_path / "moved"))


def test_a_base_by_a_relative_path_is_found_from_another_directory(hub, checkpoints, library, tmp_path, monkeypatch):  # noqa: F811
    for name, content in checkpoints[library].items():
        (tmp_path / "nets/base").mkdir(exist_ok=True, parents=True)
        (tmp_path / "nets/base" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    model = tuned("nets/base")
    model.save_pretrained("adapter")
    named = get_peft_model(model.unload(), SurgicalConfig(target="block1"))
    named.peft_config["default"].base_model_name_or_path = "local-dir:nets/base"  # as the command line was told
    named.save_pretrained("named")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in ("adapter", "named"):
        config = json.loads((tmp_path / place / CONFIG).read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "nets/base")
        assert load_adapted(tmp_path / place).training is False


def test_a_base_that_is_not_found_says_which_path_was_tried(hub, base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    model = tuned()
    for name, match in (
        (
            "nets/mine",
            rf"cannot open the base nets/mine: there is no such repo.*; there is no folder {tmp_path}/nets/mine",
        ),
        (
            "../nets/mine",
            rf"cannot open the base '../nets/mine': it is neither .*; there is no folder {tmp_path}/../nets/m",
        ),
    ):
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained("adapter")
        with pytest.raises(SurgicalError, match=match):
            load_adapted("adapter")
    with pytest.raises(
        DataError, match=rf"the base 'mine' is no repository .*, no folder \({tmp_path}/mine\), and none"
    ):
        load_adapted("adapter", base="mine")


def test_another_base_is_not_pushed_as_this_ones(hub, base, checkpoints):  # noqa: F811
    network = load_base(BASE).model
    with torch.no_grad():
        network.layer3[0].conv1.weight.add_(1e-3)  # not tuned, so that the deltas alone would not tell
    model = get_peft_model(network, SurgicalConfig(target="block1"))
    tiny.disturb(model)
    with pytest.raises(
        BaseMismatchError, match=r"The base lab/base at \w+ is not the one .* 1 of \d+ .*layer3.0.conv1"
    ):
        push_adapter(model, "me/frost", **GIVEN)
    assert "me/frost" not in hub.repos


def test_a_head_that_nobody_can_draw_again(hub, base):  # noqa: F811
    model = tuned(opening={"num_classes": 7}, target="head")
    with pytest.raises(ConfigError, match="has 4 classes, and the data 7"):
        push_adapter(model, "me/frost", **GIVEN)


def test_a_base_with_random_weights(hub, base, tmp_path):  # noqa: F811
    tuned().save_pretrained(tmp_path / "tuned")
    report(open={"label_names": list(NAMES), "head": "keep", "weights": "random"}).save(tmp_path / "tuned/report.json")
    with pytest.raises(ConfigError, match=r"is random \(--random\), and nobody can open it"):
        push_adapter(tmp_path / "tuned", "me/frost", **GIVEN)


def test_what_is_saved_is_compared_with_what_is_live(hub, base, monkeypatch):  # noqa: F811
    read = pushing.get_peft_model_state_dict
    changed = []

    def differently(model, **kwargs):
        found = read(model, **kwargs)
        if changed:
            found[changed[0]] = found[changed[0]] + 1
        changed[:] = [next(iter(found))]
        return found

    monkeypatch.setattr(pushing, "get_peft_model_state_dict", differently)
    with pytest.raises(AdapterError, match=r"adapter 'default' is not what was saved .*: nothing was pushed"):
        push_adapter(tuned(), "me/frost", **GIVEN)
    assert "me/frost" not in hub.repos


def test_arguments_that_make_no_sense(hub, base, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="this report is of the base without an adapter"):
        push_adapter(tuned(), "me/frost", report=Report(BASE, "none", (), {}), **GIVEN)
    with pytest.raises(ConfigError, match=r"the figure .*plot.svg is no .png file"):
        push_adapter(tuned(), "me/frost", figure=tmp_path / "plot.svg", **GIVEN)
    with pytest.raises(ConfigError, match="give name=, and revision="):
        push_adapter(tuned(), "me/frost", base={"id": BASE}, **GIVEN)
    with pytest.raises(AdapterFileError, match="is no folder"):
        push_adapter(tmp_path / "nowhere", "me/frost", **GIVEN)
    assert "me/frost" not in hub.repos


# Refused before anything is loaded


def test_a_pickle_is_refused_and_not_even_fetched(hub, base, tmp_path):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    files = {name: content for name, content in hub.repos["me/frost"].files().items() if name != WEIGHTS}
    hub.add("me/pickled", {**files, "adapter_model.bin": b"cos\nsystem\n(S'true'\ntR."})
    for load in (pull, load_adapted, open_adapted, lambda repo: merge_to(repo, tmp_path / "merged")):
        with pytest.raises(
            AdapterFileError, match=r"me/pickled has no adapter_model.safetensors.*a pickle, which can run"
        ):
            load("me/pickled")
    with pytest.raises(AdapterFileError, match=r"me/pickled on the Hub has no adapter_model.safetensors"):
        PeftModel.from_pretrained(load_base(BASE).model, "me/pickled")
    assert hub.asked("GET", "/me/pickled/resolve/[^/]+/adapter_model.bin") == 0
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name, content in hub.repos["me/pickled"].files().items():
        (folder / name).write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"only adapter_model.bin, a pickle"):
        load_adapted(folder)


def test_repositories_that_hold_no_surgical_adapter(hub, base, tmp_path):  # noqa: F811
    with pytest.raises(AdapterFileError, match=r"lab/base has no adapter_config.json, so there is no adapter"):
        load_adapted(BASE)
    lora = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"]))
    lora.save_pretrained(tmp_path)
    hub.add("me/lora", files_in(tmp_path))
    with pytest.raises(AdapterFileError, match=r"me/lora: .*is a LORA adapter"):
        load_adapted("me/lora")
    with pytest.raises(AdapterError, match=r"cannot pull me/none: there is no such repository"):
        load_adapted("me/none")
    with pytest.raises(AdapterError, match=r"cannot pull me/lora: it has no revision 'v9'"):
        load_adapted("me/lora", revision="v9")


def test_an_altered_file_is_refused(hub, base):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    content = bytearray(hub.repos["me/frost"].files()[WEIGHTS])
    content[-1] ^= 1
    hub.add("me/frost", {WEIGHTS: bytes(content)})
    with pytest.raises(AdapterFileError, match=r"me/frost: .*is not the file that its config was saved with"):
        load_adapted("me/frost")


def test_a_cache_that_was_damaged_is_mended_by_force(hub, base):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    file = pull("me/frost").folder / WEIGHTS
    file.resolve().write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match=r"me/frost: .*truncated or damaged.*force=True fetches it again"):
        load_adapted("me/frost")
    assert pull("me/frost", force=True).folder == file.parent
    load_adapted("me/frost")


def test_verify_compares_with_the_card(hub, base):  # noqa: F811
    done = push_adapter(tuned(), "me/frost", **GIVEN)
    found = pull("me/frost", verify=True)
    assert (found.name, found.commit, found.sha256) == ("me/frost", done.oid, done.sha256)
    other = push_adapter(tuned(seed=4), "me/other", **GIVEN)
    theirs = hub.repos["me/other"].files()
    # Somebody replaces an adapter by another whole one, but not its card: the numbers there are not its own.
    hub.add("me/frost", {name: theirs[name] for name in (CONFIG, WEIGHTS, "base.json")})
    assert pull("me/frost").sha256 == other.sha256
    with pytest.raises(
        AdapterFileError, match=r"the card of me/frost is of another file \(SHA-256 .*its numbers are not"
    ):
        pull("me/frost", verify=True)
    hub.add("me/frost", {"README.md": b"---\nlicense: mit\n---\n"})
    with pytest.raises(AdapterFileError, match="the card of me/frost has no weights_sha256"):
        pull("me/frost", verify=True)


def test_pull_into_a_folder_replaces_the_adapter_there_as_a_whole(hub, base, tmp_path):  # noqa: F811
    first, second = tuned(seed=3), tuned(seed=4)
    push_adapter(first, "me/frost", report=report(), **GIVEN)
    push_adapter(second, "me/fog", **GIVEN)
    assert pull("me/frost", tmp_path / "site").folder == tmp_path / "site"
    with pytest.raises(ConfigError, match=r"site holds what came from 'me/frost': name another folder"):
        pull("me/fog", tmp_path / "site")
    push_adapter(second, "me/frost", **GIVEN)
    repo = hub.repos["me/frost"]
    repo.commit({name: data for name, data in repo.files().items() if name not in ("report.json", "figure.png")}, "cut")
    assert torch.equal(logits(load_adapted(tmp_path / "site")), logits(first))
    (tmp_path / "site" / "notes.txt").write_text("mine")
    pull("me/frost", tmp_path / "site")
    assert torch.equal(logits(load_adapted(tmp_path / "site")), logits(second))
    names = {path.name for path in (tmp_path / "site").iterdir()}
    assert names == {"README.md", CONFIG, WEIGHTS, "base.json", "notes.txt", ".peft-surgical"}
    (tmp_path / "site" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"site holds README\.md, which something else has written or changed"):
        pull("me/frost", tmp_path / "site", force=True)
    # What was pulled is pushed again with the record that it came with.
    push_adapter(tmp_path / "site", "me/again", **GIVEN)
    assert torch.equal(logits(load_adapted("me/again")), logits(second))


@pytest.mark.parametrize("name", ["README.md", "report.json", "notes.txt"])
def test_pull_refuses_a_folder_that_holds_other_things(hub, base, tmp_path, name):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    site = tmp_path / "site"
    site.mkdir()
    (site / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"site holds {name}, which might be overwritten: name a folder"):
        pull("me/frost", site)
    assert [(path.name, path.read_text()) for path in site.iterdir()] == [(name, "mine")]


# The base


def test_a_base_that_has_moved_on_is_opened_at_the_recorded_commit(hub, base, checkpoints):  # noqa: F811
    model = tuned()
    expected = logits(model)
    push_adapter(model, "me/frost", **GIVEN)
    content = load_safetensors(checkpoints["timm"]["model.safetensors"])
    moved = {name: value + 1 if value.is_floating_point() else value for name, value in content.items()}
    hub.add(BASE, {"model.safetensors": save(moved)})
    assert torch.equal(logits(load_adapted("me/frost")), expected)
    with pytest.raises(
        BaseMismatchError, match=r"trained on another base \(lab/base\): \d+ of \d+ tuned tensors differ"
    ):
        PeftModel.from_pretrained(load_base(BASE).model, "me/frost")


def load_safetensors(content):
    import safetensors.torch

    return safetensors.torch.load(content)


def test_a_base_that_was_changed_in_place_is_named_with_its_tensors(hub, base, checkpoints, tmp_path):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    content = load_safetensors(checkpoints["timm"]["model.safetensors"])
    content["layer4.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    for name, data in {**checkpoints["timm"], "model.safetensors": save(content)}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BaseMismatchError, match=r"1 of \d+ tensors differ, first layer4.0.conv1.weight"):
        load_adapted("me/frost", base=str(tmp_path))
    with pytest.warns(UserWarning, match=r"1 of \d+ tensors that it does not tune differ there, first layer4.0.conv1"):
        model = load_adapted("me/frost", base=str(tmp_path), strict_base=False)
    assert model.base_model.model.layer4[0].conv1.weight[0, 0, 0, 0] == content["layer4.0.conv1.weight"][0, 0, 0, 0]
    save_file({**content, "conv1.0.weight": content["conv1.0.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"strict_base=False: .* 1 of \d+ tuned tensors differ there, first conv1.0"):
        load_adapted("me/frost", base=str(tmp_path), strict_base=False)


def test_a_record_from_the_hub_that_names_a_folder_is_refused(hub, base):  # noqa: F811
    push_adapter(tuned(), "me/frost", **GIVEN)
    record = json.loads(hub.repos["me/frost"].files()["base.json"])
    hub.add("me/frost", {"base.json": json.dumps({**record, "id": "/etc"}).encode()})
    with pytest.raises(AdapterFileError, match=r"the base of me/frost is the folder /etc of the machine"):
        load_adapted("me/frost")
    hub.add("me/frost", {"base.json": json.dumps({**record, "library": "tensorflow"}).encode()})
    with pytest.raises(AdapterFileError, match=r"library is 'tensorflow', not one of timm, transformers"):
        load_adapted("me/frost")
    hub.add("me/frost", {"base.json": json.dumps({**record, "architecture": "resnet50"}).encode()})
    with pytest.raises(
        BaseMismatchError, match=r"lab/base is test_resnet now, where the adapter's record says resnet50"
    ):
        load_adapted("me/frost")


def test_an_adapter_without_a_record_is_opened_by_its_config(hub, base, tmp_path):  # noqa: F811
    model = tuned()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapted(tmp_path)), logits(model))
    model = tuned(opening={"num_classes": 3}, modules_to_save=["fc"])
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"(?s)does not fit lab/base with 4 classes .*say base= with the arguments"):
        load_adapted(tmp_path)
    again = load_adapted(tmp_path, base={"name": BASE, "num_classes": 3, "head": "new"})
    assert torch.equal(logits(again), logits(model))


# Merge


MERGED = """
import sys, torch
folder, library, inputs, output = sys.argv[1:]
if library == "timm":
    import timm
    model = timm.create_model("local-dir:" + folder, pretrained=True)
else:
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(folder)
with torch.no_grad():
    found = model.eval()(torch.load(inputs, weights_only=True))
torch.save(getattr(found, "logits", found), output)
assert "peft_surgical" not in sys.modules and "peft" not in sys.modules
"""


def test_a_merged_checkpoint_is_a_plain_one(hub, library, tmp_path):  # noqa: F811
    model = tuned()
    push_adapter(model, "me/frost", **GIVEN)
    merge_to("me/frost", tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    if library == "timm":
        plain = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    else:
        plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    # Base and delta are added up before a forward as they are within one: equal to the last bit.
    assert torch.equal(logits(plain.eval()), logits(model))
    auto = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(auto), logits(model))
    assert list(auto.config.id2label.values()) == list(NAMES)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged") is not None
    base = load_base(tmp_path / "merged")
    assert base.label_names == NAMES
    assert torch.equal(base.transform_eval(IMAGE), load_base(BASE).transform_eval(IMAGE))
    with pytest.raises(AdapterError, match="exists and is not empty"):
        merge_to("me/frost", tmp_path / "merged")


@pytest.mark.slow
def test_a_merged_checkpoint_needs_nothing_of_this_package(hub, library, tmp_path):  # noqa: F811
    model = tuned()
    push_adapter(model, "me/frost", **GIVEN)
    merge_to("me/frost", tmp_path / "merged")
    inputs = torch.randn(3, 3, 32, 32)
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [tmp_path / "merged", library, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    # Offline by its environment, which the fixture leaves as it is.
    subprocess.run([sys.executable, "-W", "ignore", "-c", MERGED, *map(str, arguments)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), tiny.outputs(model, inputs))


# What is at hand


def test_adapters_by_base(hub, base, checkpoints, tmp_path):  # noqa: F811
    hub.add("lab/another", checkpoints["transformers"])
    assert cached_adapters() == []
    old = push_adapter(tuned(), "me/frost", **GIVEN)
    new = push_adapter(tuned(seed=4, target="block2 + head"), "me/frost", **GIVEN)
    push_adapter(tuned("lab/another"), "me/fog", **GIVEN)
    pull("me/frost", revision=old.oid)
    pull("me/frost")
    pull("me/fog")
    found = by_base(cached_adapters())
    assert list(found) == ["lab/another", "lab/base"]
    rows = {row.commit: row for row in found["lab/base"]}
    assert (rows[old.oid].target, rows[old.oid].refs) == ("block1", ())
    assert (rows[new.oid].target, rows[new.oid].refs) == ("block2 + head", ("main",))
    assert rows[new.oid].bytes == len(hub.repos["me/frost"].files()[WEIGHTS])
    assert all(row.is_whole for row in rows.values())
    tuned().save_pretrained(tmp_path / "sites" / "a")
    (tmp_path / "sites" / "b").mkdir()
    (tmp_path / "sites" / "b" / CONFIG).write_text("{no json")
    lora = get_peft_model(tiny.ConvNet(torch.nn.BatchNorm2d), LoraConfig(target_modules=["fc"]))
    lora.save_pretrained(tmp_path / "sites" / "c")
    site = tmp_path / "sites" / "a"
    private = site / ".peft-surgical"
    unfinished = [
        site / "checkpoint-3",
        private / "runs" / "12ab",
        site / ".checkpoint-4",
        site / ".peft-surgical-0123",
    ]
    for folder in unfinished:
        tuned().save_pretrained(folder)
    hostile = ("[]", "[" * 100_000, '{"peft_type": "SURGICAL", "tensor_names": 3, "target": {"a": 1}}', "\x00", "null")
    for number, text in enumerate(hostile):
        (tmp_path / "sites" / f"hostile{number}").mkdir()
        (tmp_path / "sites" / f"hostile{number}" / CONFIG).write_text(text)
    one, odd = sorted(adapters_in([tmp_path / "sites"]), key=lambda found: found.name)
    assert (odd.target, odd.base, odd.is_whole) == ("{'a': 1}", "(no base named)", False)
    # One that is named itself is shown.
    assert [found.name for found in adapters_in(unfinished[:1])] == [str(unfinished[0])]
    assert (stored.CONFIG_FILE, stored.WEIGHTS_FILE, stored.METHOD) == (
        config.CONFIG,
        config.WEIGHTS,
        config.SurgicalType.SURGICAL,
    )
    assert (one.name, one.base, one.commit) == (str(tmp_path / "sites" / "a"), BASE, None)
