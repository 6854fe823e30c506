"""A hub that fails: nothing half-written is ever loaded, and nothing half-uploaded announced as pushed."""

import shutil

import pytest
import torch
from hub_server import hub  # noqa: F401 (a fixture)
from huggingface_hub import constants

timm = pytest.importorskip("timm")

import tiny  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from peft_surgical import SurgicalConfig  # noqa: E402
from peft_surgical.adapters.remote import FILES, LONGEST_WAIT, TRIES, explained, patiently  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.errors import AdapterError, ConfigError  # noqa: E402
from peft_surgical.hub import load_adapted, pull, push_adapter  # noqa: E402
from peft_surgical.tuner import saving  # noqa: E402

BASE, REPO = "lab/base", "me/frost"
GIVEN = {"license": "apache-2.0", "datasets": []}
WEIGHTS = "adapter_model.safetensors"
API = f"/api/models/{REPO}"
FILE = f"/{REPO}/resolve/[^/]+/{WEIGHTS}"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two saved adapters of one base, and the files of the base."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    save_for_hf(timm.create_model("test_resnet", num_classes=4), folder, safe_serialization=True)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    places = []
    for seed in (3, 4):
        model = get_peft_model(load_base(folder).model, SurgicalConfig(target="block1"))
        tiny.disturb(model, seed=seed)
        model.peft_config["default"].base_model_name_or_path = BASE
        places.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(places[-1])
    return files, *places


@pytest.fixture
def one(hub, adapters):  # noqa: F811
    hub.add(BASE, adapters[0])
    return adapters[1]


def deltas(model):
    return {name: value for name, value in model.state_dict().items() if "surgical_delta" in name}


def expected(folder):
    return deltas(PeftModel.from_pretrained(load_base(BASE).model, folder))


def is_whole(server, done=None):
    """Whether the repository holds the initial commit alone, or one more with everything in it."""
    repo = server.repos[REPO]
    if done is None:
        return repo.messages == ["initial commit"] and set(repo.files()) == {".gitattributes"}
    files = {"README.md", "adapter_config.json", WEIGHTS, "base.json"}
    return set(repo.files(done.oid)) == {".gitattributes", *files} and repo.refs["main"] == done.oid


# Pushing: passing faults


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/validate-yaml"),
        ("POST", "/api/repos/create"),
        ("GET", API),
        ("POST", f"{API}/preupload"),
        ("POST", f"/{REPO}.git/info/lfs"),
        ("PUT", "/lfs/"),
        ("POST", f"{API}/commit"),
        ("GET", f"{API}/tree"),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_every_request_of_a_push_is_repeated(hub, one, method, path, status):  # noqa: F811
    fault = hub.fault(method, path, status=status, headers={"Retry-After": "3"} if status == 429 else {})
    done = push_adapter(one, REPO, **GIVEN)
    assert fault.times == 0
    assert is_whole(hub, done)
    assert hub.repos[REPO].messages == ["initial commit", "Upload a surgical adapter"]
    # huggingface_hub adds a second to what it is asked for.
    assert hub.sleeps
    assert status == 503 or hub.sleeps[0] in (3.0, 4.0)
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", f"{API}/preupload"), ("PUT", "/lfs/"), ("POST", f"{API}/commit"), ("POST", "/api/repos/create")],
)
def test_a_connection_that_is_cut_in_the_middle_of_an_upload(hub, one, method, path):  # noqa: F811
    fault = hub.fault(method, path, cut_body=50)
    done = push_adapter(one, REPO, **GIVEN)
    assert fault.times == 0
    assert is_whole(hub, done)
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))


def test_a_commit_whose_answer_is_lost_is_found(hub, one):  # noqa: F811
    fault = hub.fault("POST", f"{API}/commit", lose_answer=True)
    done = push_adapter(one, REPO, **GIVEN)
    assert fault.times == 0
    # Not committed a second time.
    assert hub.asked("POST", f"{API}/commit") == 1
    assert is_whole(hub, done)
    assert done.url == f"{hub.url}/{REPO}/commit/{done.oid}"


