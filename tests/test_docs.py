"""What the texts show is what the committed results say."""

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
