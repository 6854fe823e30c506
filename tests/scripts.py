"""Recipes, benchmarks and other scripts that stand outside the package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def script(*path: str) -> ModuleType:
    """The script at this path below the project's root, such as ``("recipes", "cifar10c.py")``; new with every call."""
    file = ROOT.joinpath(*path)
    spec = importlib.util.spec_from_file_location(f"script_{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
