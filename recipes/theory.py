"""When does tuning one block help? The claims of Lee et al. (2023), Sec. 3, on networks f(x) = v phi(B x).

::

    python recipes/theory.py --output docs/results

Block `block1` is B (k x d, the paper's first layer), `head` is v. The pretrained network (B0, v0) has no source loss.
In our words, the paper claims:

- Proposition 1: if x_target = A x_source, A invertible, some B has no target loss; there are cases where no v has.
- Proposition 2: if y_target = t y_source, some v has no target loss; there are cases (ReLU) where no B has.
- Theorem 1 (phi linear): there are d, k, distributions and n such that, with high probability over n target samples,
  gradient flow on B from (B0, v0) ends at zero target loss, and on B and v together it is never there.

They say what can happen. The cases here are ours, but for the last one, and some show where a claim ends. Losses are
over all of the target, in closed form and relative to E[y^2]: 1 is what predicting 0 costs. Expect (200 draws, 95%
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

Theorem 1 in the construction of its proof (A.2, k = 1): the source is Gaussian on 20 of 24 dimensions, the target is
half that and half Gaussian on 2 orthogonal ones, labels are w x throughout. Mean loss of block1 / all, and in which %
of the draws the theorem holds (block1 ends at zero, all is never there):

    n = 4: 0.043 / 0.047, 55     8: 0.0018 / 0.0055, 86     12: 4e-05 / 0.003, 97     20: 0 / 0.0018, 100
    n = 40, where the sample spans the source: 0 / 9e-05, 38
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from paper.linear_theory import (
    CASES,
    MARGIN,
    MIXTURE,
    MIXTURE_SAMPLES,
    PROPOSITIONS,
    SAMPLES,
    SHIFTS,
    TARGETS,
    THEOREM,
    ZERO,
    mixture,
    proposition,
    theorem,
)
from peft_surgical.errors import run_in_words
from peft_surgical.evaluation import TextTable


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
    for line, r in zip(_lines(report["theorem"]), report["theorem"], strict=True):
        two.append([r["shift"], str(r["n"]), *line])
    three = [["n", *TARGETS, "lower, %: block1 / all", "block1 zero, all never, %"]]
    for line, r in zip(_lines(report["mixture"]), report["mixture"], strict=True):
        three.append([str(r["n"]), *line])
    return {
        "Propositions 1 and 2": one,
        "Theorem 1, by number n of target samples": two,
        "Theorem 1 in the paper's own construction (A.2)": three,
    }


def _lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    found = []
    for r in rows:
        lower = " / ".join(f"{100 * r[f'{target} lower']['value']:.0f}" for target in ("block1", "all"))
        found.append([*(number(r["losses"][t]) for t in TARGETS), lower, percent(r["holds"])])
    return found


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


def notes(report: dict[str, Any]) -> list[str]:
    """What the tables hold, and what they say."""
    settings, theorem1 = report["settings"], report["theorem"]
    count, cases = settings["seeds"], [*theorem1, *report["mixture"]]
    return [
        "Loss over all of the target relative to E[y^2]: mean ± half its 95% t interval over draws (seeds 0 to "
        f"{count - 1}); median. Up to {ZERO:g} it is written 0. Shares of draws with Wilson's 95% interval. L-BFGS: "
        f"{settings['lbfgs_iterations']} steps through PEFT on 500 target samples, the first {settings['searched']} "
        f"draws. Losses within {MARGIN:g} are equal. Descent came to its end, a gradient of 1e-9, in "
        f"{sum(r['ended']['count'] for r in cases)} of {count * len(cases)} cases; what the others leave is of descent "
        "cut short, and they do not count for Theorem 1.",
        "",
        *(f"- {verdict(shift, [r for r in theorem1 if r['shift'] == shift])}" for shift in SHIFTS),
        "- " + verdict("The paper's own construction (A.2)", report["mixture"]),
    ]


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
            "mixture": MIXTURE,
            "zero": ZERO,
            "versions": {name: version(name) for name in ("torch", "peft", "peft-surgical")},
        },
        "propositions": [proposition(case, seeds, searched, iterations) for case in CASES],
        "theorem": [row for shift in SHIFTS for row in theorem(shift, seeds, sizes, steps)],
        "mixture": mixture(seeds, (8, 12) if args.quick else MIXTURE_SAMPLES, steps),
    }
    report["cpu_s"] = round(time.process_time() - start, 1)

    for title, (columns, *rows) in tables(report).items():
        TextTable(columns, rows).show(title=title)
    console.print(*notes(report), sep="\n", markup=False, highlight=False)
    args.output.mkdir(parents=True, exist_ok=True)
    shown = [TextTable(columns, rows).markdown() for columns, *rows in tables(report).values()]
    (args.output / "theory.md").write_text("\n".join([*shown, *notes(report), ""]), encoding="utf-8")
    (args.output / "theory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, args.output / "theory.png")
    console.print(f"{report['cpu_s']:.0f} s of CPU time. Written to {args.output}: theory.json, theory.md, theory.png")


if __name__ == "__main__":
    sys.exit(run_in_words(main))
