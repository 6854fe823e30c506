import pickle

import pytest
import torch
from torch import nn

from peft_surgical.tuner.specialise import has_statistics, hold_statistics, moving_statistics, restore, statistics_of


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.InstanceNorm2d(2, track_running_stats=True), True),
        (nn.InstanceNorm2d(2), False),
        (nn.BatchNorm1d(2, track_running_stats=False), False),
        (nn.GroupNorm(1, 2), False),
        (nn.LayerNorm(2), False),
    ],
    ids=str,
)
def test_which_modules_keep_statistics(module, expected):
    assert has_statistics(module) is expected
    assert bool(statistics_of(module)) is expected


def test_policies():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    modules = list(model.named_modules())
    first = ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    second = [name.replace("0.", "2.", 1) for name in first]
    assert moving_statistics("frozen", modules, {"0"}) == []
    assert moving_statistics("target", modules, {"0", "1"}) == first
    assert moving_statistics("all", modules, {"1"}) == first + second


def test_held_statistics_ignore_the_mode_and_come_back():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    plain_class = type(model[0])
    hold_statistics(model)
    x = torch.randn(4, 2)
    for again in (model, pickle.loads(pickle.dumps(model))):
        again.train()
        assert again[0].training is False
        assert again[1].training is True
        assert torch.equal(again[0](x), x / (1 + 1e-5) ** 0.5)
        assert again[0].num_batches_tracked == 0
        assert isinstance(again[0], nn.BatchNorm1d)
    restore(model[0])
    assert type(model[0]) is plain_class
    assert model[0].training is True  # what the user asked for last


def test_children_of_a_held_module_follow_the_mode():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d(2, act_layer=nn.Dropout)
    hold_statistics(norm)
    norm.train()
    assert norm.training is False
    assert norm.act.training is True
