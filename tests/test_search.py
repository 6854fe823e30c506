"""The searches over hand-made fit functions whose winner, path and cost are known; resuming, sharing, Ray."""

import os
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest

import peft_surgical
from peft_surgical import Anatomy
from peft_surgical.blocks import Block
from peft_surgical.errors import ConfigError
from peft_surgical.training.engines import Together, Workers, on_ray, separated, workers
from peft_surgical.training.ledger import Ledger
from peft_surgical.training.search import Candidate, candidates_of, cross_val, greedy, race

EPOCHS = 15


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "runs.jsonl")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


class Table:
    """A fit function that reads its accuracies from a table: method or (method, lr) -> curve over all epochs' rungs."""

    def __init__(self, accuracies, losses=None, fails_at=None):
        self.accuracies, self.losses, self.fails_at = accuracies, losses or {}, fails_at
        self.calls, self.keys = [], []

    def __call__(self, key):
        if len(self.calls) + 1 == self.fails_at:
            self.fails_at = None
            raise KeyboardInterrupt
        method, epoch = key["method"], round(key.get("stop", 1) * EPOCHS)
        self.calls.append((method, epoch) if key["lr"] in (None, 0.1) else (method, key["lr"], epoch))
        self.keys.append(key)
        found = self.accuracies.get((method, key["lr"]), self.accuracies.get(method))
        validation = found[epoch] if isinstance(found, dict) else found
        result = {"validation": validation, "cost": 0.0 if method == "none" else float(epoch)}
        loss = self.losses.get((method, key["lr"]), self.losses.get(method))
        return result if loss is None else {**result, "validation_loss": loss}


def each(*methods, lr=0.1):
    return [Candidate(method, None if method == "none" else lr) for method in methods]


# --- cross_val ---


def test_cross_val_keeps_the_best_on_validation_and_of_equals_the_first(ledger):
    fit = Table({"none": 0.5, "a": 0.625, "b": 0.75, "c": 0.75, "d": 0.25})
    found = cross_val(each("none", "a", "b", "c", "d"), fit, ledger, {"data": "x"})
    assert fit.calls == [("none", 15), ("a", 15), ("b", 15), ("c", 15), ("d", 15)]
    assert (found.search, found.chosen, found.validation) == ("cross-val", Candidate("b", 0.1), 0.75)
    assert found.run.key == {"data": "x", "method": "b", "lr": 0.1}
    assert found.cost == 60  # four runs of 15 and `none`
    assert found.relative_cost == 4
    assert found.record() == {
        "asked": "cross-val",
        "chosen": "b at 0.1",
        "validation": {"none": 0.5, "a at 0.1": 0.625, "b at 0.1": 0.75, "c at 0.1": 0.75, "d at 0.1": 0.25},
        "split": "validation",
    }


def test_equal_accuracies_are_decided_by_the_loss(ledger):
    fit = Table({"a": 0.75, "b": 0.75, "c": 0.75}, losses={"a": 0.9, "b": 0.7, "c": 0.7})
    assert cross_val(each("a", "b", "c"), fit, ledger).chosen == Candidate("b", 0.1)


def test_a_candidate_named_twice_runs_once(ledger):
    fit = Table({"a": 0.5})
    assert cross_val(each("a", "a"), fit, ledger).cost == 15
    assert fit.calls == [("a", 15)]


def test_no_tuning_can_win_and_has_no_relative_cost(ledger):
    found = cross_val(each("none", "a"), Table({"none": 0.5, "a": 0.25}), ledger)
    assert str(found.chosen) == "none"
    assert found.relative_cost != found.relative_cost


def test_a_killed_search_goes_on_without_repeating_what_is_finished(ledger):
    fit = Table({"a": 0.5, "b": 0.75, "c": 0.625}, fails_at=2)
    with pytest.raises(KeyboardInterrupt):
        cross_val(each("a", "b", "c"), fit, ledger)
    assert fit.calls == [("a", 15)]
    found = cross_val(each("a", "b", "c"), fit, ledger)
    assert fit.calls == [("a", 15), ("b", 15), ("c", 15)]
    assert (found.chosen.method, found.cost) == ("b", 45)


