"""What the texts show is what the committed results say."""

import ast
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import script

from paper.choice_tables import TASKS, table
from peft_surgical.training.ledger import Ledger

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def summaries():
    return script("docs", "summaries.py")


def test_every_marked_table_is_as_measured():
    done = subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_number_is_noticed(tmp_path):
    pages = ("adaptation", "combining", "diagnose", "extract", "measured", "prefix", "selection", "tuner")
    for name in ("README.md", *(f"docs/{page}.md" for page in pages), "recipes/README.md", "docs/tables.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    results = tmp_path / "docs/results"
    results.mkdir()
    for file in (ROOT / "docs/results").glob("*.md"):
        (results / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    table = results / "cifar10c-resnet26.md"
    table.write_text(table.read_text(encoding="utf-8").replace("| none | ", "| none | 1", 1), encoding="utf-8")
    check = [sys.executable, "docs/tables.py", "--check"]
    assert "docs/measured.md differs" in subprocess.run(check, cwd=tmp_path, capture_output=True, text=True).stdout
    assert subprocess.run(check[:-1], cwd=tmp_path, capture_output=True, check=True)
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 0


def test_summaries_are_what_the_committed_ledgers_say(summaries):
    for name, summary in summaries.SUMMARIES.items():
        assert (ROOT / "docs/results" / name).read_text(encoding="utf-8") == summary(), f"run docs/summaries.py: {name}"


def test_the_plot_of_the_means_shows_every_method(summaries, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: shown.append(self.axes[0]))
    summaries.draw_means(tmp_path / "means.png")
    rows = [text.get_text() for text in shown[0].get_yticklabels()]
    assert sorted(row.split()[0] for row in rows) == sorted(set(summaries.METHODS) - {"none"})
    assert rows[-1].split(" (")[0] == "cross-val-wide"  # the most accurate stands on top


def test_the_figure_of_three_shifts_shows_what_the_tables_say(summaries, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: shown.extend(self.axes))
    summaries.draw_shifts(tmp_path / "shifts.png")

    def gain(name, row, column, before):
        """The bar's height by a table: one cell minus the one without tuning, of another row or column."""
        lines = (ROOT / "docs/results" / name).read_text(encoding="utf-8").splitlines()
        cells = [[text.strip() for text in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        table = {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells}
        found, start = table[row][column], table[before[0]][before[1]]
        return float(found.split()[0]) - float(start.split()[0])

    for place, target in enumerate(("block1", "block2", "block3", "head", "all")):
        expected = [
            gain("cifar10c-resnet26.md", target, "mean", ("none", "mean")),
            gain("synthetic-resnet26.md", "block2", target, ("block2", "none")),
            gain("compare-flip-resnet26.md", target, "mean", ("none", "mean")),
        ]
        heights = [axes.patches[place].get_height() for axes in shown]
        assert heights == pytest.approx(expected, abs=0.11)
    flip = [round(axes.get_height()) for axes in shown[2].patches]
    text = " ".join((ROOT / "docs/choosing.md").read_text(encoding="utf-8").split())
    assert f"`block1` gains {flip[0]} points and the head {flip[3]}" in text


def test_a_table_of_some_rows_has_only_these(tmp_path):
    tables = script("docs", "tables.py")
    found = tables.rows("docs/results/photographs.md", 1, "webcam").splitlines()
    assert found[0].startswith("| task |")
    assert found[2:]
    assert all(line.startswith("| webcam |") for line in found[2:])
    with pytest.raises(ValueError, match="no row that begins with 'nowhere'"):
        tables.rows("docs/results/photographs.md", 1, "nowhere")


def test_a_summary_equals_arithmetic_of_its_own(summaries):
    """Means over networks and corruptions by seed, then Student's t of two degrees of freedom, corrected."""
    lines = (ROOT / "docs/results/cifar10c.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [run for run in map(json.loads, lines) if run["key"]["tuning_images"] == 1000]

    def by_seed(chosen):
        found = [[r["result"]["test"] for r in runs if chosen(r["key"]) and r["key"]["seed"] == s] for s in range(3)]
        assert [len(tests) for tests in found] == [8, 8, 8]
        return [100 * statistics.fmean(tests) for tests in found]

    def shown(values, sign=""):
        return (
            f"{statistics.fmean(values):{sign}.1f} ± {4.302653 * statistics.stdev(values) * math.sqrt(1 / 3 + 0.8):.1f}"
        )

    own = by_seed(lambda key: key["method"] == "race" and key["task"] != "flip")
    before = by_seed(lambda key: key["method"] == "none" and key["task"] != "flip")
    rows = [[text.strip() for text in line.split("|")[1:-1]] for line in summaries.compare_means().splitlines()[:-2]]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows}
    assert table["race"]["both"] == shown(own)
    better = [float(table[name]["both"].split()[0]) for name in ("cross-val", "all")]
    assert float(table["none"]["minus all"].split()[0]) == pytest.approx(statistics.fmean(before) - better[1], abs=0.06)
    assert float(table["race"]["minus cross-val"].split()[0]) == pytest.approx(
        statistics.fmean(own) - better[0], abs=0.11
    )
    assert summaries.minus([0.5, 0.75, 0.5], [0.25, 0.25, 0.5]) == shown([25, 50, 0], "+")


def test_a_changed_run_and_a_missing_one_change_the_summary(summaries, tmp_path, monkeypatch):
    shutil.copy(ROOT / "docs/results/cifar10c.jsonl", tmp_path)
    monkeypatch.setattr(summaries, "RESULTS", tmp_path)
    ledger = tmp_path / "cifar10c.jsonl"
    runs = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    chosen = {"network": "resnet32", "method": "block1", "task": "pixelate", "norm_stats": "target", "seed": 1}
    (run,) = [run for run in runs if chosen.items() <= run["key"].items()]
    run["result"]["test"] -= 0.3
    ledger.write_text("".join(f"{json.dumps(run)}\n" for run in runs), encoding="utf-8")
    before = (ROOT / "docs/results/norm-policies.md").read_text(encoding="utf-8").splitlines()
    after = summaries.norm_policies().splitlines()
    changed = [new.split(" | ")[0] for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["| target", "| target minus frozen"]
    lines = ledger.read_text(encoding="utf-8").splitlines()
    left = [line for line in lines if '"method": "auto-rgn"' not in line or '"resnet32"' not in line]
    ledger.write_text("\n".join(left) + "\n", encoding="utf-8")
    assert "| auto-rgn |" not in summaries.compare_means()  # complete on one network only


def test_every_module_imports_only_from_those_before_it_on_the_ladder():
    """CONTRIBUTING's table is the ladder; what is imported for annotations alone does not count."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`(\w+)` )?\| (`.*?`) \| .* \|$", text, re.MULTILINE)
    ladder = [f"{folder}.{name}".strip(".") for folder, row in rows for name in re.findall(r"`(\w+)`", row)]
    files = {module_of(file): file for file in SOURCE.rglob("*.py") if file.name not in {"__init__.py", "__main__.py"}}
    assert sorted(ladder) == sorted(files)
    place = {name: number for number, name in enumerate(ladder)}
    wrong = {
        (name, found) for name, file in files.items() for found in imported_by(file) if place[found] >= place[name]
    }
    assert not wrong


def test_contributing_shows_both_houses_in_one_screen_and_the_package_imports_no_recipe():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text[text.index("**Two houses.**") : text.index("**Rules of the house**")]
    assert shown.count("\n") <= 40
    shared = {file.stem for file in (ROOT / "recipes" / "paper").glob("*.py")} - {"__init__"}
    (named,) = re.findall(r"for what they share \(([^)]*)\)", shown)
    assert set(re.findall(r"`(\w+)`", named)) == shared
    recipes = {file.stem for file in (ROOT / "recipes").glob("*.py")} | {"paper"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {module.partition(".")[0] for module in modules} & recipes, file


SOURCE = ROOT / "src"
PACKAGE = SOURCE / "peft_surgical"


def module_of(file):
    """A module's name on the ladder, where the package's own need no further name."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removeprefix("peft_surgical.")


def imported_by(file):
    """Modules of both packages that a file imports, wherever in it; a folder stands for what its __init__ imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if node.level else SOURCE
            folder = start.joinpath(*(node.module or "").split(".")).resolve()
            for module in [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]:
                if module.is_file() and module.is_relative_to(SOURCE):
                    found.add(module_of(module))
            if folder != PACKAGE and (folder / "__init__.py").is_file() and folder != file.parent:
                found |= imported_by(folder / "__init__.py")
    return found


def test_no_two_public_things_have_one_name():
    """Classes, functions, constants and aliases that a module defines, in both packages."""
    places = {}
    for file in SOURCE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for name in names_defined(node):
                if not name.startswith("_"):
                    places.setdefault(name, set()).add(module_of(file))
    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}


def names_defined(node):
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_the_tables_of_photographs_are_drawn_from_the_committed_rows():
    rows = Ledger(ROOT / "docs/results/photographs.jsonl").runs()
    drawn = table(rows, tuple(TASKS), (5, 20), (0, 1, 2))
    text = "\n".join(found.markdown() for found in drawn)
    assert text == (ROOT / "docs/results/photographs.md").read_text(encoding="utf-8")
