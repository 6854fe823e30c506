"""Where to compute, and generators that are left as they were; a GPU is needed for none of it."""

import pytest
import torch

from peft_surgical.bases import load_base
from peft_surgical.extras import accelerator_or_cpu, generators_kept


def test_the_accelerator_that_pytorch_finds_is_taken(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert accelerator_or_cpu() == torch.device("xpu")
    assert accelerator_or_cpu(cpu=True) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerator_or_cpu() == torch.device("cpu")


def test_generators_are_put_back():
    before = torch.get_rng_state()
    with generators_kept():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("started", "kept"), [(True, [0, 1]), (False, [])])
def test_generators_of_devices_in_use_are_put_back(monkeypatch, started, kept):
    asked, put = [], []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or f"state {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.append((state, device)))
    with generators_kept():
        assert asked == kept
    assert put == [(f"state {device}", device) for device in kept]


def test_opening_a_network_seeds_no_device(monkeypatch):
    """Networks are made on the CPU; the generators of devices belong to whatever is going on there."""
    pytest.importorskip("timm")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"the GPUs were seeded with {seed}"))
    load_base("test_resnet", 2, weights="random")
