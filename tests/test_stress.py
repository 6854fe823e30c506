"""Short rounds of `benchmarks/stress.py`, which runs as long as asked, and that it would find something."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("PIL")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from scripts import script  # noqa: E402
from stressing import rounds, soak, things  # noqa: E402

pytestmark = [
    pytest.mark.skipif(things.CONTEXT.get_start_method() != "fork", reason="kills forked processes"),
    pytest.mark.filterwarnings("ignore"),  # Python's about forks
]


def done(name, tmp_path, **how):
    found = rounds.ROUNDS[name](0, tmp_path, **how)
    assert found["findings"] == []
    return found["counts"]


@pytest.mark.slow
def test_kills_of_a_save(tmp_path):
    assert done("saves", tmp_path, kills=2)["kills"] == 2


@pytest.mark.slow
def test_writers_of_one_ledger(tmp_path):
    assert done("ledger", tmp_path, writers=3, count=15)["runs appended"] > 30


@pytest.mark.slow
def test_writers_and_readers_of_one_folder(tmp_path):
    assert done("folder", tmp_path, seconds=5.0)["saves by 3 processes"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compares", "tunes"])
def test_kills_of_an_experiment(name, tmp_path):
    assert done(name, tmp_path, kills=2)["finished with the same bytes"] == 1


@pytest.mark.slow
def test_cells_that_need_too_much_memory(tmp_path):
    assert done("memory", tmp_path)["cells out of memory"] >= 1


@pytest.mark.slow
def test_processes_for_images_that_die(tmp_path):
    done("workers", tmp_path)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    counts = done("disk", tmp_path, saves=4)
    assert counts["saves on a full disk"] >= 1
    assert counts["tunes on a full disk"] == 1


def test_a_soak(tmp_path):
    found = rounds.soak(0, tmp_path, operations=12)
    assert (found["findings"], found["counts"]) == ([], {"loads, switches and unloads": 12})


def test_growth_is_measured_without_what_fills_caches():
    memory = [[x, 1e6 + (5e6 if x else 0) + 300 * x] for x in range(0, 1000, 10)]
    assert soak.slope(memory) == pytest.approx(300)
    assert soak.slope([[0, 5], [0, 5]]) == 0
    assert "6 MiB after 200 and 6 MiB after 990, +300 bytes for each" in soak.growth(memory)


@pytest.mark.slow
def test_what_is_lost_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "loaded", lambda folder: things.IMAGES)
    assert rounds.saves(0, tmp_path, kills=1)["findings"] == ["neither the old adapter nor the new one"]


def test_rounds_add_up(tmp_path, monkeypatch, capsys):
    stress = script("benchmarks", "stress.py")
    seeds = []

    def round_of(seed, place):
        """Something is promised."""
        seeds.append(seed)
        if seed == 1:
            raise KeyError("x")
        return {"counts": {"kills": 2}, "findings": []}

    monkeypatch.setattr(stress, "ROUNDS", {"saves": round_of})
    times = iter(range(0, 1000, 15))
    monkeypatch.setattr(stress.time, "monotonic", lambda: next(times))
    arguments = ["saves", "--minutes", "2", "--json", str(tmp_path / "s.json"), "--markdown", str(tmp_path / "s.md")]
    assert stress.main(arguments) == 1
    assert seeds[:3] == [0, 1, 2]
    assert "saves, round 1: KeyError: 'x'" in capsys.readouterr().out
    count = 2 * (len(seeds) - 1)
    assert f"| saves | Something is promised | kills {count} |" in (tmp_path / "s.md").read_text()
    before = len(seeds)
    assert stress.main([*arguments, "--minutes", "0.5"]) == 1
    assert seeds[before] == before
