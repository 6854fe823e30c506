"""Folders of results: what others have put there stays, and one's own is replaced."""

import json
import os

import pytest

from peft_surgical.errors import ConfigError
from peft_surgical.keys import CONFIG, PRIVATE
from peft_surgical.results import claim, published, withdraw


def write(folder, **files):
    with published(folder) as stage:
        for name, text in files.items():
            (stage / f"{name}.json").write_text(text)


@pytest.mark.parametrize("name", ["runs/run.tfevents", "checkpoints/model.pt", "report.json", "notes.txt", CONFIG])
def test_a_folder_that_holds_other_things_is_refused(tmp_path, name):
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    first = name.split("/")[0]
    with pytest.raises(ConfigError, match=rf"folder holds {first}, .*: name a folder that is new .* output="):
        claim(tmp_path / "folder", ["report.json"])
    assert [path for path in (tmp_path / "folder").rglob("*") if path.is_file()] == [file]


def test_ones_own_results_are_replaced_and_those_of_others_are_not(tmp_path):
    folder = claim(tmp_path / "new" / "folder", ["report.json"])
    write(folder, report="1", other="1")
    write(folder, report="2")
    (folder / "notes.txt").write_text("later, beside the results")
    assert claim(folder, ["report.json"]) == folder
    assert (folder / "report.json").read_text() == "2"
    (folder / "report.json").write_text("mine")
    refused = r"holds report\.json, which something else has written or changed: move that away, or name another folder"
    for use in (
        lambda: claim(folder, ["other.json", "report.json"]),
        lambda: write(folder, report="3"),
        lambda: withdraw(folder, ["other.json", "report.json"]),
    ):
        with pytest.raises(ConfigError, match=refused):
            use()
    assert (folder / "report.json").read_text() == "mine"
    assert (folder / "other.json").is_file()
    withdraw(folder, ["other.json"])
    assert not (folder / "other.json").exists()
    assert [path.name for path in (folder / PRIVATE).iterdir()] == ["written.json"]


@pytest.mark.parametrize("steps", range(4))
def test_killed_between_any_two_steps_it_goes_on(tmp_path, steps, monkeypatch):
    folder = claim(tmp_path, ["a.json", "b.json"])
    write(folder, a="1", b="1")
    left, original = [steps], os.replace

    def killed(source, goal):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(source, goal)

    monkeypatch.setattr(os, "replace", killed)
    if steps < 3:
        with pytest.raises(KeyboardInterrupt):
            write(folder, a="2", b="2")
    else:
        write(folder, a="2", b="2")
    monkeypatch.undo()
    claim(folder, ["a.json", "b.json"])
    write(folder, a="3", b="3")
    assert ((folder / "a.json").read_text(), (folder / "b.json").read_text()) == ("3", "3")


@pytest.mark.parametrize(
    "broken", ["", "[]", "{", "\x00", '{"report.json": "x"}', '{"report.json": [[]]}', "[" * 100_000]
)
def test_without_a_record_everything_is_somebody_elses(tmp_path, broken):
    folder = claim(tmp_path, ["report.json"])
    write(folder, report="1")
    (folder / PRIVATE / "written.json").write_text(broken)
    with pytest.raises(ConfigError, match=r"holds report\.json, which something else"):
        claim(folder, ["report.json"])


def test_a_config_of_a_save_that_was_killed_is_ones_own(tmp_path):
    folder = claim(tmp_path, [CONFIG])
    plain = json.dumps({"target": "block1"}, indent=2, sort_keys=True)
    with published(folder) as stage:
        (stage / "other.json").write_text("")
    record = folder / PRIVATE / "written.json"
    import hashlib

    record.write_text(json.dumps({CONFIG: [hashlib.sha256(plain.encode()).hexdigest()]}))
    (folder / CONFIG).write_text(json.dumps({"target": "block1", "superseded": {"target": "head"}}))
    claim(folder, [CONFIG])
    (folder / CONFIG).write_text(json.dumps({"target": "block2", "superseded": {"target": "head"}}))
    with pytest.raises(ConfigError, match="something else"):
        claim(folder, [CONFIG])


def test_places_where_no_folder_can_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"no results can be written to .*: name another folder with output="):
            claim(place, [])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert claim("~/results", []) == tmp_path / "results"
    (tmp_path / "results" / PRIVATE).rmdir()
    (tmp_path / "results" / PRIVATE).symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ConfigError, match="is a link, and what is behind it would be removed"):
        claim("~/results", [])


def test_equal_results_leave_the_record_as_it_was(tmp_path):
    found = []
    for text in ("1", "2", "2", "2"):
        write(tmp_path, report=text)
        found.append({file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()})
    assert found[1] == found[2] == found[3] != found[0]
