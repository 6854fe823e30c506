"""What the texts show is what the committed results say."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_marked_table_is_as_measured():
    done = subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_number_is_noticed(tmp_path):
    for name in ("README.md", "docs/selection.md", "docs/tables.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    results = tmp_path / "docs/results"
    results.mkdir()
    for file in (ROOT / "docs/results").glob("*.md"):
        (results / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    table = results / "cifar10c-resnet26.md"
    table.write_text(table.read_text(encoding="utf-8").replace("| none | ", "| none | 1", 1), encoding="utf-8")
    check = [sys.executable, "docs/tables.py", "--check"]
    assert "README.md differs" in subprocess.run(check, cwd=tmp_path, capture_output=True, text=True).stdout
    assert subprocess.run(check[:-1], cwd=tmp_path, capture_output=True, check=True)
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 0


def test_no_module_imports_from_above_its_place_on_the_ladder():
    """CONTRIBUTING's table is the ladder; what is imported for annotations alone does not count."""
    table = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    level = {module: int(number) for number, row in table for module in re.findall(r"`(\w+)`", row)}
    package = ROOT / "src" / "peft_surgical"
    modules = {file.stem for file in package.glob("*.py")} - {"__init__", "__main__"} | {"commands"}
    assert modules == set(level)
    imports = {}
    for file in [*package.glob("*.py"), *package.glob("commands/*.py")]:
        name = file.stem if file.parent == package else "commands"
        if name in level:
            imports.setdefault(name, set()).update(imported_by(ast.parse(file.read_text(encoding="utf-8"))) & modules)
    wrong = [(a, b) for a, found in imports.items() for b in found - {a} if level[b] > level[a]]
    assert not wrong
    graphlib.TopologicalSorter({a: found - {a} for a, found in imports.items()}).prepare()  # raises for a cycle


def imported_by(tree):
    """Modules of the package that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return {
        name
        for node in found
        for name in ([node.module.split(".")[0]] if node.module else [a.name for a in node.names])
    }
