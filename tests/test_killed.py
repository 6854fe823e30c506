"""Runs that are killed (SIGKILL) and go on: byte for byte the adapter of one that was not; which checkpoint counts."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launching import run
from tiny import ConvNet, Rows
from torch import nn
from transformers import TrainerCallback, TrainerState

from peft_surgical.errors import ConfigError
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.trainer import MARK, last_checkpoint

pytestmark = pytest.mark.usefixtures("quick_collections", "own_accelerate_state")

METHODS = ("full", "auto-rgn", "gradual-first-last")
STEPS = 3  # of an epoch; there are three epochs


class Dropping(ConvNet):
    """With dropout, so that the state of the random numbers counts, too."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d)
        self.layer2.append(nn.Dropout(0.3))


def train(method, folder, processes=1, callbacks=(), stop_epoch=None):
    """One run, and its adapter in ``folder/adapter``."""
    torch.manual_seed(0)
    tuning, validation = Rows(24, 1), Rows(20, 2)
    settings = FitSettings(
        lr=0.05, epochs=3, batch_size=24 // STEPS // processes, weight_decay=0.1, lr_scheduler="cosine", use_cpu=True
    )
    found = fit(
        Dropping(),
        method,
        tuning,
        validation,
        settings,
        folder=folder / "checkpoints",
        callbacks=callbacks,
        stop_epoch=stop_epoch,
    )
    if os.environ.get("RANK", "0") == "0":
        found.model.save_pretrained(folder / "adapter")
    return found, len(tuning.drawn)


def content(folder):
    """File -> bytes of an adapter."""
    found = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= found.keys()
    return found


def names(folder):
    return {str(path.relative_to(folder)) for path in (folder / "checkpoints").rglob("*")}


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(rank, step, victim, method, folder, processes):
    train(method, folder, processes, [KillAt(step)] if rank == victim else [])


def whole_run(rank, method, folder, processes):
    train(method, folder, processes)


