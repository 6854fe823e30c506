"""`auto` over a fit function whose scores are given: which runs it asks for, what it takes, what it costs."""

import pytest

from peft_surgical.errors import ConfigError
from peft_surgical.evaluation.selected import gain_of_best
from peft_surgical.training.auto import HALF_DECADES, LEAST_STEPS, AutoSettings, auto
from peft_surgical.training.ledger import Ledger
from peft_surgical.training.search import Candidate, Variant

IMAGES = 50
HEAD = "logistic-head"
MEAN, FINAL = Variant("frozen", average=True), Variant("frozen", average=True, refit=True)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "runs.jsonl")


class Scores:
    """A fit function: (method, rate, share of the run) or a part of these -> score; the base scores 0.2.

    The first images are right: as many as the score says. `folds` are the losses of the solved head by norm policy.
    """

    def __init__(self, scores, folds=None, fails_at=None):
        self.scores, self.folds, self.fails_at = {"none": 0.2, **scores}, folds or {}, fails_at
        self.keys = []

    def __call__(self, key):
        if len(self.keys) + 1 == self.fails_at:
            self.fails_at = None
            raise KeyboardInterrupt
        self.keys.append(key)
        method, rate, stop = key["method"], key["lr"], key.get("stop", 1)
        names = ((method, rate, stop), (method, rate), (method, stop), method)
        score = next(self.scores[name] for name in names if name in self.scores)
        spread = 0.001  # around the score, the same for every run but this one's own offset
        scores = [score + spread * (-1) ** i for i in range(IMAGES)]
        marks = "".join("1" if i < round(score * IMAGES) else "0" for i in range(IMAGES))
        refit = key.get("how", {}).get("refit", False)
        found = {"score": score, "scores": scores, "right": marks, "validation": 1.0 if refit else score}
        cost = {"none": 0, HEAD: 1}.get(method, 100 * stop) + (50 if refit else 0)
        found |= {"validation_loss": 0.0 if refit else 1 - score, "cost": cost}
        return {**found, "fold_loss": self.folds[key["how"]["norm_stats"]]} if method == HEAD else found

    def asked(self):
        """Method, rate and share of every run but the base's."""
        return [(key["method"], key["lr"], key.get("stop", 1)) for key in self.keys if key["method"] != "none"]


def search(fit, ledger, parts=("a", "all"), **how):
    return auto(parts, fit, ledger, {"seed": 3}, **how)


def test_rates_are_tried_until_the_best_lies_between_worse_ones(ledger):
    rates = {("a", 1e-4): 0.4, ("a", 3e-4): 0.9, ("a", 1e-3): 0.5, ("a", 3e-3): 0.45}
    fit = Scores({**rates, ("b", 3e-4): 0.2, ("b", 1e-3): 0.3, ("b", 3e-3): 0.25, ("all", 3e-4): 0.1})
    found = search(fit, ledger, parts=("a", "b", "all"))
    fifth = [("a", 1e-3), ("b", 1e-3), ("all", 3e-4)]
    assert fit.asked()[:3] == [(*one, 0.2) for one in fifth]
    # The best part gets neighbours; at 3e-4 it is best, so that 1e-4 is tried as well. The others are clearly behind.
    more = {("a", 3e-4), ("a", 3e-3), ("a", 1e-4)}
    assert {(method, rate) for method, rate, stop in fit.asked()[3:-1]} == more
    assert fit.asked()[-1] == ("a", 3e-4, 1)
    assert (found.search, found.chosen) == ("auto", Candidate("a", 3e-4, FINAL))


def test_the_ends_of_the_rates_are_ends(ledger):
    scores = {("a", rate): 0.3 + 0.05 * place for place, rate in enumerate(HALF_DECADES)}
    found = search(Scores(scores), ledger, parts=("a",))
    assert found.chosen.lr == HALF_DECADES[-1]


