"""Some hundred mutations of adapter files, and that their judge would notice. `benchmarks/fuzz.py` runs longer."""

import collections
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load

pytest.importorskip("rich")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from fuzzing import configs, judge, weights  # noqa: E402
from fuzzing.bases import KINDS, make_base, make_sources  # noqa: E402
from fuzzing.honest import honest, read_through, same, tensors_in  # noqa: E402
from fuzzing.mutations import mutated  # noqa: E402

from peft_surgical.errors import AdapterFileError  # noqa: E402

MANY = 400
MEMORY = 256 * 2**20


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return judge.Bench(tmp_path_factory.mktemp("fuzz"))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_mutations_are_refused_clearly_or_load_as_what_they_say(bench):
    bench.run(0)
    before = peak()
    outcomes = [bench.run(seed) for seed in range(MANY)]
    assert not [outcome for outcome in outcomes if outcome.result == "finding"]
    assert peak() - before < MEMORY
    counts = collections.Counter(outcome.result for outcome in outcomes)
    assert counts["loaded"] > MANY / 10
    assert counts["refused"] > MANY / 2
    tried = {outcome.mutation for outcome in outcomes}
    assert tried == {mutation.__name__ for mutation in (*weights.MUTATIONS, *configs.MUTATIONS)}
    assert {outcome.kind for outcome in outcomes} == set(KINDS)


# --- the judge ---


def test_a_mutation_is_made_from_its_number_alone(bench):
    sources = make_sources(make_base())
    for seed in range(50):
        assert mutated(seed, sources) == mutated(seed, bench.sources)
    # And almost every one of them changes something.
    changed = [mutated(seed, sources)[2] not in sources.values() for seed in range(200)]
    assert sum(changed) > 180


def test_the_other_reading_agrees_with_whole_adapters(bench, tmp_path):
    for kind, files in bench.sources.items():
        files.write(tmp_path)
        held, read = load(files.weights), tensors_in(files.weights)
        assert same(held, read)
        network = make_base()
        model = PeftModel.from_pretrained(network, tmp_path)
        expected = honest(files, bench.values)
        assert same(expected, read_through(network, list(bench.values))), kind
        assert not same(expected, bench.values)
        model.unload()


def first(bench, result):
    return next(seed for seed in range(MANY) if bench.run(seed).result == result)


def test_a_model_with_other_values_is_a_finding(bench, monkeypatch):
    seed = first(bench, "loaded")
    monkeypatch.setattr(judge, "honest", lambda *given: {**honest(*given), "bn1.bias": torch.full((3,), 7.0)})
    outcome = bench.run(seed)
    assert (outcome.result, outcome.detail) == ("finding", "loaded as something else than the files say: bn1.bias")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RecursionError("x"), AdapterFileError("")])
def test_an_error_that_says_nothing_is_a_finding(bench, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(PeftModel, "from_pretrained", fails)
    outcome = bench.run(1)
    assert outcome.result == "finding"
    assert outcome.detail.startswith(f"not clear: {type(error).__name__}")


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda network: network.fc.weight.data.add_(1), "the state dict"),
        (lambda network: network.fc.requires_grad_(False), "the flags"),
        (lambda network: setattr(network.fc, "__class__", type("Linear", (torch.nn.Linear,), {})), "the classes"),
        (lambda network: setattr(network, "peft_config", {"default": None}), "the adapters"),
    ],
)
def test_a_model_that_a_refused_adapter_changed_is_a_finding(bench, monkeypatch, harm, what):
    def fails(network, folder):
        harm(network)
        raise AdapterFileError("no")

    monkeypatch.setattr(PeftModel, "from_pretrained", fails)
    outcome = bench.run(1)
    assert outcome.result == "finding"
    assert outcome.detail.startswith(f"{what} changed though it was refused: AdapterFileError: no")


def test_what_takes_too_long_is_a_finding(bench, monkeypatch):
    def works(*args):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        raise AdapterFileError("at last")

    monkeypatch.setattr(bench, "limit", 0.1)
    monkeypatch.setattr(PeftModel, "from_pretrained", works)
    assert bench.run(1).detail.startswith("too slow: 0.")
    monkeypatch.setattr(bench, "limit", 0.01)
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *args: time.sleep(60))
    assert bench.run(1).detail == "too slow: stopped"


def test_the_judge_leaves_no_trace(bench):
    for seed in range(20):
        bench.run(seed)
        assert same(dict(bench.network.state_dict()), bench.values)
        assert not hasattr(bench.network, "peft_config")


# --- the loop ---


@pytest.mark.slow
def test_the_loop_goes_on_where_it_stopped(tmp_path):
    state, table = tmp_path / "fuzz.json", tmp_path / "fuzz.md"
    script = (
        f"import os, sys; sys.path.insert(0, {str(BENCHMARKS)!r}); sys.argv[0] = {str(BENCHMARKS / 'fuzz.py')!r}\n"
        "import fuzz; fuzz.CHUNK = 30\n"
        "sys.exit(fuzz.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "--minutes", "0.001", "--json", str(state), "--markdown", str(table)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for done in (30, 60):
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert finished.returncode == 0, finished.stderr
        found = json.loads(state.read_text())
        assert found["next"] == done
        assert sum(found["counts"].values()) == done
    assert "| all | 60 |" in table.read_text()


def test_a_worker_that_dies_is_a_finding_at_the_mutation_that_it_died_of(monkeypatch):
    import fuzz

    def worker(command, check, timeout):
        first, count, results = int(command[3]), int(command[4]), Path(command[5])
        if first <= 7 < first + count:
            results.with_suffix(".seed").write_text(f"{7:020d}")
            return SimpleNamespace(returncode=-11)
        found = {
            "counts": {"flip_bits refused": count},
            "errors": {"E": count},
            "findings": [],
            "slowest": [first, first],
        }
        results.write_text(json.dumps({**found, "memory": count}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(fuzz.subprocess, "run", worker)
    found = fuzz.judged(0, 20, 1.0)
    assert found["findings"] == [[7, "process", "ended the process with -11"]]
    assert found["counts"] == {"flip_bits refused": 19, "process finding": 1}
    assert (found["errors"], found["slowest"], found["memory"]) == ({"E": 19}, [8, 8], 12)
    assert fuzz.rows(found) == [
        ["flip bits", "19", "19", "0", "0"],
        ["process", "1", "0", "0", "1"],
        ["all", "20", "19", "0", "1"],
    ]


def test_a_worker_that_never_begins_stops_the_loop(monkeypatch):
    import fuzz

    monkeypatch.setattr(fuzz.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="ended with 1 before it began"):
        fuzz.judged(0, 20, 1.0)