def test_other_settings_are_other_runs(ledger):
    fit = Table({"a": 0.5})
    for seed in (0, 1, 0):
        cross_val(each("a"), fit, ledger, {"seed": seed})
    assert [key["seed"] for key in fit.keys] == [0, 1]


# --- race ---

CURVES = {
    "none": 0.52,
    "a": {1: 0.50, 3: 0.55, 15: 0.99},  # would have won in full
    "b": {1: 0.60, 3: 0.61, 15: 0.65},
    "c": {1: 0.55, 3: 0.70, 15: 0.72},
    "d": {1: 0.40},
    "e": {1: 0.58, 3: 0.59},
    "f": {1: 0.30},
}


def test_a_race_calls_exactly_the_survivors_and_costs_their_longest_runs(ledger):
    fit = Table(CURVES)
    found = race(each("none", "a", "b", "c", "d", "e", "f"), fit, ledger, {"seed": 3})
    first = [("none", 15), ("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1), ("f", 1)]
    # A third of 7, rounded up, survives in the order of the candidates: b .60, e .58, c .55. Then all but c stop.
    assert fit.calls == [*first, ("b", 3), ("c", 3), ("e", 3), ("c", 15)]
    assert (found.search, found.chosen, found.validation) == ("race", Candidate("c", 0.1), 0.72)
    assert found.cost == 0 + 1 + 1 + 1 + 3 + 3 + 15  # none, then a, d, f, then b, e, then c, from the start each
    assert found.relative_cost == 24 / 15
    assert [run.key["method"] for run in found.trials] == ["none", *"abcdef", *"bce", "c"]
    assert found.record()["validation"]["c at 0.1"] == 0.72
    assert fit.keys[0] == {"seed": 3, "method": "none", "lr": None}
    assert fit.keys[1] == {"seed": 3, "method": "a", "lr": 0.1, "stop": 1 / 15}
    assert fit.keys[-1] == {"seed": 3, "method": "c", "lr": 0.1}


def test_a_race_goes_on_where_it_was_killed(ledger):
    fit = Table(CURVES, fails_at=9)
    with pytest.raises(KeyboardInterrupt):
        race(each(*CURVES), fit, ledger)
    calls = list(fit.calls)
    assert len(calls) == 8
    found = race(each(*CURVES), fit, ledger)
    assert fit.calls[:8] == calls
    assert fit.calls[8:] == [("c", 3), ("e", 3), ("c", 15)]
    assert (found.chosen.method, found.cost) == ("c", 24)


def test_full_runs_are_shared_with_cross_val(ledger):
    fit = Table(CURVES)
    race(each("none", "a", "b", "c"), fit, ledger, rungs=(0.2, 1))
    assert fit.calls == [("none", 15), ("a", 3), ("b", 3), ("c", 3), ("c", 15)]
    fit.calls.clear()
    cross_val(each("none", "c", "b"), fit, ledger)
    assert fit.calls == [("b", 15)]
    race(each("c"), fit, ledger, rungs=(1,))
    assert fit.calls == [("b", 15)]


@pytest.mark.parametrize(
    ("count", "keep", "rungs", "wanted"),
    [
        (10, 1 / 3, (1 / 15, 1 / 5, 1), [10, 4, 1]),  # 10 x 1 + 4 x 2 + 12 = 30 epochs: two runs
        (9, 1 / 3, (1 / 15, 1 / 5, 1), [9, 3, 1]),
        (8, 0.5, (1 / 15, 2 / 15, 4 / 15, 1), [8, 4, 2, 1]),
        (2, 0.9, (1 / 15, 1 / 5, 1), [2, 2, 1]),
        (4, 0.5, (1,), [4]),
    ],
)
def test_so_many_run_to_each_rung(ledger, count, keep, rungs, wanted):
    fit = Table({f"m{i:02}": i / 100 for i in range(count)})
    found = race(each(*(f"m{i:02}" for i in range(count))), fit, ledger, keep=keep, rungs=rungs)
    epochs = [epoch for _, epoch in fit.calls]
    assert [epochs.count(round(rung * EPOCHS)) for rung in rungs] == wanted
    assert found.chosen.method == f"m{count - 1:02}"
    if count == 10:
        assert found.cost == 6 * 1 + 3 * 3 + 15 == 30


def test_learning_rates_race_as_well(ledger):
    fit = Table(
        {("a", 0.1): {1: 0.5}, ("a", 0.01): {1: 0.7, 15: 0.8}, ("b", 0.1): {1: 0.6, 15: 0.6}, ("b", 0.01): {1: 0.1}}
    )
    candidates = [Candidate(method, lr) for method in "ab" for lr in (0.1, 0.01)]
    found = race(candidates, fit, ledger, rungs=(1 / 15, 1))
    assert fit.calls == [("a", 1), ("a", 0.01, 1), ("b", 1), ("b", 0.01, 1), ("a", 0.01, 15)]
    assert found.chosen == Candidate("a", 0.01)
    assert found.cost == 3 * 1 + 15


def test_ties_in_a_race_go_to_the_lower_loss_and_then_to_the_first(ledger):
    fit = Table(dict.fromkeys("abcd", 0.5), losses={"a": 0.9, "b": 0.5, "c": 0.4, "d": 0.4})
    found = race(each(*"abcd"), fit, ledger, rungs=(1 / 15, 1 / 5, 1), keep=0.5)
    assert fit.calls == [*((m, 1) for m in "abcd"), ("c", 3), ("d", 3), ("c", 15)]
    assert found.chosen.method == "c"
    fit = Table(dict.fromkeys("abcd", 0.5))
    assert race(each(*"dcba"), fit, ledger, {"other": 1}, rungs=(1 / 15, 1)).chosen.method == "d"


def test_what_wins_a_race_is_a_run_in_full_also_if_it_was_as_good_when_it_was_stopped(ledger):
    fit = Table({"a": 0.7, "b": 0.8})
    assert race(each("a", "b"), fit, ledger).run.key == {"method": "b", "lr": 0.1}
    assert fit.calls == [("a", 1), ("b", 1), ("b", 3), ("b", 15)]


def test_no_tuning_wins_a_race_without_being_run_again(ledger):
    fit = Table({"none": 0.9, "a": 0.5, "b": 0.6})
    found = race(each("none", "a", "b"), fit, ledger)
    assert fit.calls == [("none", 15), ("a", 1), ("b", 1)]
    assert (found.chosen, found.cost) == (Candidate("none"), 2)


@pytest.mark.parametrize("rungs", [(), (0.5,), (0.5, 0.2, 1), (0.5, 0.5, 1), (0, 1), (0.5, 1, 2)])
def test_rungs_that_do_not_ascend_to_1_are_refused(ledger, rungs):
    with pytest.raises(ConfigError, match=r"rungs=.*give ascending shares of the run that end with 1"):
        race(each("a"), Table({}), ledger, rungs=rungs)


@pytest.mark.parametrize("keep", [0, 1, -0.5])
def test_a_share_outside_0_to_1_is_refused(ledger, keep):
    with pytest.raises(ConfigError, match=rf"keep={keep}: give the share that survives"):
        race(each("a"), Table({}), ledger, keep=keep)


@pytest.mark.parametrize("over", [cross_val, race])
def test_no_candidates_is_an_error(ledger, over):
    with pytest.raises(ConfigError, match="no candidates: give at least one, see candidates_of"):
        over([], Table({}), ledger)


# --- greedy ---

SETS = {"none": 0.5, "a": 0.625, "b": 0.6, "c": 0.55, "a + b": 0.64, "a + c": 0.7, "b + c": 0.95, "a + b + c": 0.7}


def test_greedy_takes_the_path_of_forward_selection(ledger):
    fit = Table(SETS)
    found = greedy(["a", "b", "c"], [0.1], fit, ledger)
    # b + c is best of all, and forward selection cannot get there; the third block adds nothing.
    assert [method for method, _ in fit.calls] == ["none", "a", "b", "c", "a + b", "a + c", "a + b + c"]
    assert (found.search, found.chosen, found.validation) == ("greedy", Candidate("a + c", 0.1), 0.7)
    assert found.cost == 6 * 15
    assert len(found.trials) == 7


def test_greedy_names_blocks_in_their_order_whichever_was_chosen_first(ledger):
    fit = Table({"none": 0.1, "a": 0.2, "b": 0.3, "c": 0.4, "a + c": 0.5, "b + c": 0.6, "a + b + c": 0.7})
    assert greedy(["a", "b", "c"], [0.1], fit, ledger).chosen.method == "a + b + c"
    assert [method for method, _ in fit.calls] == ["none", "a", "b", "c", "a + c", "b + c", "a + b + c"]


@pytest.mark.parametrize(
    ("gain", "chosen", "calls"),
    [
        (0.0, "a + c", 7),
        (0.07, "a + c", 7),  # from .625 to .7
        (0.08, "a", 6),
        (0.125, "none", 4),  # from .5 to .625 is not more than that
    ],
)
def test_greedy_stops_where_a_block_gains_too_little(ledger, gain, chosen, calls):
    fit = Table(SETS)
    assert greedy(["a", "b", "c"], [0.1], fit, ledger, gain=gain).chosen.method == chosen
    assert len(fit.calls) == calls


@pytest.mark.parametrize(("most", "chosen", "calls"), [(0, "none", 1), (1, "a", 4), (2, "a + c", 6), (9, "a + c", 7)])
def test_greedy_takes_at_most_so_many_blocks(ledger, most, chosen, calls):
    fit = Table(SETS)
    assert greedy(["a", "b", "c"], [0.1], fit, ledger, most=most).chosen.method == chosen
    assert len(fit.calls) == calls


def test_greedy_tries_every_rate_for_every_set(ledger):
    fit = Table({"none": 0.1, ("a", 0.1): 0.2, ("a", 0.01): 0.4, ("b", 0.1): 0.3, ("b", 0.01): 0.2, "a + b": 0.1})
    found = greedy(["a", "b"], [0.1, 0.01], fit, ledger)
    assert found.chosen == Candidate("a", 0.01)
    assert len(fit.calls) == 1 + 4 + 2


# --- candidates ---

BLOCKS = Anatomy((Block("block1", ("x",), 1), Block("block2", ("y",), 1), Block("head", ("z",), 1)))


def test_candidates_are_every_block_all_and_none_with_every_rate():
    assert [str(c) for c in candidates_of(BLOCKS, [0.1, 0.01])] == [
        "none",
        *("block1 at 0.1", "block1 at 0.01", "block2 at 0.1", "block2 at 0.01"),
        *("head at 0.1", "head at 0.01", "all at 0.1", "all at 0.01"),
    ]


def test_candidates_with_pairs_and_the_heads_own_rates():
    found = candidates_of(BLOCKS, [0.1], [10.0, 1.0], pairs=True, everything=False, nothing=False)
    names = ["block1", "block2", "head", "head", "block1 + block2", "block2 + head"]
    assert [c.method for c in found] == names
    assert [c.lr for c in found] == [0.1, 0.1, 10.0, 1.0, 0.1, 0.1]


# --- engines ---

WORKER = """
import sys, time, types

# Without what imports torch and peft, which a search has no use for: several processes start.
package = types.ModuleType("peft_surgical"); package.__path__ = [sys.argv[1]]
sys.modules["peft_surgical"] = package
sys.modules["accelerate"] = types.SimpleNamespace(PartialState=object)
sys.modules["accelerate.utils"] = types.SimpleNamespace(
    DistributedType=object, broadcast_object_list=None, parse_flag_from_env=None
)
sys.modules["peft_surgical.blocks"] = types.SimpleNamespace(Anatomy=object)
for name in ("evaluation", "training"):
    folder = sys.modules[f"peft_surgical.{name}"] = types.ModuleType(name); folder.__path__ = [f"{sys.argv[1]}/{name}"]
sys.modules["peft_surgical.errors"] = types.SimpleNamespace(ConfigError=ValueError, DataError=ValueError)
sys.modules["peft_surgical.files"] = types.SimpleNamespace(printable=str)
sys.modules["peft_surgical.evaluation.selected"] = types.SimpleNamespace(Gain=object)
from peft_surgical.training.ledger import Ledger
from peft_surgical.training.search import Candidate, race

def fit(key):
    print(key["method"], round(15 * key.get("stop", 1)), flush=True)
    time.sleep(0.1)
    return {"validation": int(key["method"]) / 10, "cost": 15 * key.get("stop", 1)}

found = race([Candidate(str(i), 0.1) for i in range(9)], fit, Ledger(sys.argv[2]), keep=0.5)
print("chosen", found.chosen, len(found.trials))
"""


def test_two_processes_share_a_ledger_and_the_work(tmp_path):
    file = tmp_path / "runs.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(WORKER), peft_surgical.__path__[0], str(file)]
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in started]
    assert [lines[-1] for lines in said] == ["chosen 8 at 0.1 15"] * 2  # 9 + 5 + 1 runs
    fitted = [lines[:-1] for lines in said]
    # Dealt out one by one: 5 and 4 of the first nine, 3 and 2 of the five best, and the winner; nothing twice.
    assert [len(lines) for lines in fitted] == [9, 6]
    assert sorted(fitted[0] + fitted[1]) == sorted(
        [f"{i} 1" for i in range(9)] + [f"{i} 3" for i in range(4, 9)] + ["8 15"]
    )
    assert file.read_bytes().count(b"\n") == 15


def test_a_worker_leaves_alone_what_another_has_finished(ledger):
    keys = [{"method": str(i), "lr": 0.1} for i in range(5)]
    for key in (keys[0], keys[1], keys[3]):
        ledger.append(key, {"validation": 0.5, "cost": 1.0})
    calls = []

    def fit(key):
        calls.append(key["method"])
        return {"validation": 0.75, "cost": 1.0}

    runs = Workers(0, 2)(fit, keys, ledger)
    assert calls == ["2", "4"]
    assert [run.result["validation"] for run in runs] == [0.5, 0.5, 0.75, 0.5, 0.75]


LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


def test_a_worker_is_separated_for_a_while_and_the_environment_is_then_what_it_was(monkeypatch):
    given = {**LAUNCHED, "CUDA_VISIBLE_DEVICES": "5,7"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert workers() == Workers(3, 4)
    assert dict(os.environ) == before

    def failing():
        with separated() as found:
            assert found == Workers(3, 4)
            assert not set(LAUNCHED) & set(os.environ)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        failing()
    assert dict(os.environ) == before


@pytest.mark.parametrize("search", [cross_val, race])
def test_a_search_leaves_the_environment_of_its_caller_alone(search, ledger, monkeypatch):
    for name, value in {**LAUNCHED, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    before, seen = dict(os.environ), []

    def fit(key):
        seen.append(set(LAUNCHED) & set(os.environ))
        return {"validation": 0.5, "cost": 1.0}

    search(each("a"), fit, ledger)
    assert dict(os.environ) == before
    assert seen
    assert not any(seen)  # each run is this process's own: Trainer must not look for the others


@pytest.mark.parametrize("visible", [None, ""])
def test_each_worker_sees_the_gpu_of_its_own_number(monkeypatch, visible):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "x")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with separated() as found:
        assert found == Workers(2, 3)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ("2" if visible is None else "")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_alone_the_environment_stays_as_it_is(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with separated() as found:
        assert found == Workers(0, 1)
        assert os.environ["WORLD_SIZE"] == "1"
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


class Ray(types.ModuleType):
    """What of Ray's interface is used, on threads."""

    def __init__(self):
        super().__init__("ray")
        self.resources, self.started = [], 0

    def remote(self, *args, **resources):
        if not args:
            return lambda function: self.remote(function, **resources)
        self.resources.append(resources)
        ray, (function,) = self, args

        class Remote:
            def remote(self, *given):
                ray.started += 1
                reference = Reference(function, given)
                reference.thread.start()
                return reference

        return Remote()

    def wait(self, references):
        while not (done := [reference for reference in references if not reference.thread.is_alive()]):
            time.sleep(0.005)
        return done[:1], [reference for reference in references if reference is not done[0]]

    def get(self, reference):
        if reference.error is not None:
            raise reference.error
        return reference.result


class Reference:
    def __init__(self, function, given):
        self.result = self.error = None
        self.function, self.given = function, given
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        try:
            self.result = self.function(*self.given)
        except ValueError as error:
            self.error = error


@pytest.fixture
def ray(monkeypatch):
    stub = Ray()
    monkeypatch.setitem(sys.modules, "ray", stub)
    return stub


@pytest.mark.parametrize("resources", [{}, {"num_cpus": 1, "num_gpus": 0.5}])
def test_on_ray_runs_what_is_missing_and_keeps_the_order(ledger, ray, resources):
    ledger.append({"method": "b", "lr": 0.1}, {"validation": 0.75, "cost": 15.0})
    fit = Table({"a": 0.5, "c": 0.625})
    found = cross_val(each("a", "b", "c"), fit, ledger, engine=on_ray(**resources))
    assert sorted(fit.calls) == [("a", 15), ("c", 15)]
    assert ray.started == 2
    assert ray.resources == [resources]
    assert [run.key["method"] for run in found.trials] == ["a", "b", "c"]
    assert found.chosen.method == "b"


def test_on_ray_keeps_what_finishes_when_a_task_fails(ledger, ray):
    def fit(key):
        time.sleep({"quick": 0.0, "broken": 0.05, "slow": 0.1}[key["method"]])
        if key["method"] == "broken" and broken:
            raise ValueError("out of memory")
        return {"validation": 0.5, "cost": 1.0}

    broken = True
    with pytest.raises(ValueError, match="out of memory"):
        cross_val(each("broken", "quick", "slow"), fit, ledger, engine=on_ray())
    assert {run.key["method"] for run in ledger} == {"quick", "slow"}
    broken = False
    assert len(cross_val(each("broken", "quick", "slow"), fit, ledger, engine=on_ray()).trials) == 3
    assert ray.started == 4


def test_results_are_shown_readably(ledger):
    found = cross_val(each("a"), Table({"a": 0.5}), ledger)
    assert str(found.chosen) == "a at 0.1"
    assert "trials" not in repr(found)


@pytest.mark.slow
def test_on_a_real_ray_cluster(tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        candidates = [Candidate("block1", 1e-3), Candidate("head", 1e-3), Candidate("all", 1e-3)]
        worth = {"block1": 0.5, "head": 0.3, "all": 0.4}
        found = cross_val(
            candidates,
            lambda key: {"validation": worth[key["method"]], "cost": 1.0},
            Ledger(tmp_path / "runs.jsonl"),
            engine=on_ray(num_cpus=1),
        )
        assert str(found.chosen) == "block1 at 0.001"
        assert found.cost == 3.0
    finally:
        ray.shutdown()


def test_one_launch_keeps_what_is_noted_of_a_run(tmp_path):
    ledger, keys = Ledger(tmp_path / "ledger.jsonl"), [{"method": "block1", "seed": 0}]
    for _ in range(2):  # trained, and looked up
        (run,) = Together()(lambda key: {"validation": 0.5, "seconds": 2.0}, keys, ledger)
        assert (run.key, run.result, run.notes) == (keys[0], {"validation": 0.5}, {"seconds": 2.0})
