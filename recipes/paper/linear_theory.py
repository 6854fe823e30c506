"""Networks f(x) = v phi(B x), their shifted targets, and what tuning B, v or both can reach: ``recipes/theory.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_surgical import SurgicalConfig
from peft_surgical.evaluation import mean_interval, wilson_interval

ZERO = 1e-9  # a relative loss up to here counts as none: rounding leaves 1e-15, gradient descent 1e-11
MARGIN = 1e-6  # losses that differ by less count as equal: so much is left where descent is cut short
TARGETS = ("none", "block1", "head", "all")
CASES = {"input": 1, "contrast": 1, "flip": 2, "flip, both signs": 2}  # and the proposition each belongs to
SHIFTS = ("local", "rotation", "contrast")
SAMPLES = (2, 4, 7, 10, 14, 18, 24, 30, 40, 80)
PROPOSITIONS, THEOREM = {"k": 4, "d": 10}, {"k": 10, "d": 20}
MIXTURE = {"k": 1, "d": 24, "source": 20, "orthogonal": 2}
"""The paper's construction (A.2): dimensions of features and input, and of the two subspaces that inputs come from."""
MIXTURE_SAMPLES = (4, 8, 12, 16, 20, 40)


class Network(nn.Module):
    """f(x) = v phi(B x) for inputs (n, d), with B (k, d) and v (k,)."""

    def __init__(self, first: Tensor, head: Tensor, phi: nn.Module):
        super().__init__()
        self.phi = phi
        self.first = nn.Linear(first.shape[1], first.shape[0], bias=False)
        self.last = nn.Linear(len(head), 1, bias=False)
        self.first.weight, self.last.weight = nn.Parameter(first.clone()), nn.Parameter(head[None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n,)."""
        return self.last(self.phi(self.first(x))).squeeze(-1)


def tunable(network: Network, target: str) -> nn.Module:
    """All there is to it: the network, what is its block and what its head, and which of them to tune."""
    return get_peft_model(network, SurgicalConfig(target=target, blocks={"block1": ["first"], "head": ["last"]}))


def relu_products(p: Tensor, q: Tensor) -> Tensor:
    """E[relu(p_i z) relu(q_j z)] over z ~ N(0, I), for rows of (a, d) and (b, d): Cho & Saul (2009), order 1."""
    norms = p.norm(dim=1)[:, None] * q.norm(dim=1)
    cosine = (p @ q.T / norms.clamp_min(1e-300)).clamp(-1, 1)
    return norms * ((1 - cosine**2).sqrt() + (math.pi - cosine.arccos()) * cosine) / (2 * math.pi)


@dataclass(frozen=True)
class Task:
    """A pretrained ReLU network (``first``, ``head``) and its target: inputs ``shift @ z``, labels ``t`` times f(z)."""

    first: Tensor
    head: Tensor
    shift: Tensor
    t: float

    def loss(self, first: Tensor, head: Tensor) -> float:
        """Relative loss over all of the target, z ~ N(0, I)."""
        rows, weights = torch.cat([first @ self.shift, self.first]), torch.cat([head, -self.t * self.head])
        labels = self.t**2 * self.head @ relu_products(self.first, self.first) @ self.head
        return max(0.0, float(weights @ relu_products(rows, rows) @ weights / labels))

    def best_head(self) -> Tensor:
        """Least squares over all of the target: with this B, no v has less loss."""
        rows = self.first @ self.shift
        labels = self.t * relu_products(rows, self.first) @ self.head
        return torch.linalg.solve(relu_products(rows, rows), labels)

    def best_first(self) -> Tensor:
        """With this v, no B has less loss: it has none, or that of B = 0 where no output can have a label's sign."""
        back = self.first @ torch.linalg.inv(self.shift)
        if self.t > 0:
            return self.t * back
        if (self.head > 0).all():
            return torch.zeros_like(back)
        pairs = self.head.unflatten(0, (-1, 2))
        if not (pairs.prod(1) < 0).all():
            raise ValueError(
                f"no best B is known for t = {self.t} and a head not of (+, -) pairs: {self.head.tolist()}"
            )
        ratio = (self.t * pairs.flip(1) / pairs).reshape(-1, 1)
        return ratio * back.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def draw_task(case: str, seed: int) -> Task:
    (k, d), g = PROPOSITIONS.values(), torch.Generator().manual_seed(seed)
    first, head = torch.randn(k, d, generator=g) / d**0.5, torch.randn(k, generator=g)
    if case == "input":
        return Task(first, head, torch.randn(d, d, generator=g) / d**0.5, 1.0)
    if case == "contrast":
        return Task(first, head, 2 * torch.eye(d), 1.0)
    signs = torch.tensor({"flip": [1.0, 1.0], "flip, both signs": [1.0, -1.0]}[case]).repeat(k // 2)
    return Task(first, head.abs() * signs, torch.eye(d), -1.0)


def search(task: Task, target: str, seed: int, iterations: int) -> float:
    """Loss over all of the target after L-BFGS from the pretrained weights, on 500 target samples."""
    z = torch.randn(500, task.first.shape[1], generator=torch.Generator().manual_seed(10_000 + seed))
    labels = task.t * Network(task.first, task.head, nn.ReLU())(z).detach()
    model: Any = tunable(Network(task.first, task.head, nn.ReLU()), target)
    tuned = [p for p in model.parameters() if p.requires_grad]
    fine: dict[str, Any] = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    lbfgs = torch.optim.LBFGS(tuned, max_iter=iterations, history_size=50, **fine)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = (model(z @ task.shift.T) - labels).square().mean() / labels.square().mean()
        loss.backward()
        return loss

    lbfgs.step(closure)
    network = model.merge_and_unload()
    return task.loss(network.first.weight.detach(), network.last.weight.detach()[0])


def summary(values: Tensor) -> dict[str, float]:
    """Mean with its 95% t interval over draws, median, and what 5% and 95% of the draws are below."""
    q05, median, q95 = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    mean, low, high = mean_interval(values.tolist())
    return {"mean": mean, "low": low, "high": high, "q05": q05, "median": median, "q95": q95}


def share(true: Tensor) -> dict[str, float]:
    """How often, with Wilson's 95% interval."""
    return {"count": int(true.sum()), "draws": len(true), **wilson_interval(int(true.sum()), len(true))._asdict()}


def proposition(case: str, seeds: Sequence[int], searched: int, iterations: int) -> dict[str, Any]:
    """The least losses there are by target, and what L-BFGS finds in the first ``searched`` draws."""
    tasks = [draw_task(case, seed) for seed in seeds]
    none = torch.tensor([task.loss(task.first, task.head) for task in tasks])
    block1 = torch.tensor([task.loss(task.best_first(), task.head) for task in tasks])
    head = torch.tensor([task.loss(task.first, task.best_head()) for task in tasks])
    least = {"none": none, "block1": block1, "head": head, "all": torch.minimum(block1, head)}  # all can do either
    found = {
        target: torch.tensor([search(tasks[i], target, seeds[i], iterations) for i in range(min(searched, len(seeds)))])
        for target in ("block1", "all")
    }
    can, cannot = (block1, head) if CASES[case] == 1 else (head, block1)
    return {
        "case": case,
        "proposition": CASES[case],
        "losses": {target: summary(values) for target, values in least.items()},
        "found": {target: {**summary(values), "zero": share(values <= ZERO)} for target, values in found.items()},
        "holds": share((can <= ZERO) & (cannot > ZERO)),
    }


def descend(
    first: Tensor, head: Tensor, gram: Tensor, wanted: Tensor, covariance: Tensor, target: str, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient descent on S linear networks at once, each at its own learning rate, until its gradient is 1e-9.

    Args:
        first: (S, k, d), where it starts.
        head: (S, k).
        gram: X^T X / n (S, d, d) of the target inputs; the objective is half the mean squared error on them.
        wanted: (S, d), the product v B that makes no error.
        covariance: (S, d, d) of all target inputs.
        target: ``block1`` or ``all``.
        steps: At most so many.

    Returns:
        first and head at the end, the lowest E[error^2] over all target inputs on the way (S,), and whether the
        gradient became that small (S,).

    Raises:
        FloatingPointError: If one of them diverges.
    """
    first, head, active = first.clone(), head.clone(), torch.arange(len(head))
    lowest = torch.full((len(head),), math.inf)
    rate = 0.5 / (torch.linalg.eigvalsh(gram)[:, -1] * (head.square().sum(1) + torch.linalg.matrix_norm(first, 2) ** 2))
    for _ in range(0, steps, 500):
        b, v, g, w, c, low, eta = (part[active] for part in (first, head, gram, wanted, covariance, lowest, rate))
        for _ in range(500):
            error = (v[:, None] @ b).squeeze(1) - w
            low = torch.minimum(low, ((error[:, None] @ c).squeeze(1) * error).sum(1))
            slope = (g @ error[:, :, None]).squeeze(2)
            step = eta[:, None] * slope
            b, v = b - v[:, :, None] * step[:, None], v - (b @ step[:, :, None]).squeeze(2) if target == "all" else v
        if not (finite := b.flatten(1).isfinite().all(1)).all():
            raise FloatingPointError(f"descent on {target} diverges at a learning rate of {float(eta[~finite][0]):.3g}")
        first[active], head[active], lowest[active] = b, v, low
        active = active[slope.norm(dim=1) > 1e-9]
        if not len(active):
            break
    return first, head, lowest, ~torch.isin(torch.arange(len(head)), active)


def draw_linear(shift: str, seed: int) -> tuple[Tensor, ...]:
    """First and head to pretrain from, the source's w, target inputs (n, d), A, and the covariance of source inputs."""
    (k, d), g = THEOREM.values(), torch.Generator().manual_seed(seed)
    first, head = torch.randn(k, d, generator=g) / d**0.5, torch.randn(k, generator=g) / k**0.5
    w, mix = nn.functional.normalize(torch.randn(d, generator=g), dim=0), torch.randn(d, d, generator=g) / d**0.5
    if shift == "local":
        often = torch.tensor([0.25] * 2 + [0.5 / (d - 2)] * (d - 2))
        x = torch.eye(d)[often.multinomial(max(SAMPLES), replacement=True, generator=g)]
        a, source = torch.tensor([-1.0] * 2 + [1.0] * (d - 2)).diag(), often.diag()
    else:
        x, source = torch.randn(max(SAMPLES), d, generator=g), torch.eye(d)
        a = 2 * torch.eye(d) if shift == "contrast" else torch.linalg.matrix_exp(0.5 * (mix - mix.T))
    return first, head, w, x @ a.T, a, source


def theorem(shift: str, seeds: Sequence[int], sizes: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """By number of target samples: the losses where descent ends, and in how many draws the theorem holds."""
    drawn = zip(*(draw_linear(shift, seed) for seed in seeds), strict=True)
    first, head, w, x, a, source = (torch.stack(part) for part in drawn)
    eye = torch.eye(THEOREM["d"]).expand_as(a)
    first, head, _, ended = descend(first, head, eye, w, eye, "all", steps)
    if not ended.all():
        raise RuntimeError(
            f"pretraining is not at its end after {steps} steps in {int((~ended).sum())} of {len(ended)} draws"
        )
    wanted, covariance = torch.linalg.solve(a.mT, w), a @ source @ a.mT
    labels = torch.einsum("si,sij,sj->s", w, source, w)
    return _fine_tuned(shift, sizes, steps, first, head, x, wanted, covariance, labels)


def draw_mixture(seed: int) -> tuple[Tensor, ...]:
    """First and head to pretrain from, w, target inputs (n, d), and the covariances of source and target inputs.

    The paper's A.2: the source is Gaussian on a subspace; the target is, with equal chance, the source or Gaussian on a
    subspace orthogonal to it; the labels w x are the same function in both. Nothing is drawn outside of the two.
    """
    k, d, of_source, orthogonal = MIXTURE.values()
    g = torch.Generator().manual_seed(seed)
    first, head = torch.randn(k, d, generator=g) / d**0.5, torch.randn(k, generator=g)
    w = nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    spaces = basis[:, :of_source], basis[:, of_source : of_source + orthogonal]
    count = max(MIXTURE_SAMPLES)
    drawn = [torch.randn(count, space.shape[1], generator=g) @ space.T for space in spaces]
    x = torch.where(torch.rand(count, 1, generator=g) < 0.5, drawn[0], drawn[1])
    source, other = (space @ space.T for space in spaces)
    return first, head, w, x, source, (source + other) / 2


def mixture(seeds: Sequence[int], sizes: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Theorem 1 in the construction of its proof, as `theorem`; pretraining is descent on the source."""
    drawn = zip(*(draw_mixture(seed) for seed in seeds), strict=True)
    first, head, w, x, source, target = (torch.stack(part) for part in drawn)
    first, head, _, ended = descend(first, head, source, w, source, "all", steps)
    if not ended.all():
        raise RuntimeError(
            f"pretraining is not at its end after {steps} steps in {int((~ended).sum())} of {len(ended)} draws"
        )
    labels = torch.einsum("si,sij,sj->s", w, target, w)
    return _fine_tuned("mixture", sizes, steps, first, head, x, w, target, labels)


def _fine_tuned(
    shift: str,
    sizes: Sequence[int],
    steps: int,
    first: Tensor,
    head: Tensor,
    x: Tensor,
    wanted: Tensor,
    covariance: Tensor,
    labels: Tensor,
) -> list[dict[str, Any]]:
    """By number of target samples: where descent from the pretrained (first, head) ends, and what it leaves."""
    gram = torch.cat([x[:, :n].mT @ x[:, :n] / n for n in sizes])  # one axis for sizes and draws
    first, head, wanted, covariance, labels = (
        torch.cat([part] * len(sizes)) for part in (first, head, wanted, covariance, labels)
    )

    def loss(b: Tensor, v: Tensor) -> Tensor:
        error = (v[:, None] @ b).squeeze(1) - wanted
        return torch.einsum("si,sij,sj->s", error, covariance, error) / labels

    # Where descent on v alone ends: least squares on the samples, with the least change.
    fit = torch.linalg.pinv(first @ gram @ first.mT, rtol=1e-10, hermitian=True) @ first @ gram
    moved = head + (fit @ (wanted - (head[:, None] @ first).squeeze(1))[:, :, None]).squeeze(2)
    *one, _, ended_one = descend(first, head, gram, wanted, covariance, "block1", steps)
    *both, lowest, ended_both = descend(first, head, gram, wanted, covariance, "all", steps)
    losses = (loss(first, head), loss(*one), loss(first, moved), loss(*both), lowest / labels)
    rows = []
    for i, n in enumerate(sizes):
        none, block1, last, everything, low = (part.unflatten(0, (len(sizes), -1))[i] for part in losses)
        ended = (ended_one & ended_both).unflatten(0, (len(sizes), -1))[i]
        row = {"none": none, "block1": block1, "head": last, "all": everything, "all, lowest on the way": low}
        rows.append(
            {
                "shift": shift,
                "n": n,
                "losses": {name: summary(values) for name, values in row.items()},
                "all minus block1": summary(everything - block1),
                "ended": share(ended),
                "block1 lower": share(everything - block1 > MARGIN),
                "all lower": share(block1 - everything > MARGIN),
                "holds": share(ended & (block1 <= ZERO) & (low > ZERO)),
            }
        )
    return rows