# --- in the middle of an epoch ---


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_within_an_epoch_ends_with_the_same_bytes(method, tmp_path):
    whole, drawn = train(method, tmp_path / "whole")
    assert run(killed_at, 2 * STEPS + 2, 0, method, tmp_path / "killed", 1) == [-signal.SIGKILL]
    assert last_checkpoint(tmp_path / "killed" / "checkpoints", 1)[1] == 2
    found, again = train(method, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert (found.curve, found.losses, found.record) == (whole.curve, whole.losses, whole.record)
    assert again <= drawn // 2 + 8  # of three epochs the last one alone, and what is read to see what can be cached
    assert names(tmp_path / "killed") == names(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_of_which_one_is_killed_end_with_the_same_bytes(method, tmp_path):
    assert run(whole_run, method, tmp_path / "whole", 2, processes=2) == [0, 0]
    first, second = run(killed_at, STEPS + 2, 1, method, tmp_path / "killed", 2, processes=2)
    assert second == -signal.SIGKILL
    assert first not in (0, None)  # it misses the other one
    assert last_checkpoint(tmp_path / "killed" / "checkpoints", 2)[1] == 1
    assert run(whole_run, method, tmp_path / "killed", 2, processes=2) == [0, 0]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


# --- while a checkpoint is written ---

WRITTEN = {
    "adapter_model.safetensors": (os, "replace"),
    "adapter_config.json": (os, "replace"),
    "training_args.bin": (torch, "save"),
    "optimizer.pt": (torch, "save"),
    "scheduler.pt": (torch, "save"),
    "rng_state.pth": (torch, "save"),
    "trainer_state.json": (TrainerState, "save_to_json"),
    MARK: (os, "replace"),
}


def killed_writing(rank, name, half, folder):
    """Killed before a file of the second checkpoint is there, or when half of it is."""
    owner, function = WRITTEN[name]
    original = getattr(owner, function)

    def deadly(*args, **kwargs):
        path = Path(args[-1])
        meant = path.name == name and path.parent.name == f"checkpoint-{2 * STEPS}"
        if half or not meant:
            original(*args, **kwargs)
        if meant:
            if half:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, function, deadly)
    train("full", folder)


def killed_deleting(rank, folder):
    """Killed when half of a checkpoint that is needed no longer is gone."""
    original = shutil.rmtree

    def deadly(path, *args, **kwargs):
        if Path(path).name.startswith("checkpoint-"):
            for file in sorted(Path(path).iterdir())[::2]:
                file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, *args, **kwargs)

    shutil.rmtree = deadly
    train("full", folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train("full", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half"),
    [(name, half) for name, (owner, _) in WRITTEN.items() for half in (False, True) if owner is not os or not half],
)
def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bytes(name, half, whole, tmp_path):
    assert run(killed_writing, name, half, tmp_path) == [-signal.SIGKILL]
    assert last_checkpoint(tmp_path / "checkpoints", 1)[1] == 1  # the one before counts
    train("full", tmp_path)
    assert content(tmp_path) == content(whole)
    assert names(tmp_path) == names(whole)  # nothing half-written is left


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_deletes_ends_with_the_same_bytes(whole, tmp_path):
    assert run(killed_deleting, tmp_path) == [-signal.SIGKILL]
    train("full", tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_checkpoint_for_which_there_is_no_room_is_an_error_in_words(tmp_path, monkeypatch):
    train("full", tmp_path / "whole", stop_epoch=2)

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 8192 vs 8080")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"no checkpoint can be written to .*checkpoints: free space on the disk"):
        train("full", tmp_path / "full")
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        train("full", tmp_path / "other")
    monkeypatch.undo()
    train("full", tmp_path / "full", stop_epoch=2)
    assert content(tmp_path / "full") == content(tmp_path / "whole")


# --- which checkpoint counts ---


def test_a_checkpoint_without_its_mark_is_passed_over(tmp_path):
    """As a process leaves it that was not the last to write."""
    train("full", tmp_path, stop_epoch=2)
    place, epochs = last_checkpoint(tmp_path / "checkpoints", 1)
    assert (Path(place).name, epochs) == (f"checkpoint-{2 * STEPS}", 2)
    (Path(place) / MARK).unlink()
    assert last_checkpoint(tmp_path / "checkpoints", 1)[1] == 1
    assert last_checkpoint(tmp_path / "nothing", 1) == (None, 0)


def test_checkpoints_of_something_else_are_refused_and_stay(tmp_path):
    """Trainer's, say: those that are needed no longer are removed when a run goes on."""
    (tmp_path / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir()
    with pytest.raises(ConfigError, match=r"checkpoints holds checkpoints of something else, .*: name another folder"):
        train("full", tmp_path)
    assert names(tmp_path) == {"checkpoints/checkpoint-7", "checkpoints/checkpoint-best"}
    (tmp_path / "checkpoints" / "checkpoint-7").rmdir()
    train("full", tmp_path, stop_epoch=1)
    assert (tmp_path / "checkpoints" / "checkpoint-best").is_dir()


def test_a_checkpoint_of_other_processes_is_refused(tmp_path):
    train("full", tmp_path, stop_epoch=1)
    mark = tmp_path / "checkpoints" / f"checkpoint-{STEPS}" / MARK
    assert json.loads(mark.read_text()) == {"processes": 1}
    mark.write_text('{"processes": 4}')
    with pytest.raises(
        ConfigError,
        match=r"checkpoint-3 was written by 4 process\(es\) .* by 1, .*or delete .*checkpoints to start again",
    ):
        train("full", tmp_path)


def test_the_best_epoch_is_found_again_where_its_folder_was_moved(tmp_path):
    whole, _ = train("full", tmp_path / "whole")
    best = whole.best_epoch
    assert best < 3
    train("full", tmp_path / "before", stop_epoch=best)
    (tmp_path / "before").rename(tmp_path / "after")
    found, _ = train("full", tmp_path / "after")
    assert found.best_epoch == best
    assert content(tmp_path / "after") == content(tmp_path / "whole")