class Noisy(Scores):
    """The scores of the images of some runs differ from image to image by ± `noise`, by rate or by method."""

    noise = {}

    def __call__(self, key):
        found = super().__call__(key)
        noise = self.noise.get(key["lr"], 0.0) or self.noise.get(key["method"], 0.0)
        found["scores"] = [one + noise * (-1) ** (i // 2) for i, one in enumerate(found["scores"])]
        return found


@pytest.mark.parametrize("noise", [1.0, 0.4])
def test_a_second_part_that_is_not_clearly_behind_gets_neighbours_too(ledger, noise):
    # The mean difference is 0.2. With noise of 1 at b's rate its standard error is 0.14, with 0.4 it is 0.06.
    fit = Noisy({("a", 1e-3): 0.5, "a": 0.4, ("b", 1e-3): 0.3, "b": 0.2, "all": 0.1})
    fit.noise = {"b": noise}
    search(fit, ledger, parts=("a", "b", "all"))
    tried = {(method, rate) for method, rate, _ in fit.asked()}
    assert {("a", 3e-4), ("a", 3e-3)} <= tried
    assert ({("b", 3e-4), ("b", 3e-3)} <= tried) == (noise == 1.0)
    assert ("all", 1e-3) not in tried


@pytest.mark.parametrize(("noise", "rate"), [(0.3, 1e-2), (0.01, 1e-3)])
def test_of_rates_within_a_standard_error_the_largest_is_taken(ledger, noise, rate):
    # The mean difference is 0.02. With noise of 0.3 its standard error is 0.3 / sqrt(50) = 0.042, else 0.0014.
    fit = Noisy({("a", 1e-3): 0.7, ("a", 1e-2): 0.68})
    fit.noise = {1e-2: noise}
    found = search(fit, ledger, parts=("a",), asked=AutoSettings(lrs=(1e-3, 1e-2)))
    assert found.chosen.lr == rate


def test_the_largest_rate_is_that_of_the_same_part(ledger):
    fit = Scores({("a", 1e-3): 0.7, ("b", 1e-3): 0.7, ("b", 1e-2): 0.7, ("a", 1e-2): 0.2})
    asked = AutoSettings(lrs=(1e-3, 1e-2))
    assert search(fit, ledger, parts=("a", "b"), asked=asked).chosen == Candidate("a", 1e-3, FINAL)


def test_the_solved_head_says_which_statistics_fit(ledger):
    fit = Scores({HEAD: 0.3, "a": 0.8, "all": 0.7}, folds={"frozen": 1.0, "estimated": 0.9})
    found = search(fit, ledger, solved=HEAD)
    assert found.chosen.how == Variant("estimated", average=True, refit=True)
    trained = [key for key in fit.keys if key["method"] in ("a", "all")]
    assert {key["how"]["norm_stats"] for key in trained} == {"estimated"}
    assert fit.keys[0] == {"seed": 3, "method": "none", "lr": None, "how": {"norm_stats": "frozen"}}
    assert found.record()["chosen"] == str(found.chosen)


def test_where_the_solved_head_leads_the_best_of_the_others_trains_to_the_end(ledger):
    scores = {HEAD: 0.8, ("a", 0.2): 0.7, ("a", 1): 0.9, "all": 0.6}
    fit = Scores(scores, folds={"frozen": 0.5, "estimated": 0.6})
    found = search(fit, ledger, solved=HEAD)
    assert [one for one in fit.asked() if one[2] == 1 and one[0] != HEAD] == [("a", 3e-3, 1)] * 2  # and all labels
    assert found.chosen.method == "a"
    again = Scores({**scores, ("a", 1): 0.75}, folds=fit.folds)
    assert search(again, Ledger(ledger.file.with_name("b")), solved=HEAD).chosen == Candidate(
        HEAD, None, Variant("frozen", refit=True)
    )


def test_where_a_part_of_a_run_does_not_show_a_gain_the_leader_trains_to_the_end(ledger):
    fit = Scores({("a", 0.2): 0.22, ("a", 1): 0.8, "all": 0.1})
    found = search(fit, ledger)
    assert [stop for method, _, stop in fit.asked() if method == "a"][-2:] == [1, 1]
    assert found.gain.is_shown
    assert found.gain.mean == pytest.approx(0.6, abs=0.02)
    shown = Scores({"a": 0.8, "all": 0.1})
    search(shown, Ledger(ledger.file.with_name("b")))
    assert [stop for _, _, stop in shown.asked()].count(1) == 1  # the last run alone


def test_the_base_wins_where_nothing_scores_higher(ledger):
    fit = Scores({"a": 0.2, "all": 0.1})
    found = search(fit, ledger)
    assert (found.chosen.method, found.validation) == ("none", 0.2)
    assert not found.gain.is_shown
    assert fit.asked()[-1][2] == 1  # after a whole run of the best
    assert all("refit" not in key["how"] for key in fit.keys)
    # With a new head, not to tune is no candidate.
    assert search(Scores({"a": 0.2, "all": 0.1}), ledger, nothing=False).chosen.method == "a"


def test_the_last_run_has_all_labels_and_keeps_what_was_measured_without(ledger):
    fit = Scores({"a": 0.8, "all": 0.1})
    found = search(fit, ledger)
    assert found.run.key == {"seed": 3, "method": "a", "lr": 3e-3, "how": FINAL.record()}
    assert (found.validation, found.run.result["validation_loss"]) == (0.8, pytest.approx(0.2))
    assert fit.keys[-1] == found.run.key
    assert str(found.chosen) == "a at 0.003, all labels"
    assert found.trials[-1].key == found.run.key


def test_costs_add_up(ledger):
    fit = Scores({HEAD: 0.3, "a": 0.8, "all": 0.1}, folds={"frozen": 0.5, "estimated": 0.6})
    found = search(fit, ledger, solved=HEAD)
    stopped = sum(1 for *_, stop in fit.asked() if stop != 1)
    # two heads of 1, fifths of 20 that do not go on, and the last run of 150
    assert found.cost == 2 + 20 * stopped + 150
    assert found.relative_cost == found.cost / 150


@pytest.mark.parametrize("at", [1, 2, 4, 6, 9])
def test_a_killed_search_goes_on(ledger, at):
    given = {HEAD: 0.8, ("a", 0.2): 0.7, ("a", 1): 0.9, "all": 0.6}
    folds = {"frozen": 0.5, "estimated": 0.6}
    whole = search(Scores(given, folds), Ledger(ledger.file.with_name("whole")), solved=HEAD)
    fit = Scores(given, folds, fails_at=at)
    with pytest.raises(KeyboardInterrupt):
        search(fit, ledger, solved=HEAD)
    assert search(fit, ledger, solved=HEAD) == whole
    assert len(fit.keys) == len(whole.trials)  # none of them twice


def test_given_rates_are_those_that_are_tried(ledger):
    fit = Scores({("a", 0.5): 0.8, ("a", 0.25): 0.9, "all": 0.1})
    found = search(fit, ledger, asked=AutoSettings(lrs=(0.25, 0.5)))
    tried = [(method, rate) for method, rate, stop in fit.asked() if stop == 0.2]
    assert tried == [("a", 0.25), ("a", 0.5), ("all", 0.25), ("all", 0.5)]
    assert found.chosen.lr == 0.25


@pytest.mark.parametrize(
    ("effort", "steps", "stop"),
    [(1, 1000, 0.2), (3, 1000, 0.2 * 3), (5, 1000, 1), (1, 100, LEAST_STEPS / 100), (1, 45, 1), (2, 9, 1)],
)
def test_how_long_each_candidate_trains(ledger, effort, steps, stop):
    fit = Scores({"a": 0.8, "all": 0.1})
    search(fit, ledger, asked=AutoSettings(effort=effort), steps=steps)
    assert {one[2] for one in fit.asked()[:-1]} == {stop}


@pytest.mark.parametrize("effort", [0, 6, -1])
def test_effort_is_a_number_of_fifths(effort):
    with pytest.raises(ConfigError, match=rf"effort={effort}: give 1 to 5, the fifths of a run"):
        AutoSettings(effort=effort)


def test_the_gain_is_that_of_the_best_of_all_that_were_compared(ledger):
    fit = Scores({"a": 0.8, "all": 0.1})
    found = search(fit, ledger)
    compared = [run for run in found.trials if run.key["method"] != "none" and not run.key["how"].get("refit")]

    def right(run):
        return [mark == "1" for mark in run.result["right"]]

    scores = [run.result["scores"] for run in compared]
    wanted = gain_of_best(scores, list(map(right, compared)), right(found.trials[0]))
    assert found.gain == wanted
    assert found.record()["gain"] == wanted.record()


def test_the_gain_follows_a_metric_that_prefers_another_candidate(ledger):
    class Metric(Scores):
        """`score`, by which candidates are compared, turns the order of the images' own scores around."""

        def __call__(self, key):
            found = super().__call__(key)
            return {**found, "score": 1 - found["score"]} if key["method"] != "none" else found

    found = search(Metric({"a": 0.9, "all": 0.6}), ledger, asked=AutoSettings(lrs=(1e-3,)))
    assert found.chosen.method == "all"
    assert found.gain.mean == pytest.approx(0.6 - 0.2, abs=0.02)
