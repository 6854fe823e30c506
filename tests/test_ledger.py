"""The ledger: lookup, resuming after a kill, several processes."""

import errno
import math
import os
import subprocess
import sys
import textwrap

import pytest

from peft_surgical.errors import DataError
from peft_surgical.training.ledger import Ledger


def test_notes_lie_beside_the_result_and_make_no_run_another(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    first = ledger.run({"seed": 0}, lambda key: {"value": 1, "seconds": 2.5, "prefix": "none"})
    again = Ledger(tmp_path / "other.jsonl").run({"seed": 0}, lambda key: {"value": 1, "seconds": 9.0})
    assert first == again
    assert first.notes == ledger.runs()[0].notes == {"seconds": 2.5, "prefix": "none"}
    assert ledger.find({"seed": 0}) == {"value": 1}


def test_append_and_find(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "runs.jsonl")
    key = {"target": "block1", "lr": 1e-3, "seed": 0, "delta_dtype": None}
    assert ledger.find(key) is None
    assert len(ledger) == 0
    ledger.append(key, {"validation": 0.5})
    assert ledger.find(dict(reversed(key.items()))) == {"validation": 0.5}
    assert ledger.find({**key, "seed": 1}) is None
    assert ledger.find({k: v for k, v in key.items() if k != "delta_dtype"}) is None
    ledger.append({**key, "seed": 1}, {"validation": 0.75})
    assert [run.result["validation"] for run in ledger.runs(target="block1")] == [0.5, 0.75]
    assert [run.key["seed"] for run in ledger.runs(seed=1, lr=1e-3)] == [1]
    assert ledger.runs(unknown=None) == []
    assert [run.key for run in Ledger(ledger.file)] == [run.key for run in ledger]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.append({"seed": 0}, {"validation": 0.5})
    original = os.write

    def nothing(descriptor, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (nothing, lambda descriptor, line: original(descriptor, line[:9])):
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left on device") as raised:
            ledger.append({"seed": 1}, {"validation": 0.5})
        assert raised.value.filename == str(ledger.file)
        monkeypatch.undo()
        assert [run.key["seed"] for run in ledger] == [0]
    ledger.append({"seed": 1}, {"validation": 0.5})
    assert [run.key["seed"] for run in ledger] == [0, 1]


def test_another_writer_is_seen_and_the_last_result_counts(tmp_path):
    first, second = Ledger(tmp_path / "runs.jsonl"), Ledger(tmp_path / "runs.jsonl")
    first.append({"seed": 0}, {"value": 1})
    assert second.find({"seed": 0}) == {"value": 1}
    second.append({"seed": 0}, {"value": 2})
    assert first.find({"seed": 0}) == {"value": 2}
    assert len(first) == 1


@pytest.mark.parametrize("length", [1, 20, 5000])
def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path, length):
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.append({"seed": 0}, {"value": 0})
    whole = ledger.file.read_bytes()
    torn = b'{"key": {"seed": 1}, "result": {"text": "' + b"x" * 6000
    ledger.file.write_bytes(whole + torn[:length])
    for reader in (ledger, Ledger(ledger.file)):
        assert reader.find({"seed": 0}) == {"value": 0}
        assert reader.find({"seed": 1}) is None
    ledger.append({"seed": 1}, {"value": 1})
    assert [run.result["value"] for run in ledger] == [0, 1]
    assert ledger.file.read_bytes() == whole + b'{"key": {"seed": 1}, "result": {"value": 1}}\n'
    ledger.file.write_bytes(torn[:length])
    assert len(ledger) == 0
    ledger.append({"seed": 2}, {"value": 2})
    assert [run.key for run in ledger] == [{"seed": 2}]


def test_a_last_line_without_its_end_is_kept(tmp_path):
    """As an editor leaves it that takes away the last line end."""
    ledger = Ledger(tmp_path / "runs.jsonl")
    for seed in (0, 1):
        ledger.append({"seed": seed}, {"value": seed})
    ledger.file.write_bytes(ledger.file.read_bytes()[:-1])
    assert ledger.find({"seed": 1}) == {"value": 1}
    ledger.append({"seed": 2}, {"value": 2})
    assert [run.result["value"] for run in ledger] == [0, 1, 2]
    ledger.file.write_bytes(b'{"key": {"seed": 3}, "result": {"value": 3}}')
    ledger.append({"seed": 4}, {"value": 4})
    assert [run.result["value"] for run in ledger] == [3, 4]


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"event": "started"}\n',
        b'{"event": "started"}',
        b"notes of a user",
        b'{"key": {"seed": 1}, "result": 3}',
        b'{"key": 1',
        b"[" * 100_000,
        b"\x1b]0;title\x07\n",
        b'{"key": {}, "result": {}}\n\n',
    ],
)
def test_a_foreign_file_is_refused_and_stays(tmp_path, foreign):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.file.write_bytes(foreign)
    for use in (ledger.runs, lambda: ledger.append({"seed": 0}, {"value": 0})):
        if foreign.endswith(b"\n\n") and use != ledger.runs:
            continue  # only reading looks at all lines
        with pytest.raises(DataError, match=r"ledger\.jsonl holds a line that is no run: .*another ledger") as found:
            use()
        assert str(found.value).isprintable()
    assert ledger.file.read_bytes() == foreign


def test_what_is_no_run_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    for bad in ({"value": math.nan}, {"value": object()}):
        with pytest.raises(DataError, match="cannot be written to a ledger"):
            ledger.append({"seed": 0}, bad)
        with pytest.raises(DataError, match="cannot be written to a ledger"):
            ledger.find(bad)
    assert not ledger.file.exists()
    ledger.file.write_text('{"seed": 0}\n')
    with pytest.raises(DataError, match=r"runs\.jsonl holds a line that is no run: .*delete that line"):
        ledger.runs()


def test_processes_appending_at_once_lose_nothing(tmp_path):
    code = textwrap.dedent(
        """
        import importlib.util, sys, types
        # Without the package's __init__ and its errors, which import torch and peft: three at once take a minute where
        # the machine is busy.
        package = types.ModuleType("peft_surgical"); package.__path__ = [sys.argv[1]]
        errors = types.ModuleType("peft_surgical.errors"); errors.DataError = ValueError
        files = types.ModuleType("peft_surgical.files"); files.printable = repr
        sys.modules |= {"peft_surgical": package, "peft_surgical.errors": errors, "peft_surgical.files": files}
        from peft_surgical.training.ledger import Ledger
        ledger = Ledger(sys.argv[2])
        for i in range(60):
            ledger.append({"writer": int(sys.argv[3]), "i": i}, {"text": "x" * (i * 37)})
        """
    )
    import peft_surgical

    file = tmp_path / "runs.jsonl"
    arguments = [sys.executable, "-c", code, peft_surgical.__path__[0], str(file)]
    writers = [subprocess.Popen([*arguments, str(writer)]) for writer in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    runs = Ledger(file).runs()
    assert len(runs) == 180
    assert all(len(run.result["text"]) == run.key["i"] * 37 for run in runs)
    assert file.read_bytes().count(b"\n") == 180
