"""Readers of files, fed with arbitrary JSON and with what almost is theirs: only errors of this package come out."""

import contextlib
import copy
import json
import warnings

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.data.layouts import list_images
from peft_surgical.errors import SurgicalError
from peft_surgical.evaluation import Report, measure
from peft_surgical.files import read_object
from peft_surgical.hub.cards import About, card_of
from peft_surgical.hub.records import BaseRecord, completed, read_record, write_record
from peft_surgical.keys import CONFIG, RECORD_FILE, REPORT
from peft_surgical.training.ledger import Ledger
from peft_surgical_cli.stored import adapters_in, by_base

fast = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KEYS = st.sampled_from(
    [
        "target",
        "selection",
        "block_scores",
        "parents",
        "combined",
        "scores",
        "validation",
        "budget",
        "moved",
        "open",
        "x",
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["", "block1", "\x1b[2J", "<script>", "\ud800", "~nosuchuser/x", "1" * 5000, 10**400, "re:(a+)+b"]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ODD = [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"1" * 10_000, b"NaN", b""]
BYTES = st.binary(max_size=30) | st.sampled_from(ODD)


def places(plain, above=()):
    """Where something stands in a plain JSON value."""
    yield above
    for key, inner in plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ():
        yield from places(inner, (*above, key))


@st.composite
def almost(draw, plain):
    """A document of the right shape but for one or two places."""
    found = copy.deepcopy(plain)
    for place in draw(st.lists(st.sampled_from(list(places(plain))[1:]), min_size=1, max_size=2)):
        at = found
        try:
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = draw(JSON)
        except (LookupError, TypeError):
            pass  # replaced already
    return found


def documents(plain):
    return st.one_of(st.builds(dump, JSON), st.builds(dump, almost(plain)), BYTES)


def dump(plain):
    return json.dumps(plain).encode()


def survives(*calls):
    for call in calls:
        with contextlib.suppress(SurgicalError):
            call()


SELECTION = {
    "asked": "auto-rgn",
    "criterion": "rgn",
    "block_scores": {"block1": 0.5, "head": 0.25},
    "num_samples": 10,
    "num_batches": 2,
    "split": "tuning",
    "uses_labels": True,
    "budget": 0.5,
    "scores": {"criterion": "rgn", "block_scores": {"block1": 0.5}},
    "validation": {"block1 at 0.1": 0.5},
    "parents": [{"adapter": "a/b", "weight": 0.5, "sha256": "0" * 64}, "me/other"],
}
SETTINGS = {"lr": 0.1, "moved": {"block1": 0.1}, "open": {"label_names": ["a"], "head": "keep"}, "adapter": {"seed": 0}}
ABOUT = About("me/frost", "mit", (), "lab/base", "model = 3", opens=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(tiny.used_batchnorm(), SurgicalConfig(target="block1", selection=SELECTION))
    model.save_pretrained(folder)
    row = measure("accuracy", [0.5, 0.25], dataset="test", n=8, seeds=[0, 1], selection="none")
    Report("lab/base", "block1", (row,), SETTINGS).save(folder / REPORT)
    record = BaseRecord("lab/base", "0" * 40, "timm", "resnet", "float32", 2, ("a", "b"), fingerprint={"w": "0" * 16})
    write_record(folder, record)
    return folder


def plain_of(folder, name):
    return json.loads((folder / name).read_text())


@fast
@given(data=st.data())
def test_a_config(saved, data, tmp_path):
    whole = (saved / CONFIG).read_bytes()
    (saved / CONFIG).write_bytes(data.draw(documents(json.loads(whole))))
    try:
        survives(
            lambda: read_object(saved / CONFIG),
            lambda: SurgicalConfig.from_pretrained(saved),
            lambda: read_adapter(saved).summary(),
        )
        by_base(adapters_in([saved.parent]))
    finally:
        (saved / CONFIG).write_bytes(whole)


@fast
@given(data=st.data())
def test_a_selection_on_a_card(saved, data):
    adapter = read_adapter(saved)
    adapter.config.selection = data.draw(almost(SELECTION) | st.dictionaries(KEYS, JSON, max_size=3))
    survives(lambda: card_of(adapter.config, None, adapter.summary(), ABOUT))


@fast
@given(data=st.data())
def test_a_report(saved, data, tmp_path):
    file = tmp_path / REPORT
    file.write_bytes(data.draw(documents(plain_of(saved, REPORT))))

    def used():
        report = Report.load(file)
        report.to_markdown()
        report.without_paths()
        completed(None, None, report)

    adapter = read_adapter(saved)
    survives(used, lambda: card_of(adapter.config, Report.load(file), adapter.summary(), ABOUT))


@fast
@given(data=st.data())
def test_a_record_of_a_base(saved, data, tmp_path):
    (tmp_path / RECORD_FILE).write_bytes(data.draw(documents(plain_of(saved, RECORD_FILE))))
    survives(lambda: completed(read_record(tmp_path, "0" * 64), None, None))


@fast
@given(data=st.data())
def test_a_ledger(data, tmp_path):
    line = {"key": {"method": "block1", "lr": 0.1}, "result": {"validation": 0.5}}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    before = b"\n".join(data.draw(st.lists(documents(line), max_size=3)))
    ledger.file.write_bytes(before)
    survives(ledger.runs, lambda: ledger.append({"seed": 0}, {"value": 0}))
    cut = b'{"key": {'
    tail = before.rpartition(b"\n")[2]
    assert ledger.file.read_bytes().startswith(before) or tail.startswith(cut) or cut.startswith(tail)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)
FILES = st.lists(
    st.lists(NAMES | st.sampled_from(["train", "val", "3²4.png", "=1.png"]), min_size=1, max_size=3), max_size=5
)


@fast
@given(files=FILES)
def test_a_listing_of_images(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for parts in files:
        place = root.joinpath(*parts)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_name(place.name + ".png").write_bytes(b"")
        except OSError:  # a file where a folder would be
            continue
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        survives(lambda: list_images(root))
