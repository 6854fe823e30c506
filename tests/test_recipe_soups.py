"""Soups of the adapters that the CIFAR-10-C recipe leaves, against the same worked out on the weights by hand."""

import argparse

import pytest
import torch
from miniatures import cifar10c_files
from peft import PeftModel
from scripts import script

from paper import cifar, cifar_networks
from paper.cifar_cells import chosen_runs
from peft_surgical.errors import DataError
from peft_surgical.evaluation import predict_logits
from peft_surgical.training.ledger import Ledger, Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]


@pytest.fixture(scope="module")
def soups():
    return script("recipes", "soups.py")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with what the recipe leaves after one task: rows and adapters of every candidate."""
    world = cifar10c_files(tmp_path_factory.mktemp("world"))
    output = world / "out"
    sizes = ["--tuning-images", "20", "--validation-images", "10", "--test-images", "10"]
    own = ["--target", "all", "block1", "block2", "block3", "head", "--lr", "1e-2", "--head-lr", "1e-1", *sizes]
    own += ["--tasks", "frost", "--seeds", "0", "1", "--epochs", "1", "--batch-size", "10", "--cpu"]
    script("recipes", "cifar10c.py").main(
        ["--models", str(world), "--data", str(world / "data"), "--output", str(output), *own]
    )
    return world


def asked(world, *more):
    own = ["--rows", str(world / "out" / "rows.jsonl"), "--adapters", str(world / "out" / "adapters")]
    return [*own, "--data", str(world / "data"), "--models", str(world), "--networks", "resnet26", *more]


def test_every_seed_tests_on_the_same_images_and_tunes_on_none_of_them(measured):
    labels = cifar.read_images(measured / "data", "frost").labels
    parts = [cifar.split(labels, seed, 20, 10, 10) for seed in (0, 1)]
    assert torch.equal(parts[0].test, parts[1].test)
    assert not torch.equal(parts[0].tune, parts[1].tune)
    assert not {*parts[0].test.tolist()} & {*parts[0].tune.tolist(), *parts[1].tune.tolist()}
    rows = [run for run in Ledger(measured / "out" / "rows.jsonl") if "test" in run.result]
    assert {(run.key["test_images"], run.result["n"]) for run in rows} == {(10, 10)}


def test_soups_are_means_of_weights(soups, measured, capsys):
    soups.main(asked(measured, "--markdown", str(measured / "soups.md")))
    (found,) = [run.result for run in Ledger(measured / "out" / "soups.jsonl")]

    images = cifar.read_images(measured / "data", "frost")
    parts = cifar.split(images.labels, 0, 20, 10, 10)
    base = cifar_networks.load_network("resnet26", measured)
    start = {name: value.double() for name, value in base.state_dict().items()}
    rows = {run.key["method"]: run for run in Ledger(measured / "out" / "rows.jsonl").runs(seed=0)}

    def tuned(name):
        network = cifar_networks.load_network("resnet26", measured)
        adapter = PeftModel.from_pretrained(network, measured / "out" / "adapters" / rows[name].result["adapter"])
        return {key: value.double() for key, value in adapter.merge_and_unload().state_dict().items()}

    def right(state, rows):
        base.load_state_dict({key: value.float() for key, value in state.items()})
        logits = predict_logits(base, cifar_networks.normalise(images.pixels[rows], "resnet26"))
        return (logits.argmax(1) == images.labels[rows]).double().mean().item()

    def sum_of(states, share):
        return {key: value + share * sum(one[key] - value for one in states) for key, value in start.items()}

    states = {name: tuned(name) for name in soups.CANDIDATES}
    assert found["every"] == right(sum_of(states.values(), 1 / 5), parts.test)
    assert found["sum"] == right(sum_of([states[name] for name in soups.CANDIDATES[1:]], 1.0), parts.test)
    best = max(right(state, parts.validation) for state in states.values())
    leaders = [name for name in states if right(states[name], parts.validation) == best]
    assert found["single"] in [right(states[name], parts.test) for name in leaders]
    assert found["oracle"] == max(right(state, parts.test) for state in states.values())
    assert (measured / "soups.md").read_text().startswith("| way | CIFAR-10-C | CIFAR-Flip | all |")

    # What is in the ledger is not computed again, and needs no adapters.
    soups.main(["--rows", str(measured / "out" / "rows.jsonl"), "--networks", "resnet26"])
    assert "oracle" in capsys.readouterr().out


def test_a_mixture_has_the_logits_of_the_mean_of_the_weights(soups, measured):
    args = argparse.Namespace(
        data=str(measured / "data"), models=str(measured), adapters=str(measured / "out" / "adapters")
    )
    rows = Ledger(measured / "out" / "rows.jsonl").runs()
    cell = soups._Cell(args, "resnet26", "frost", chosen_runs(rows, "resnet26", "frost", 0, soups.CANDIDATES))
    two = ["block1", "head"]
    states = [cell.load(cell.adapters[name]).merge_and_unload().state_dict() for name in two]
    network = cifar_networks.load_network("resnet26", measured)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    for found, shares in ((cell.mean(two), (0.5, 0.5)), (cell.mixed({"block1": 0.25, "head": 0.75}), (0.25, 0.75))):
        moves = [(share, state) for share, state in zip(shares, states, strict=True)]
        network.load_state_dict(
            {n: v + sum(share * (state[n] - v) for share, state in moves) for n, v in start.items()}
        )
        for part in ("validation", "test"):
            expected = predict_logits(network, cell.images[part])
            torch.testing.assert_close(found[part], expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found[part], cell.found["block1"][part], atol=1e-5)


class Candidates:
    """In place of a cell: what a mixture validates is looked up, by its candidates and their shares."""

    def __init__(self, known):
        self.known, self.order = known, ["a", "b", "c"]
        self.found = {name: {name: 1.0} for name in self.order}

    def mean(self, names):
        return dict.fromkeys(names, round(1 / len(names), 2))

    def mixed(self, weights):
        return {name: share for name, share in weights.items() if share}

    def accuracy(self, mixture, part="validation"):
        return self.known.get(tuple(sorted(mixture.items())), 0.0)


def test_a_candidate_joins_the_greedy_soup_while_validation_does_not_fall(soups):
    alone, with_b = (("a", 1.0),), (("a", 0.5), ("b", 0.5))
    with_c, every = (("a", 0.5), ("c", 0.5)), (("a", 0.33), ("b", 0.33), ("c", 0.33))
    for known, kept in (
        ({alone: 0.7, with_b: 0.6, with_c: 0.7, every: 0.9}, with_c),
        ({alone: 0.7, with_b: 0.7, every: 0.6}, with_b),
        ({alone: 0.7, with_b: 0.8, every: 0.8}, every),
        ({alone: 0.7, with_b: 0.6, with_c: 0.6}, alone),
    ):
        assert tuple(sorted(soups._Cell.greedy(Candidates(known)).items())) == kept


def test_the_segment_takes_the_share_that_validates_best_and_the_smallest_of_equals(soups):
    alone, quarter, three = (("a", 1.0),), (("a", 0.75), ("b", 0.25)), (("a", 0.25), ("b", 0.75))
    for known, kept in (
        ({alone: 0.5, quarter: 0.6, three: 0.7}, three),
        ({alone: 0.6, quarter: 0.6}, alone),
        ({alone: 0.6, (("b", 1.0),): 0.7}, (("b", 1.0),)),
    ):
        assert tuple(sorted(soups._Cell.segment(Candidates(known)).items())) == kept


def test_what_is_known_of_other_adapters_is_not_shown(soups, measured, tmp_path, capsys):
    soups.main(asked(measured))
    rows = Ledger(tmp_path / "rows.jsonl")
    for run in Ledger(measured / "out" / "rows.jsonl"):
        other = {"adapter": f"{run.result['adapter']}-2"} if "adapter" in run.result else {}
        rows.append(run.key, {**run.result, **other})
    with pytest.raises(SystemExit):
        soups.main(["--rows", str(rows.file), "--ledger", str(measured / "out" / "soups.jsonl")])
    assert "resnet26 on frost is not in" in capsys.readouterr().err


def test_the_table_compares_with_the_single_best(soups):
    one = {"single": 0.5, "oracle": 0.6, **dict.fromkeys(soups.WAYS, 0.5)}
    other = {**one, "two": 0.4}
    drawn = soups.table({("resnet26", "frost"): [one, other], ("resnet32", "flip"): [one]}, [0, 1])
    lines = {line[0]: line[1:] for line in drawn.rows}
    assert lines["two"][:2] == ["-5.0", "+0.0"]
    assert lines["two"][-2:] == ["-5.0", "+0.0"]
    assert lines["oracle"][-2:] == ["+10.0", "+10.0"]


def test_other_adapters_than_those_of_the_rows_are_noticed(soups, measured, tmp_path):
    rows = Ledger(tmp_path / "rows.jsonl")
    for run in Ledger(measured / "out" / "rows.jsonl"):
        result = dict(run.result)
        if "test" in result:
            result["test"] = 1.0 - result["test"] / 2
        rows.append(run.key, Run(run.key, result).result)
    with pytest.raises(DataError, match="of the test images right, its row says"):
        soups.main([*asked(measured)[2:], "--rows", str(rows.file)])


def test_without_rows_of_every_candidate_there_is_nothing_to_mix(soups, tmp_path):
    Ledger(tmp_path / "rows.jsonl").append({"recipe": "cifar10c", "task": "frost", "lr": None, "seed": 0}, {})
    with pytest.raises(DataError, match="has no task with rows of all, block1, block2, block3, head"):
        soups.main(["--rows", str(tmp_path / "rows.jsonl")])
