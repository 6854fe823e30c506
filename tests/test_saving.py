"""Saving under SIGKILL, for real: a process that saves two adapters by turns, killed at arbitrary moments."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import CASES, images, outputs

import peft_surgical  # noqa: F401 (or PEFT would not know the method)

SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from peft import get_peft_model
from tiny import CASES, disturb
from peft_surgical import SurgicalConfig
models = []
for seed, target in enumerate(("block1", "head + block2")):
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target=target))
    disturb(model, seed=seed)
    models.append(model)
print("ready", flush=True)
while True:
    for model in models:
        model.save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_one_whole_adapter(tmp_path):
    random.seed(0)
    base = CASES["conv+BN"].network()
    folder, seen = tmp_path / "adapter", []
    for _ in range(8):
        arguments = [sys.executable, "-W", "ignore", "-c", SAVER, str(folder), str(Path(__file__).parent)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout.readline() == "ready\n"
            while not (folder / "adapter_config.json").is_file():
                time.sleep(0.01)
            time.sleep(random.uniform(0.05, 0.4))
            os.kill(saver.pid, signal.SIGKILL)
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert torch.isfinite(outputs(model, images())).all()
        seen.append(model.peft_config["default"].target)
    assert set(seen) <= {"block1", "head + block2"}
