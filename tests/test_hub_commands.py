"""The commands for adapters on the Hub, against a hub on the loopback interface."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from hub_server import READ, hub  # noqa: F401 (a fixture)

pytest.importorskip("typer")
timm = pytest.importorskip("timm")

import tiny  # noqa: E402
from peft import get_peft_model  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical import SurgicalConfig  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.evaluation import Report, measure  # noqa: E402
from peft_surgical.hub import load_adapted  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402

BASE = "lab/base"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    save_for_hf(timm.create_model("test_resnet", num_classes=4), folder, safe_serialization=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def adapter(hub, files, tmp_path):  # noqa: F811
    """A folder as `tune` leaves it."""
    hub.add(BASE, files)
    model = get_peft_model(load_base(BASE).model, SurgicalConfig(target="block1"))
    tiny.disturb(model)
    model.save_pretrained(tmp_path / "tuned")
    report("block1", 0.75).save(tmp_path / "tuned" / "report.json")
    return tmp_path / "tuned"


def report(target, value):
    measured = measure("accuracy", [value], dataset="test", n=40, seeds=[0], selection="epoch by validation accuracy")
    return Report(BASE, target, (measured,), {})


def test_push_pull_show_list_and_merge(hub, run, adapter, tmp_path):  # noqa: F811
    for target, value in (("none", 0.5), ("all", 0.7)):
        report(target, value).save(tmp_path / f"{target}.json")
    comparison = ["--comparison", tmp_path / "none.json", tmp_path / "all.json"]
    given = ["--license", "mit", "--dataset", "a/b", "c/d", "--tag", "frost", *comparison]
    code, out, err = run("push", adapter, "me/frost", *given)
    oid = hub.repos["me/frost"].refs["main"]
    assert (code, err) == (0, "")
    assert f"{hub.url}/me/frost/commit/{oid}" in out
    assert "model = load_adapted('me/frost')" in out
    card = hub.repos["me/frost"].files()["README.md"].decode()
    assert "license: mit" in card
    assert "datasets:\n- a/b\n- c/d\n" in card
    for row in ("| **block1** | accuracy | test | 75.0 |", "| none | accuracy | test | 50.0 |", "| all |"):
        assert row in card

    code, out, err = run("pull", "me/frost", "--verify", "--output", tmp_path / "site")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [str(tmp_path / "site"), f"commit {oid}"]
    assert out.splitlines()[2].endswith(", as in its card")
    assert tiny.same(load_adapted("me/frost").state_dict(), load_adapted(tmp_path / "site").state_dict())

    code, out, err = run("show", "me/frost", "--top", 0)
    assert (code, err) == (0, "")
    assert f"me/frost, commit {oid}" in out
    assert BASE in out
    assert "block1" in out
    plain = json.loads(run("show", "me/frost", "--revision", oid, "--json")[1])
    assert plain["sha256"] in card

    code, out, err = run("list", tmp_path / "site", adapter)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].strip() == BASE
    rows = [line.split() for line in out.splitlines()[2:] if line.strip()]
    assert {row[0] for row in rows} == {"me/frost", str(tmp_path / "site"), str(adapter)}
    assert ["me/frost", "block1", "main", oid[:12]] in [row[:4] for row in rows]
    listed = json.loads(run("list", "--json")[1])
    assert [(row["name"], row["commit"]) for row in listed[BASE]] == [("me/frost", oid)]

    code, out, err = run("merge", "me/frost", "--output", tmp_path / "merged")
    assert (code, err) == (0, "")
    line = out.splitlines()[-1]
    assert line == f'timm.create_model("local-dir:{tmp_path / "merged"}", pretrained=True)'
    plain, adapted = eval(line).eval(), load_adapted("me/frost")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(tiny.outputs(plain, images), tiny.outputs(adapted, images))


def test_a_private_pull_request_on_a_branch(hub, run, adapter):  # noqa: F811
    given = ["--license", "mit", "--no-dataset", "--private", "--message", "A first one"]
    assert run("push", adapter, "me/frost", *given, "--revision", "next")[0] == 0
    assert hub.repos["me/frost"].private
    assert hub.repos["me/frost"].messages[-1] == "A first one"
    assert WEIGHTS not in hub.repos["me/frost"].files("main")
    assert WEIGHTS in hub.repos["me/frost"].files("next")
    code, out, _ = run("push", adapter, "me/frost", *given, "--create-pr")
    assert code == 0
    assert f"Pull request: {hub.url}/me/frost/discussions/1" in out
    assert "revision='refs/pr/1'" in out


def test_what_the_user_can_mend_is_one_line(hub, run, adapter, tmp_path, monkeypatch):  # noqa: F811
    for arguments, said in (
        (["push", adapter, "me/frost"], "the card of me/frost lacks license, the licence of the deltas"),
        (["push", adapter, "me/frost", "--dataset", "a/b", "--no-dataset"], "--dataset and --no-dataset contradict"),
        (["push", tmp_path / "no", "me/frost", "--license", "mit", "--no-dataset"], "is no folder"),
        (["pull", "frost"], "cannot pull 'frost': it is neither a folder here nor owner/name"),
        (["pull", "me/none"], "cannot pull me/none: there is no such repository"),
        (["show", "nowhere"], "cannot pull 'nowhere': it is neither a folder here"),
        (["merge", adapter, "--output", adapter], "exists and is not empty"),
        (["list", tmp_path / "no"], f"'{tmp_path / 'no'}' does not exist"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("peft-surgical: ")
        assert said in err
        assert err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", READ)
    code, _, err = run("push", adapter, "me/frost", "--license", "mit", "--no-dataset")
    assert code == 2
    assert "cannot push to me/frost: the token has no permission" in err


def test_an_empty_list_and_one_that_is_not_whole(hub, run, adapter):  # noqa: F811
    assert run("list")[1].strip() == "No adapters: pull one, or name folders to look below."
    run("push", adapter, "me/frost", "--license", "mit", "--no-dataset")
    hub.fault("GET", f"/me/frost/resolve/[^/]+/{WEIGHTS}", status=500, times=100)
    assert run("pull", "me/frost")[0] == 2
    code, out, _ = run("list")
    assert code == 0
    assert "me/frost" not in out or "-: not fetched as a whole" in out


def test_the_page_runs_from_top_to_bottom(hub, run, tmp_path, monkeypatch):  # noqa: F811
    """docs/hub.md, by copy and paste: what is Python runs in one scope, and each command of the shell succeeds."""
    torch.manual_seed(1)
    save_for_hf(timm.create_model("test_resnet"), tmp_path / "base", safe_serialization=True)
    hub.add("timm/test_resnet.r160_in1k", {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()})
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    scope, commands = {}, 0
    for language, block in blocks:
        if language == "python":
            exec(block, scope)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            code, _, err = run(*arguments)
            assert (program, code, err) == ("peft-surgical", 0, ""), line
            commands += 1
    assert (len(blocks), commands) == (10, 5)
    images = torch.randn(2, 3, 32, 32)
    expected = tiny.outputs(load_adapted("me/frost-adapter"), images)
    for name in ("model", "again", "plain"):
        assert torch.equal(tiny.outputs(scope[name].eval(), images), expected)
    untuned = tiny.outputs(load_base("timm/test_resnet.r160_in1k").model, images)
    assert not torch.equal(expected, untuned)
