"""When does tuning one block help? The claims of Lee et al. (2023), Sec. 3, on networks f(x) = v phi(B x).

::

    python recipes/theory.py --output docs/results

Block `block1` is B (k x d, the paper's first layer), `head` is v. The pretrained network (B0, v0) has no source loss.
In our words, the paper claims:

- Proposition 1: if x_target = A x_source, A invertible, some B has no target loss; there are cases where no v has.
- Proposition 2: if y_target = t y_source, some v has no target loss; there are cases (ReLU) where no B has.
- Theorem 1 (phi linear): there are d, k, distributions and n such that, with high probability over n target samples,
  gradient flow on B from (B0, v0) ends at zero target loss, and on B and v together it is never there.

They say what can happen. The cases here are ours, not the paper's, and some show where a claim ends. Losses are over
all of the target, in closed form and relative to E[y^2]: 1 is what predicting 0 costs. Expect (200 draws, 95%
intervals, 130 s on one CPU core):

    least loss        input: A Gaussian   contrast: A = 2   flip: t = -1, v0 > 0   t = -1, v0 of both signs
    none              1.5 ± 0.09          1                 4                      4
    block1            0                   0                 1                      0
    head              0.68 ± 0.02         0                 0                      0
    claim holds, %    100 (98 to 100)     0 (0 to 2)        100 (98 to 100)        0 (0 to 2)

The best v is least squares. The best B is B0 A^-1; where v0 > 0 and no label is positive, it is B = 0; where half of v0
is negative, B swaps the halves. A factor such as A = 2 passes through ReLU on to v. What exists need not be found: on
`input`, L-BFGS from (B0, v0), 400 steps through PEFT, ends at zero in 9 of 20 draws with block1 and in 2 with all.

Theorem 1, d = 20, k = 10, gradient descent in place of the flow (in 10 draws at n = 4 and 10, a tenth of the learning
rate moved mean losses by up to 6%). Mean loss of block1 / all, and in which % of the draws each is the lower by 1e-6:

    n     local                          rotation                         contrast: A = 2
    4     0.55 / 0.56, lower 76 / 20     0.35 / 0.36, lower 64 / 36       0.79 / 0.67, lower 8 / 92
    10    0.12 / 0.14, lower 96 / 4      0.23 / 0.25, lower 70 / 30       0.50 / 0.32, lower 2 / 98
    18    0 / 0.019, lower 100 / 0       0.043 / 0.049, lower 55 / 46     0.096 / 0.035, lower 4 / 96
    40    0 / 0.0093, lower 100 / 0      0 / 0                            0 / 0

- `local`, a case of the theorem: x is a coordinate vector, A flips two of them, half of all x. Both are in the sample
  with probability 1 - 2 (3/4)^n + (1/2)^n. Tuning B then mends them and touches no other. Tuning B and v moves v, which
  spoils the coordinates that are not in the sample, at least d - n of them.
- `rotation`: x is Gaussian, A a random rotation. All directions shift, so neither is at zero while n < d; block1 is
  better in most draws, by little. `contrast`: what should change is in reach of v, and the order is reversed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn

from peft_surgical import SurgicalConfig
from peft_surgical.errors import run_in_words
from peft_surgical.evaluation import TextTable, mean_interval, wilson_interval

ZERO = 1e-9  # a relative loss up to here counts as none: rounding leaves 1e-15, gradient descent 1e-11
MARGIN = 1e-6  # losses that differ by less count as equal: so much is left where descent is cut short
TARGETS = ("none", "block1", "head", "all")
CASES = {"input": 1, "contrast": 1, "flip": 2, "flip, both signs": 2}  # and the proposition each belongs to
SHIFTS = ("local", "rotation", "contrast")
SAMPLES = (2, 4, 7, 10, 14, 18, 24, 30, 40, 80)
PROPOSITIONS, THEOREM = {"k": 4, "d": 10}, {"k": 10, "d": 20}


class Network(nn.Module):
    """f(x) = v phi(B x) for inputs (n, d), with B (k, d) and v (k,)."""

    def __init__(self, first: Tensor, head: Tensor, phi: nn.Module):
        super().__init__()
        self.phi = phi
        self.first, self.last = nn.Linear(*first.T.shape, bias=False), nn.Linear(len(head), 1, bias=False)
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
    model = tunable(Network(task.first, task.head, nn.ReLU()), target)
    tuned = [p for p in model.parameters() if p.requires_grad]
    fine = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
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
    gram = torch.cat([x[:, :n].mT @ x[:, :n] / n for n in sizes])  # one axis for sizes and draws
    first, head, w, a, source = (torch.cat([part] * len(sizes)) for part in (first, head, w, a, source))
    wanted, covariance = torch.linalg.solve(a.mT, w), a @ source @ a.mT
    labels = torch.einsum("si,sij,sj->s", w, source, w)

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


def number(s: dict[str, float]) -> str:
    return f"{s['mean']:.2g} ± {(s['high'] - s['low']) / 2:.2g}; {s['median']:.2g}" if s["mean"] > ZERO else "0"


def percent(s: dict[str, float]) -> str:
    return f"{100 * s['value']:.0f} ({100 * s['low']:.0f} to {100 * s['high']:.0f})"


def tables(report: dict[str, Any]) -> dict[str, list[list[str]]]:
    """By title, rows of cells; the first row names the columns."""
    cases = report["propositions"]
    one = [["least loss there is", *(f"{r['case']} (Prop. {r['proposition']})" for r in cases)]]
    one += [[target, *(number(r["losses"][target]) for r in cases)] for target in TARGETS]
    for t in ("block1", "all"):
        found = [r["found"][t] for r in cases]
        one.append([f"{t}, L-BFGS: median", *(f"{s['median']:.1g}" if s["median"] > ZERO else "0" for s in found)])
        one.append([f"{t}, L-BFGS: zero, %", *(percent(s["zero"]) for s in found)])
    one.append(["claim holds, %", *(percent(r["holds"]) for r in cases)])
    two = [["shift", "n", *TARGETS, "lower, %: block1 / all", "block1 zero, all never, %"]]
    for r in report["theorem"]:
        lower = " / ".join(f"{100 * r[f'{target} lower']['value']:.0f}" for target in ("block1", "all"))
        two.append([r["shift"], str(r["n"]), *(number(r["losses"][t]) for t in TARGETS), lower, percent(r["holds"])])
    return {"Propositions 1 and 2": one, "Theorem 1, by number n of target samples": two}


def verdict(shift: str, rows: Sequence[dict[str, Any]]) -> str:
    """Where tuning block1 is better than tuning all and where it is worse."""
    n = {t: ", ".join(str(r["n"]) for r in rows if r[f"{t} lower"]["low"] > 0.5) for t in ("block1", "all")}
    best = max(rows, key=lambda r: (r["holds"]["count"], -r["n"]))
    seen = f"most often at n = {best['n']}, in {percent(best['holds'])}%" if best["holds"]["count"] else "in none"
    return (
        f"{shift}: with block1 the loss is lower in more than half of the draws (interval above 50%) at n = "
        f"{n['block1'] or 'none'}; with all, at n = {n['all'] or 'none'}. As in Theorem 1, block1 ends at zero and all "
        f"is never there, {seen} of the draws."
    )


def plot(report: dict[str, Any], file: Path) -> None:
    """A panel per claim; the propositions' show medians and what 5% and 95% of the draws are below."""
    figure, colours = Figure(figsize=(15, 5), layout="constrained"), ("#4c72b0", "#dd8452", "#55a868")
    panels = figure.subplots(1, 3)
    for r, colour, aside in zip(report["propositions"], colours[:2] * 2, (-0.15, 0.15) * 2, strict=True):
        panel = panels[r["proposition"] - 1]
        for name, shown, mark in (("least", r["losses"], "o"), ("found by L-BFGS", r["found"], "x")):
            low, mid, high = (
                torch.tensor([s[q] for s in shown.values()]).clamp(1e-16) for q in ("q05", "median", "q95")
            )
            places = [TARGETS.index(target) + aside + 0.08 * (mark == "x") for target in shown]
            ends = torch.stack([mid - low, high - mid]).numpy()
            panel.errorbar(places, mid, ends, fmt=mark, color=colour, capsize=2, label=f"{r['case']}, {name}")
        panel.set(yscale="log", ylabel="target loss (1e-16: none)", title=f"Proposition {r['proposition']}, median")
        panel.set_xticks(range(len(TARGETS)), TARGETS)
    for shift, colour in zip(SHIFTS, colours, strict=True):
        rows = [r for r in report["theorem"] if r["shift"] == shift]
        for target, line in (("block1", "-"), ("all", "--")):
            n, losses = [r["n"] for r in rows], [r["losses"][target] for r in rows]
            mean, low, high = ([max(loss[end], 1e-5) for loss in losses] for end in ("mean", "low", "high"))
            panels[2].plot(n, mean, line, color=colour, label=f"{shift}, {target}")
            panels[2].fill_between(n, low, high, color=colour, alpha=0.2, linewidth=0)
    panels[2].axvline(THEOREM["d"], color="black", linestyle=":", linewidth=1, label="n = d")
    panels[2].set(xscale="log", yscale="log", ylim=(1e-4, 3), xlabel="target samples n", title="Theorem 1, mean")
    panels[2].minorticks_off()
    panels[2].set_xticks(SAMPLES, SAMPLES, fontsize=8)
    for panel in panels:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for theory.json, theory.md and theory.png")
    parser.add_argument("--seeds", type=int, default=200, help="draws of network, shift and samples (default: 200)")
    parser.add_argument("--quick", action="store_true", help="seconds: 10 draws, three sizes, fewer steps")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: at least 2, one draw has no spread")
    start, console = time.process_time(), Console()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    count, searched, iterations, steps = (10, 2, 60, 3000) if args.quick else (args.seeds, 20, 400, 30_000)
    seeds, sizes = range(count), (4, 14, 40) if args.quick else SAMPLES
    report: dict[str, Any] = {
        "settings": {
            "seeds": count,
            "searched": min(searched, count),
            "lbfgs_iterations": iterations,
            "descent_steps": steps,
            "samples": list(sizes),
            "propositions": PROPOSITIONS,
            "theorem": THEOREM,
            "zero": ZERO,
            "versions": {name: version(name) for name in ("torch", "peft", "peft-surgical")},
        },
        "propositions": [proposition(case, seeds, searched, iterations) for case in CASES],
        "theorem": [row for shift in SHIFTS for row in theorem(shift, seeds, sizes, steps)],
    }
    report["cpu_s"] = round(time.process_time() - start, 1)

    text = []
    for title, (columns, *rows) in tables(report).items():
        table = TextTable(columns, rows)
        table.show(title=title)
        text.append(table.markdown())
    ended = sum(r["ended"]["count"] for r in report["theorem"])
    text += [
        "Loss over all of the target relative to E[y^2]: mean ± half its 95% t interval over draws (seeds 0 to "
        f"{count - 1}); median. Up to {ZERO:g} it is written 0. Shares of draws with Wilson's 95% interval. L-BFGS: "
        f"{iterations} steps through PEFT on 500 target samples, the first {min(searched, count)} draws. Losses within "
        f"{MARGIN:g} are equal. Descent came to its end, a gradient of 1e-9, in {ended} of "
        f"{count * len(report['theorem'])} cases; what the others leave is of descent cut short, and they do not count "
        "for Theorem 1.",
        "",
        *(f"- {verdict(shift, [r for r in report['theorem'] if r['shift'] == shift])}" for shift in SHIFTS),
    ]
    console.print(*text[-5:], sep="\n", markup=False, highlight=False)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "theory.md").write_text("\n".join([*text, ""]), encoding="utf-8")
    (args.output / "theory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, args.output / "theory.png")
    console.print(f"{report['cpu_s']:.0f} s of CPU time. Written to {args.output}: theory.json, theory.md, theory.png")


if __name__ == "__main__":
    sys.exit(run_in_words(main))
