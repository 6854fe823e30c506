"""Fetches PEFT's tests, stages them with our cases and runs one module in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft

from .expected import EXPECTED, MODULES, Row
from .rewrite import PACKAGE, copy_tests

TESTS = Path(__file__).parents[1]
SOURCE = "PEFT_SOURCE"
"""Environment variable: an unpacked source distribution of PEFT, instead of fetching one."""

OUTCOMES = "CONFORMANCE_OUTCOMES"
"""Environment variable: where `plugin` writes the outcomes."""

_INI = """[pytest]
markers =
    single_gpu_tests: PEFT's
    multi_gpu_tests: PEFT's
    regression: PEFT's
    bitsandbytes: PEFT's
"""
_DIFFUSERS = '''"""Names that PEFT's test modules import; no test that counts uses them."""

__version__ = "0"


class StableDiffusionPipeline: ...


class UNet2DConditionModel: ...
'''


class SourceUnavailableError(RuntimeError):
    """PEFT's source distribution cannot be had here."""


def fetch_tests(cache: Path) -> Path:
    """The folder with the tests of the installed PEFT, fetched by pip into ``cache`` unless it lies there already.

    Raises:
        SourceUnavailableError: Neither `SOURCE` nor the package index has it.
    """
    version = peft.__version__
    given = os.environ.get(SOURCE)
    root = Path(given) if given else cache / f"peft-{version}"
    if not root.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            archive = _download(version, Path(scratch))
            with tarfile.open(archive) as file:
                file.extractall(scratch, filter="data")
            try:
                os.replace(Path(scratch, f"peft-{version}"), root)
            except OSError:  # another process was faster
                if not root.is_dir():
                    raise
    if not (root / "tests" / "test_custom_models.py").is_file():
        raise SourceUnavailableError(f"{root} holds no tests of PEFT.")
    return root / "tests"


def _download(version: str, scratch: Path) -> Path:
    python = sys.executable
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        venv.create(scratch / "venv", with_pip=True)
        python = str(scratch / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", f"peft=={version}"]
    done = subprocess.run([*command, "--dest", str(scratch)], capture_output=True, text=True, check=False)
    archives = list(scratch.glob("peft-*.tar.gz"))
    if done.returncode or not archives:
        raise SourceUnavailableError(
            f"The source distribution of peft {version} could not be fetched. Unpack it somewhere and set {SOURCE} to "
            f"its folder. pip said: {done.stderr.strip()[-300:]}"
        )
    return archives[0]


def stage(tests: Path, folder: Path) -> Path:
    """Put together in ``folder`` what the tests need: their rewritten copy, the stand-in Hub, a pytest.ini."""
    copy_tests(tests, folder)
    (folder / "pytest.ini").write_text(_INI, encoding="utf-8")
    (folder / "stubs" / "diffusers").mkdir(parents=True)
    (folder / "stubs" / "diffusers" / "__init__.py").write_text(_DIFFUSERS, encoding="utf-8")
    code = "import sys; from pathlib import Path; from conformance.hub import make_hub; make_hub(Path(sys.argv[1]))"
    home = str(folder / "hub-home")
    subprocess.run([sys.executable, "-c", code, home], env=_environment(folder), check=True, capture_output=True)
    return folder


def _environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "HF_"))}
    path = [str(TESTS), str(folder / "stubs"), kept.get("PYTHONPATH", "")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "HF_HOME": str(folder / "hub-home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Outcome:
    """How one of PEFT's tests ended.

    Attributes:
        name: Module, class, test and parameters.
        ended: passed, failed or skipped.
        text: Why, unless it passed.
    """

    name: str
    ended: str
    text: str


def run(folder: Path, modules: Sequence[str]) -> list[Outcome]:
    """Run some modules of the staged tests; the outcomes of those tests that are about surgical adapters.

    Raises:
        RuntimeError: pytest itself failed, for example while importing a module.
    """
    record = folder / f"{modules[0]}.json"
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "conformance.plugin", "-p", "no:cacheprovider"]
    command += ["-q", "--no-header", "--tb=short", "-W", "ignore"]
    command += [f"{PACKAGE}/{module}.py" for module in modules]
    environment = {**_environment(folder), OUTCOMES: str(record)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not record.is_file():
        raise RuntimeError(f"PEFT's tests did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found = json.loads(record.read_text(encoding="utf-8"))
    return [Outcome(name, entry["ended"], entry["text"]) for name, entry in sorted(found.items())]


def judge(modules: Sequence[str], outcomes: Sequence[Outcome]) -> list[str]:
    """What is not as `EXPECTED` says: unlisted failures, listed tests that pass, rows without a failure."""
    problems = []
    for outcome in outcomes:
        row = reason_of(outcome)
        if outcome.ended == "failed" and row is None:
            problems.append(f"fails, and is not listed: {outcome.name}\n    {outcome.text}")
        if outcome.ended == "passed" and row is not None:
            problems.append(f"is listed, but passes: {outcome.name}")
    for row in EXPECTED:
        if row.module in modules and not any(one.ended == "failed" and row.matches(one.name) for one in outcomes):
            problems.append(f"the row {row.pattern!r} of {row.module} matches no failure")
    for module in modules:
        passed = count(outcomes, module)["passed"]
        if passed < MODULES[module]:
            problems.append(
                f"{module}: {passed} tests pass, at least {MODULES[module]} have to: do the cases reach them?"
            )
    return problems


def count(outcomes: Sequence[Outcome], module: str) -> Counter[str]:
    """How many tests of a module passed, failed and were skipped by PEFT."""
    return Counter(one.ended for one in outcomes if one.name.startswith(f"{module}::"))


def reason_of(outcome: Outcome) -> Row | None:
    """The row of `EXPECTED` under which a test fails."""
    return next((row for row in EXPECTED if row.matches(outcome.name)), None)
