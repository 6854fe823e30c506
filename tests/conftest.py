"""What all tests share: no network, few threads, deterministic kernels' seeds."""

import gc
import os

# Before any library reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def quick_collections():
    """For modules with many short runs of Trainer, which collects garbage before each, among the libraries' objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def own_datasets_cache(tmp_path_factory, monkeypatch):
    """The cache in which `datasets` keeps what it has read is the user's and outlives a test: here each has its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def own_accelerate_state():
    """Accelerate's singletons, which outlive a run that is interrupted or that trains in bfloat16, do not here."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def pytest_configure(config):
    # Each pytest-xdist worker has a core; more threads would only fight.
    torch.set_num_threads(1)
