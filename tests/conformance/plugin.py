"""pytest plugin of the process that runs PEFT's tests: which of them are about surgical adapters, and how they ended.

A test counts when a surgical config was made while it ran, or is among its parameters; the others are about other
methods. The outcomes go to a JSON file, one entry per test that counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_surgical import SurgicalConfig

from . import cases
from .expected import ANY_BASE, OUT_OF_SCOPE
from .runner import OUTCOMES

_COUNTS = "counts"
_made = 0


def _count_configs() -> None:
    original = SurgicalConfig.__post_init__

    def counted(self: SurgicalConfig) -> None:
        global _made
        _made += 1
        original(self)

    SurgicalConfig.__post_init__ = counted  # type: ignore[method-assign]


def _name(item: pytest.Item) -> str:
    return item.nodeid.partition("/")[2].replace(".py::", "::")


def _is_surgical(value: Any) -> bool:
    return isinstance(value, SurgicalConfig) or (isinstance(value, type) and issubclass(value, SurgicalConfig))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if any(row.matches(_name(item)) for row in OUT_OF_SCOPE)]
    items[:] = [item for item in items if item not in set(out)]
    config.hook.pytest_deselected(items=out)


@pytest.fixture(autouse=True)
def _any_base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(row.matches(_name(request.node)) for row in ANY_BASE):
        return
    strict = SurgicalConfig.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type[SurgicalConfig], *args: Any, **kwargs: Any) -> SurgicalConfig:
        return strict(cls, *args, **{"strict_base": False, **kwargs})

    monkeypatch.setattr(SurgicalConfig, "from_pretrained", classmethod(from_pretrained))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item._made_before = _made  # type: ignore[attr-defined]
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    report = yield
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    counts = _made > item._made_before or any(map(_is_surgical, parameters))  # type: ignore[attr-defined]
    report.user_properties = [(_COUNTS, counts)]
    report.surgical_name = _name(item)
    return report


class Recorder:
    """Collects the outcomes of the tests that count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = "passed" if report.passed else "skipped" if report.skipped else "failed"
        name = report.surgical_name  # type: ignore[attr-defined]
        if not dict(report.user_properties)[_COUNTS] or (ended == "passed" and report.when != "call"):
            return
        if self.outcomes.get(name, {}).get("ended") != "failed":
            self.outcomes[name] = {"ended": ended, "text": _why(report)}

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.outcomes, indent=1, sort_keys=True), encoding="utf-8")


def _why(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr or "")[-800:]


def pytest_configure(config: pytest.Config) -> None:
    _count_configs()
    cases.perturb_on_request()
    if OUTCOMES in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[OUTCOMES])))