def test_a_slow_hub(hub, one):  # noqa: F811
    for method, path in (("POST", "/api/repos/create"), ("POST", f"{API}/commit"), ("GET", FILE)):
        hub.fault(method, path, wait=0.05)
    done = push_adapter(one, REPO, **GIVEN)
    assert is_whole(hub, done)
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))


# Pushing: lasting faults


@pytest.mark.parametrize(
    ("method", "path", "fault", "said"),
    [
        ("POST", f"{API}/preupload", {"status": 500}, r"the Hub answered with an error of its own \(500\)"),
        ("PUT", "/lfs/", {"status": 503}, r"the Hub answered with an error of its own \(503\)"),
        ("PUT", "/lfs/", {"cut_body": 1000}, "the Hub cannot be reached|Error while uploading"),
        ("POST", f"{API}/commit", {"status": 502}, r"the Hub answered with an error of its own \(502\)"),
        ("POST", f"{API}/commit", {"cut_body": 1000}, "the Hub cannot be reached"),
        ("POST", f"{API}/commit", {"status": 429}, "too many requests"),
        ("POST", f"{API}/commit", {"status": 403}, "the token has no permission"),
        ("POST", f"{API}/commit", {"status": 400}, "cannot push to me/frost: .*Bad request"),
    ],
)
def test_what_is_not_there_as_a_whole_is_not_announced(hub, one, method, path, fault, said):  # noqa: F811
    hub.fault(method, path, times=100, **fault)
    with pytest.raises(AdapterError, match=rf"cannot push to me/frost: .*({said})|{said}"):
        push_adapter(one, REPO, **GIVEN)
    assert is_whole(hub)
    with pytest.raises(AdapterError, match=r"me/frost has no adapter_config.json"):
        load_adapted(REPO)
    # After that, it goes through as if nothing had happened.
    hub.faults.clear()
    assert is_whole(hub, push_adapter(one, REPO, **GIVEN))


def test_a_pull_request_is_not_asked_for_twice(hub, one):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    hub.fault("POST", f"{API}/commit", lose_answer=True)
    with pytest.raises(AdapterError, match="cannot push to me/frost: the Hub cannot be reached"):
        push_adapter(one, REPO, create_pr=True, revision=None, **GIVEN, tags=["again"])
    assert [ref for ref in hub.repos[REPO].refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_commit_that_came_first_is_not_written_over(hub, one, adapters):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    theirs = []
    hub.fault("POST", f"{API}/commit", before=lambda: theirs.append(hub.add(REPO, {"notes.txt": b"theirs"})))
    with pytest.raises(
        AdapterError, match=r"me/frost has changed while .* \(from commit \w+ to \w+\): nothing was pushed"
    ):
        push_adapter(adapters[2], REPO, **GIVEN)
    assert hub.repos[REPO].refs["main"] == theirs[0]
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))
    push_adapter(adapters[2], REPO, **GIVEN)
    assert tiny.same(deltas(load_adapted(REPO)), expected(adapters[2]))
    assert hub.repos[REPO].files()["notes.txt"] == b"theirs"


def test_a_hub_that_takes_a_commit_and_keeps_something_else(hub, one, monkeypatch):  # noqa: F811
    repo_commit = type(hub.add(BASE, {}) and hub.repos[BASE]).commit

    def truncating(self, files, message, ref="main"):
        kept = {name: data[:-1] if name == WEIGHTS else data for name, data in files.items()}
        return repo_commit(self, kept, message, ref)

    monkeypatch.setattr(type(hub.repos[BASE]), "commit", truncating)
    with pytest.raises(AdapterError, match=rf"the commit \w+ of me/frost lacks {WEIGHTS} as it was sent: push again"):
        push_adapter(one, REPO, **GIVEN)


# Pulling


@pytest.mark.parametrize("where", ["start", "middle"])
def test_a_download_that_is_cut_goes_on_where_it_was(hub, one, where):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    fault = hub.fault("GET", FILE, cut_answer=0 if where == "start" else 40_000, times=2)
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))
    assert fault.times == 0


