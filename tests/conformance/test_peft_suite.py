"""PEFT's own generic tests, run on surgical adapters: everything that applies passes, see `expected`."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import runner
from .expected import GROUPS

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        tests = runner.fetch_tests(request.config.cache.mkdir("peft-source"))
    except runner.SourceUnavailableError as error:
        pytest.skip(str(error))
    return runner.stage(tests, tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("modules", GROUPS, ids=lambda modules: modules[0])
def test_everything_that_applies_passes(folder: Path, modules: tuple[str, ...]) -> None:
    outcomes = runner.run(folder, modules)
    assert not (problems := runner.judge(modules, outcomes)), "\n".join(problems)
