"""The theory recipe: hand-worked cases, its descent against PEFT step by step, and --quick as a whole."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scripts import script
from torch import nn

from paper import linear_theory

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)

RECIPE = Path(__file__).parents[1] / "recipes" / "theory.py"


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "theory.py")


@pytest.fixture(autouse=True)
def double_precision():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relu_products_by_hand(recipe):
    one, other, back = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[-2.0, 0.0]])
    sixty = torch.tensor([[0.5, 0.75**0.5]])
    products = linear_theory.relu_products(one, torch.cat([one, other, back, sixty]))
    # Half of E[z^2]; 3 E[relu(z)]^2; never both positive; (sin 60 + 2 pi / 3 cos 60) / (2 pi).
    expected = [0.5, 3 / (2 * math.pi), 0.0, (0.75**0.5 + math.pi / 3) / (2 * math.pi)]
    torch.testing.assert_close(products, torch.tensor([expected]))


def test_relative_loss_is_that_of_the_network_on_many_samples(recipe):
    task = linear_theory.Task(normal(3, 4), normal(3, seed=1), normal(4, 4, seed=2), -1.5)
    first, head = normal(3, 4, seed=3), normal(3, seed=4)
    z = normal(200_000, 4, seed=5)
    labels = -1.5 * linear_theory.Network(task.first, task.head, nn.ReLU())(z).detach()
    errors = linear_theory.Network(first, head, nn.ReLU())(z @ task.shift.T).detach() - labels
    measured = (errors.square().mean() / labels.square().mean()).item()
    assert task.loss(first, head) == pytest.approx(measured, rel=0.03)


def test_input_shift_by_hand(recipe):
    # relu(z1) is the label, and A swaps the axes so that block1 sees relu(z2): their correlation is 1/pi.
    task = linear_theory.Task(torch.tensor([[1.0, 0.0]]), torch.ones(1), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1.0)
    assert task.best_head().item() == pytest.approx(1 / math.pi)
    assert task.loss(task.first, task.best_head()) == pytest.approx(1 - 1 / math.pi**2)
    torch.testing.assert_close(task.best_first(), torch.tensor([[0.0, 1.0]]))
    assert task.loss(task.best_first(), task.head) < 1e-15
    assert task.loss(task.first, task.head) == pytest.approx(2 - 2 / math.pi)


@pytest.mark.parametrize("seed", range(5))
def test_no_head_does_better_than_least_squares(recipe, seed):
    task = linear_theory.draw_task("input", seed)
    assert task.loss(task.first @ torch.linalg.inv(task.shift), task.head) < 1e-12
    best = task.best_head()
    least = task.loss(task.first, best)
    assert least > 0.05
    assert all(task.loss(task.first, best + 0.01 * normal(len(best), seed=i)) > least for i in range(20))


def test_no_block1_flips_the_sign_of_a_positive_head(recipe):
    task = linear_theory.draw_task("flip", 0)
    assert (task.head > 0).all()
    assert task.loss(task.best_first(), task.head) == pytest.approx(1)
    for i in range(50):
        assert task.loss(10 ** (i / 10 - 4) * normal(*task.first.shape, seed=i), task.head) > 1
    assert task.loss(task.first, -task.head) < 1e-12
    assert task.loss(task.first, task.best_head()) < 1e-12


def test_block1_flips_the_sign_of_a_head_of_both_signs_by_hand(recipe):
    # f = relu(x1) - 2 relu(x2). With B = (2 x2, x1 / 2) it is relu(2 x2) - 2 relu(x1 / 2) = -f.
    task = linear_theory.Task(torch.eye(2), torch.tensor([1.0, -2.0]), torch.eye(2), -1.0)
    torch.testing.assert_close(task.best_first(), torch.tensor([[0.0, 2.0], [0.5, 0.0]]))
    assert task.loss(task.best_first(), task.head) < 1e-15
    uneven = linear_theory.Task(torch.eye(2), -torch.ones(2), torch.eye(2), -1.0)
    with pytest.raises(ValueError, match=r"t = -1.0 and a head not of \(\+, -\) pairs: \[-1.0, -1.0\]"):
        uneven.best_first()


def test_positive_factors_are_in_reach_of_both(recipe):
    drawn = linear_theory.draw_task("input", 0)
    for shift, t in ((2 * torch.eye(10), 1.0), (torch.eye(10), 3.0)):
        task = linear_theory.Task(drawn.first, drawn.head, shift, t)
        assert task.loss(task.best_first(), task.head) < 1e-12
        assert task.loss(task.first, task.best_head()) < 1e-12


def test_search_tunes_through_peft_and_stays_above_the_least_loss(recipe):
    task = linear_theory.draw_task("flip", 1)
    before = task.first.clone(), task.head.clone()
    assert 1 <= linear_theory.search(task, "block1", 1, 30) < 1.2
    assert linear_theory.search(task, "all", 1, 30) < 0.9
    assert linear_theory.search(task, "head", 1, 30) < 1e-9
    assert torch.equal(task.first, before[0])
    assert torch.equal(task.head, before[1])


@pytest.fixture(scope="module")
def linear():
    """Three linear networks, six target samples in eight dimensions, and the product that fits them."""
    dtype = torch.float64
    g = torch.Generator().manual_seed(0)
    first, head, x, wanted = (torch.randn(3, *s, generator=g, dtype=dtype) for s in ((4, 8), (4,), (6, 8), (8,)))
    return first / 2, head / 2, x, wanted


@pytest.mark.parametrize("target", ["block1", "all"])
def test_descent_is_sgd_through_peft_step_by_step(recipe, linear, target):
    first, head, x, wanted = linear
    gram, eye = x.mT @ x / 6, torch.eye(8).expand(3, 8, 8)
    tuned, moved, lowest, _ = linear_theory.descend(first, head, gram, wanted, eye, target, 500)
    for i in range(3):
        rate = 0.5 / (
            torch.linalg.eigvalsh(gram[i])[-1] * (head[i] @ head[i] + torch.linalg.matrix_norm(first[i], 2) ** 2)
        )
        model = linear_theory.tunable(linear_theory.Network(first[i], head[i], nn.Identity()), target)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=float(rate))
        losses = []
        for _ in range(500):
            sgd.zero_grad()
            network = (model.base_model.model.last.weight @ model.base_model.model.first.weight)[0]
            losses.append((network.detach() - wanted[i]).square().sum().item())
            ((model(x[i]) - x[i] @ wanted[i]).square().mean() / 2).backward()
            sgd.step()
        network = model.merge_and_unload()
        torch.testing.assert_close(network.first.weight.detach(), tuned[i], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(network.last.weight[0].detach(), moved[i], rtol=1e-9, atol=1e-10)
        assert lowest[i].item() == pytest.approx(min(losses))
    assert torch.equal(moved, head) == (target == "block1")


def test_descent_on_block1_ends_at_the_projection(recipe, linear):
    first, head, x, wanted = linear
    x = x[:, :3]
    eye = torch.eye(8).expand(3, 8, 8)
    tuned, _, _, ended = linear_theory.descend(first, head, x.mT @ x / 3, wanted, eye, "block1", 10_000)
    assert ended.all()
    start = (head[:, None] @ first).squeeze(1)
    end = start + (torch.linalg.pinv(x) @ x @ (wanted - start)[:, :, None]).squeeze(2)
    torch.testing.assert_close((head[:, None] @ tuned).squeeze(1), end, rtol=0, atol=1e-7)


def test_descent_says_what_is_not_at_its_end_and_what_diverges(recipe, linear):
    first, head, x, wanted = linear
    gram, eye = x.mT @ x / 6, torch.eye(8).expand(3, 8, 8)
    settled = torch.stack([(head[0] @ first[0]), wanted[1], wanted[2]])
    assert linear_theory.descend(first, head, gram, settled, eye, "all", 500)[3].tolist() == [True, False, False]
    # Far away in the beginning, B and v grow until the learning rate is too high.
    with pytest.raises(FloatingPointError, match="descent on all diverges at a learning rate of "):
        linear_theory.descend(first, head, gram, 1e6 * wanted, eye, "all", 1000)


def test_what_is_not_in_the_sample_is_spoilt_by_the_head_alone(recipe):
    # By hand: k = 1, B = (1, 1), v = 1, so w = (1, 1); A flips x1, the sample holds x1 alone, so w1 is to become -1.
    first, head, wanted = torch.ones(1, 1, 2), torch.ones(1, 1), torch.tensor([[-1.0, 1.0]])
    gram, covariance = torch.diag(torch.tensor([1.0, 0.0]))[None], torch.eye(2)[None] / 2
    b, v, lowest, _ = linear_theory.descend(first, head, gram, wanted, covariance, "block1", 5000)
    torch.testing.assert_close(b, torch.tensor([[[-1.0, 1.0]]]))
    assert v.item() == 1
    assert lowest.item() < 1e-15
    b, v, lowest, _ = linear_theory.descend(first, head, gram, wanted, covariance, "all", 5000)
    # b1 and v start equal and their gradients are equal: b1 v stays a square, never -1, and both go to 0. On the way
    # the product is (v^2, v), the least loss min over v of ((v^2 + 1)^2 + (v - 1)^2) / 2.
    assert b[0, 0, 1].item() == 1
    torch.testing.assert_close(torch.stack([b[0, 0, 0], v[0, 0]]), torch.zeros(2), rtol=0, atol=1e-6)
    grid = torch.linspace(0, 1, 10_001)
    least = (((grid**2 + 1) ** 2 + (grid - 1) ** 2) / 2).min().item()
    assert least <= lowest.item() < least + 0.02


@pytest.mark.parametrize("shift", ["local", "rotation", "contrast"])
def test_drawn_targets_fit_their_description(recipe, shift):
    first, head, w, x, a, source = linear_theory.draw_linear(shift, 0)
    assert all(map(torch.equal, (first, head, w, x, a, source), linear_theory.draw_linear(shift, 0)))
    assert not torch.equal(linear_theory.draw_linear(shift, 1)[3], x)
    assert w.norm().item() == pytest.approx(1)
    if shift == "local":
        assert (x.abs().sum(1) == 1).all()
        assert ((x < 0).nonzero()[:, 1] < 2).all()
        assert ((x > 0).nonzero()[:, 1] >= 2).all()
        assert source.diag().sum().item() == pytest.approx(1)
        assert source.diag()[:2].sum().item() == pytest.approx(0.5)
    elif shift == "rotation":
        torch.testing.assert_close(a @ a.T, torch.eye(20), rtol=0, atol=1e-12)
    else:
        assert torch.equal(a, 2 * torch.eye(20))


def test_the_papers_construction_is_a_mixture_of_two_orthogonal_subspaces(recipe):
    first, head, w, x, source, target = linear_theory.draw_mixture(0)
    assert (first.shape, head.shape, w.shape) == ((1, 24), (1,), (24,))
    other = 2 * target - source  # the target's covariance is the mean of the two
    assert [round(float(part.trace())) for part in (source, other)] == [20, 2]
    torch.testing.assert_close(source @ other, torch.zeros(24, 24), rtol=0, atol=1e-12)
    inside = [(x @ part).norm(dim=1) > 1e-9 for part in (source, other)]
    assert (inside[0] ^ inside[1]).all()  # each input is of one of the two
    assert 10 < inside[0].sum() < 30
    torch.testing.assert_close(x @ (source + other), x, rtol=0, atol=1e-12)


def test_theorem_1_holds_in_the_papers_construction(recipe):
    (row,) = linear_theory.mixture(range(6), (14,), 20_000)
    assert row["holds"]["count"] >= 5
    assert row["losses"]["block1"]["median"] < 1e-9 < row["losses"]["all"]["median"]


def test_the_head_of_theorem_1_is_least_squares_on_the_samples(recipe):
    (row,) = linear_theory.theorem("rotation", range(2), (30,), 1500)
    drawn = [
        torch.stack(part) for part in zip(*(linear_theory.draw_linear("rotation", s) for s in range(2)), strict=True)
    ]
    first, head, w, x, a, _ = drawn
    eye = torch.eye(20).expand(2, 20, 20)
    first, *_ = linear_theory.descend(first, head, eye, w, eye, "all", 1500)
    wanted = torch.linalg.solve(a.mT, w)
    x = x[:, :30]
    v = torch.linalg.lstsq(x @ first.mT, x @ wanted[:, :, None]).solution
    losses = (first.mT @ v).squeeze(2).sub(wanted).square().sum(1)  # a rotation leaves the covariance at I
    assert row["losses"]["head"]["mean"] == pytest.approx(losses.mean().item())


@pytest.fixture(scope="module")
def quick(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["theory.py", "--output", str(folder / "new"), "--quick"])
        recipe.main()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    return folder / "new"


def test_quick_writes_all_files_and_the_json_survives_the_round_trip(recipe, quick):
    assert sorted(file.name for file in quick.iterdir()) == ["theory.json", "theory.md", "theory.png"]
    assert (quick / "theory.png").read_bytes().startswith(b"\x89PNG")
    text = (quick / "theory.json").read_text(encoding="utf-8")
    report = json.loads(text)
    assert json.dumps(report, indent=1) + "\n" == text
    assert "NaN" not in text
    assert "Infinity" not in text
    assert report["settings"]["seeds"] == 10
    assert {"torch", "peft", "peft-surgical"} == set(report["settings"]["versions"])
    markdown = (quick / "theory.md").read_text(encoding="utf-8")
    for rows in recipe.tables(report).values():
        assert all(f"| {' | '.join(cells)} |" in markdown for cells in rows)
    assert all(
        recipe.verdict(s, [r for r in report["theorem"] if r["shift"] == s]) in markdown for s in linear_theory.SHIFTS
    )


def test_quick_finds_the_claims_to_hold_where_they_do_and_to_fail_where_they_fail(quick):
    report = json.loads((quick / "theory.json").read_text(encoding="utf-8"))
    holds = {row["case"]: row["holds"]["count"] for row in report["propositions"]}
    assert holds == {"input": 10, "contrast": 0, "flip": 10, "flip, both signs": 0}
    for row in report["propositions"]:
        for target, found in row["found"].items():
            assert found["mean"] >= row["losses"][target]["mean"] - 1e-9  # nothing is found below the least there is
    rows = {(row["shift"], row["n"]): row for row in report["theorem"]}
    assert rows["local", 14]["holds"]["count"] == 10
    assert rows["local", 14]["losses"]["block1"]["mean"] < 1e-9 < rows["local", 14]["losses"]["all"]["q05"]
    assert rows["local", 4]["holds"]["count"] == 5
    assert rows["contrast", 14]["all lower"]["count"] == 10
    assert all(rows[shift, 40]["losses"]["block1"]["mean"] < 1e-6 for shift in ("rotation", "contrast"))
    assert all(rows[shift, n]["holds"]["count"] == 0 for shift in ("rotation", "contrast") for n in (4, 14))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--seeds", "1", "--output", "x"], "--seeds 1: at least 2"), ([], "--output")],
)
def test_wrong_arguments_are_named(recipe, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["theory.py", *arguments])
    with pytest.raises(SystemExit):
        recipe.main()
    assert said in capsys.readouterr().err
