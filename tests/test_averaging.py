"""The mean of the weights at the ends of the last epochs: by hand, and in runs that were killed."""

import pytest
import torch
from tiny import Rows, used_batchnorm
from transformers import TrainerCallback

from peft_surgical.errors import ConfigError
from peft_surgical.training import fitting
from peft_surgical.training.averaging import MeanOfLastEpochs
from peft_surgical.training.fitting import FitSettings, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*no accelerator is found.*")
EPOCHS = 5
SETTINGS = FitSettings(1e-2, epochs=EPOCHS, batch_size=8, use_cpu=True)


class Ends(TrainerCallback):
    """Keeps the trained weights at the end of each epoch; raises after a step."""

    def __init__(self, kill=None):
        self.kill, self.weights = kill, []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.kill:
            raise KeyboardInterrupt


def averaged(folder=None, kill=None, **how):
    ends = Ends(kill)
    how = {"folder": folder, "average": True, "callbacks": [ends], **how}
    return fit(used_batchnorm(), "block1", Rows(20, 1), Rows(10, 2), SETTINGS, **how), ends.weights


@pytest.fixture(scope="module")
def whole():
    return averaged()


def test_the_mean_is_that_of_the_last_half_of_the_epochs(whole):
    found, ends = whole
    last = ends[EPOCHS // 2 :]
    assert (len(ends), len(last)) == (5, 3)
    trained = [name for name, p in found.model.named_parameters() if p.requires_grad]
    assert trained
    for name, parameter in found.model.named_parameters():
        wanted = sum(one[name] for one in last) / 3 if name in trained else ends[0][name]
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(ends[-1][name], dict(found.model.named_parameters())[name]) for name in trained)


def test_its_logits_and_accuracy_are_those_of_the_mean(whole):
    found, _ = whole
    rows = Rows(10, 2)
    with torch.no_grad():
        logits = found.model.eval()(rows.images)
    torch.testing.assert_close(found.logits, logits)
    assert found.validation == pytest.approx((logits.argmax(1) == rows.classes).float().mean().item())
    assert (found.best_epoch, len(found.curve)) == (EPOCHS, EPOCHS)


@pytest.mark.parametrize("step", [4, 8, 11, 15])  # three steps an epoch; the last epochs are the third to the fifth
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        averaged(tmp_path, kill=step)
    for _ in range(2):  # asked for once more, it is read
        found, _ = averaged(tmp_path)
        for (name, one), (_, other) in zip(
            found.model.named_parameters(), whole[0].model.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        assert torch.equal(found.logits, whole[0].logits)
        assert found.cost == whole[0].cost


@pytest.mark.parametrize(("epochs", "after"), [(1, 0), (2, 1), (3, 1), (4, 2), (15, 7)])
def test_more_than_none_of_the_epochs_count(epochs, after):
    assert MeanOfLastEpochs(epochs).after == after


def test_a_run_that_is_averaged_has_its_end():
    with pytest.raises(ConfigError, match="average=True takes the mean over the end of a run, and stop_epoch="):
        averaged("folder", stop_epoch=2)


def test_sharded_weights_are_refused(monkeypatch):
    class Sharded(fitting.ClassifierTrainer):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.is_fsdp_enabled = True

    monkeypatch.setattr(fitting, "ClassifierTrainer", Sharded)
    with pytest.raises(ConfigError, match="average=True reads whole weights, which FSDP shards: launch with DDP"):
        averaged()
