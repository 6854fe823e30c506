"""The benchmark of adaptation: one tiny run, and its check that both methods do the same work."""

from pathlib import Path

import pytest
import torch
from scripts import script

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("benchmarks", "adaptation.py")


def test_a_tiny_run(benchmark, tmp_path):
    file = tmp_path / "speed.md"
    benchmark.main(["--targets", "head", "--views", "2", "--images", "1", "--rounds", "1", "--markdown", str(file)])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in file.read_text().splitlines()[:6]]
    assert lines[0] == benchmark.HEADER
    assert [line[:2] for line in lines[2:]] == [[t, m] for m in ("online", "episodic") for t in ("head", "all")]
    assert all(
        line[3] == "1.00 (0.00 to inf)" for line in lines[2:] if line[0] == "all"
    )  # itself; one round is no interval


def test_methods_that_do_other_work_are_not_compared(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "by_hand", lambda *arguments: lambda images: torch.ones(len(images), 10))
    with pytest.raises(RuntimeError, match="all: ours and hand differ"):
        benchmark.measure(["all"], False, 2, 1, 1)