def test_a_download_that_stalls_is_taken_up_again(hub, one, monkeypatch):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.fault("GET", FILE, stall=30)
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", f"{API}/revision", 503), ("GET", f"{API}/tree", 500), ("HEAD", FILE, 503), ("GET", FILE, 429)],
)
def test_every_request_of_a_pull_is_repeated(hub, one, method, path, status):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    fault = hub.fault(method, path, status=status)
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))
    assert fault.times == 0


def test_a_download_that_never_ends_well_leaves_nothing_to_load(hub, one, monkeypatch):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    fault = hub.fault("GET", FILE, cut_answer=1000, times=1000)
    # Each cut comes after some bytes, which huggingface_hub counts as progress: so it goes on until the server refuses.
    hub.fault("GET", FILE, status=500, times=1000)
    fault.times = 3
    with pytest.raises(AdapterError, match=r"cannot pull me/frost: the Hub answered with an error of its own \(500\)"):
        load_adapted(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (load_adapted, pull):
        with pytest.raises(AdapterError, match="not in the cache as a whole, and HF_HUB_OFFLINE"):
            load(REPO)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors|not in the cache|no adapter"):
        PeftModel.from_pretrained(load_base(BASE).model, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.faults.clear()
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))


def test_what_was_there_stays_when_a_newer_one_cannot_be_fetched(hub, one, adapters, tmp_path):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    pull(REPO, tmp_path / "site")
    push_adapter(adapters[2], REPO, **GIVEN)
    hub.fault("GET", FILE, status=500, times=100)
    with pytest.raises(AdapterError, match="cannot pull me/frost"):
        pull(REPO, tmp_path / "site")
    assert tiny.same(deltas(load_adapted(tmp_path / "site")), expected(one))


def test_a_push_in_the_middle_of_a_pull_does_not_mix_two_adapters(hub, one, adapters):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    hub.fault("GET", FILE, before=lambda: push_files(hub, adapters[2]))
    assert tiny.same(deltas(load_adapted(REPO)), expected(one))
    assert tiny.same(deltas(load_adapted(REPO)), expected(adapters[2]))


def push_files(server, folder):
    """A newer adapter without a record of its own: the older record is bound to the older weights."""
    files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)}
    repo = server.repos[REPO]
    repo.commit({**files, ".gitattributes": b""}, "by hand")


def test_an_interrupted_copy_leaves_the_old_adapter(hub, one, adapters, tmp_path, monkeypatch):  # noqa: F811
    push_adapter(one, REPO, **GIVEN)
    pull(REPO, tmp_path / "site")
    push_adapter(adapters[2], REPO, **GIVEN)
    copy, copied = shutil.copyfile, []

    def full(source, target):
        copied.append(target)
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        return copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            pull(REPO, tmp_path / "site")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert tiny.same(deltas(load_adapted(tmp_path / "site")), expected(one))
    # And one that is killed between the renames: `saving.commit` has its own tests for that.
    assert set(FILES) >= {saving.CARD, WEIGHTS}


# Patience


def test_patience_ends(hub):  # noqa: F811
    hub.fault("GET", API, status=503, times=100)
    with pytest.raises(AdapterError, match=r"cannot pull me/frost: the Hub answered with an error of its own \(503\)"):
        pull(REPO)
    assert hub.asked("GET", f"{API}/revision") == TRIES
    assert hub.sleeps == [1.0, 2.0, 4.0, 8.0]


def test_a_wait_that_is_too_long_is_told_instead(hub):  # noqa: F811
    hub.fault("GET", API, status=429, headers={"Retry-After": f"{LONGEST_WAIT + 1:.0f}"}, times=100)
    with pytest.raises(AdapterError, match="too many requests"):
        pull(REPO)
    assert hub.sleeps == []


def test_other_errors_are_not_asked_about_again():
    calls = []

    def call():
        calls.append(1)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        patiently(call)
    assert len(calls) == 1
    with pytest.raises(AdapterError, match=r"cannot pull me/frost: a bug"), explained("pull", REPO):
        call()
    with pytest.raises(ConfigError, match="as it was"), explained("pull", REPO):
        raise ConfigError("as it was")
