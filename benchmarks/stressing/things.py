"""What all rounds share: a small network, adapters on it, images, and processes that can be killed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_surgical import SurgicalConfig

CLASSES = ("dark", "light")
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LIMIT = 300.0
"""Seconds after which a process counts as hanging."""


class Network(nn.Module):
    """A small convolutional network in the layout of torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, h, w)."""
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)))).mean((2, 3)))


def base() -> nn.Module:
    """The network, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().eval()


def adapted(number: int) -> Any:
    """The network with the adapter of this number, whose deltas are not zero."""
    model = get_peft_model(base(), SurgicalConfig(target=("block1", "head + block2", "all")[number % 3]))
    generator = torch.Generator().manual_seed(number)
    for name, parameter in model.named_parameters():
        if ".surgical_delta." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """What a network says of `IMAGES`."""
    with torch.no_grad():
        return model(IMAGES)


def loaded(folder: Path) -> Tensor:
    """The logits with the adapter in a folder."""
    return logits(PeftModel.from_pretrained(copy.deepcopy(base()), folder).eval())


def which(found: Tensor, expected: list[Tensor]) -> int | None:
    """Whose logits these are, bit for bit; None if nobody's."""
    return next((number for number, one in enumerate(expected) if torch.equal(found, one)), None)


# --- images ---


def transform(image: Any) -> Tensor:
    """A PIL image as a float tensor (3, h, w) in [0, 1]."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def write_images(folder: Path, count: int = 12) -> Path:
    """Folders of so many images of each class, 8 x 8 pixels."""
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = (torch.randn(8, 8, 3, generator=generator) * 40 + 90 + 70 * label).clamp(0, 255).byte()
            Image.frombytes("RGB", (8, 8), pixels.numpy().tobytes()).save(folder / name / f"{i}.png")
    return folder


# --- processes ---

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def started(work: Callable[..., None], *given: Any) -> Any:
    """A process that does this work; of an exception it prints the last line."""
    process = CONTEXT.Process(target=_inside, args=(work, given))
    process.start()
    return process


def _inside(work: Callable[..., None], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    errors = os.dup(2)
    with open(os.devnull, "w") as nothing:  # progress
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        work(*given)
    except BaseException as error:
        os.write(errors, f"{work.__name__}: {type(error).__name__}: {error}\n".encode())
        if os.environ.get("STRESS_TRACEBACK"):
            os.write(errors, traceback.format_exc().encode())
        os._exit(1)


@contextmanager
def all_of(processes: list[Any]) -> Iterator[None]:
    """Whatever happens, none of them is left."""
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def code_of(process: Any, limit: float = LIMIT) -> int | None:
    """The exit code; None of a process that hangs, which is killed."""
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def wait_until(condition: Callable[[], bool], limit: float = LIMIT) -> bool:
    """Whether something became true in time."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
