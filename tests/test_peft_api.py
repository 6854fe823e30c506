"""What the package relies on inside PEFT is all in one table, and a PEFT that differs is refused in words."""

import ast
import enum
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path

import peft
import pytest
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from test_docs import SOURCE, imported_by, module_of
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.peft_api import RELIED_ON, SUPPORTED, check_peft
from peft_surgical.tuner.layer import SurgicalLayer
from peft_surgical.tuner.model import SurgicalModel

ROOT = Path(__file__).parents[1]
BASES = [(SurgicalModel, BaseTuner), (SurgicalLayer, BaseTunerLayer), (SurgicalConfig, peft.PeftConfig)]


def overridden(ours, base):
    """The names that PEFT's class and ours both define; what Python and torch define in every module aside."""
    for name in vars(ours):
        if hasattr(base, name) and not name.startswith("__") and name != "_abc_impl" and not hasattr(nn.Module, name):
            yield name


def test_every_name_that_is_taken_from_inside_peft_is_in_the_table():
    taken = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft."):
                taken |= {f"{node.module}:{alias.name}" for alias in node.names}
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "merge_utils":
                taken.add(f"peft.utils.merge_utils:{node.attr}")
    assert "peft.utils.merge_utils:prune" in taken
    assert taken <= set(RELIED_ON)
    listed = {name for name in RELIED_ON if not name.startswith("peft:") and "." not in name.partition(":")[2]}
    assert listed == taken


@pytest.mark.parametrize(("ours", "base"), BASES, ids=lambda cls: cls.__name__)
def test_every_overridden_method_is_in_the_table_with_the_parameters_of_ours(ours, base):
    names = list(overridden(ours, base))
    assert len(names) > 3
    module = "peft" if base is peft.PeftConfig else base.__module__
    for name in names:
        wanted = RELIED_ON[f"{module}:{base.__name__}.{name}"]
        found = getattr(ours, name)
        if wanted and callable(found):
            assert tuple(inspect.signature(found).parameters) == wanted, name
            assert set(wanted) <= set(inspect.signature(getattr(base, name)).parameters)


def test_the_installed_peft_is_accepted():
    check_peft()


def without_a_parameter(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False):
    raise AssertionError("only its signature is looked at")


def with_one_more(self, model, adapter_name, rank, autocast_adapter_dtype=1, low_cpu_mem_usage=0, state_dict=None):
    raise AssertionError("only its signature is looked at")


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (without_a_parameter, r"BaseTuner\.inject_adapter takes no state_dict\."),
        (with_one_more, r"BaseTuner\.inject_adapter requires rank\."),
    ],
)
def test_a_peft_whose_hook_takes_other_parameters_is_refused(monkeypatch, hook, reason):
    monkeypatch.setattr(BaseTuner, "inject_adapter", hook)
    with pytest.raises(ImportError, match=f"installed peft {re.escape(peft.__version__)}: {reason} Install a version"):
        check_peft()


def test_a_peft_whose_hook_takes_something_optional_besides_is_accepted(monkeypatch):
    def tolerant(self, model, adapter_name, autocast_adapter_dtype=1, low_cpu_mem_usage=0, state_dict=None, new=None):
        raise AssertionError("only its signature is looked at")

    monkeypatch.setattr(BaseTuner, "inject_adapter", tolerant)
    check_peft()


def test_the_first_difference_is_named_and_the_others_are_counted(monkeypatch):
    monkeypatch.delattr(peft.utils.other, "ModulesToSaveWrapper")
    monkeypatch.delattr(BaseTuner, "_remap_adapter_state_dict_for_load")
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict")
    with pytest.raises(ImportError, match=r"peft\.utils\.other has no ModulesToSaveWrapper \(and 2 more differences\)"):
        check_peft()


def test_importing_the_package_says_which_peft_to_install_before_an_import_fails(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_surgical"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(peft.utils.error, "NoMatchingPeftModuleError")
    with pytest.raises(ImportError, match=re.escape(f"pip install '{SUPPORTED}'")):
        importlib.import_module("peft_surgical")


def test_the_versions_named_are_those_of_the_package():
    assert f'    "{SUPPORTED}",\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_table_of_supported_versions_says_what_pyproject_says():
    bounds = re.findall(r'"(torch|transformers|peft)([><=][^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert len(bounds) == 3
    lines = [line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if line.startswith("|")]
    names, latest = ([cell.strip() for cell in line.split("|")] for line in (lines[0], lines[2]))
    for name, bound in bounds:
        assert latest[names.index(name)] == bound.replace(">=", "from ").replace(",<", ", below ")


# --- docs/peft.md ---


PAGE = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")


def table_below(heading):
    """The rows of the first table below a line that starts so, as lists of cells."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_the_page_on_merging_names_files_that_peft_has():
    for file, *_ in table_below("## To be added"):
        for name in re.findall(r"`(peft/[\w/]+\.py)`", file):
            assert (Path(peft.__file__).parents[1] / name).is_file(), name


def test_peft_still_refuses_a_name_that_is_not_in_its_enum():
    assert "SURGICAL" not in peft.PeftType.__members__
    with pytest.raises(ValueError, match="Unknown PEFT type SURGICAL"):
        peft.utils.register_peft_method(name="surgical", config_cls=SurgicalConfig, model_cls=SurgicalModel)


def test_what_registering_in_peft_would_enter_is_what_this_package_enters(monkeypatch):
    """With a member of the enum, PEFT's own function gives the entries that `register` writes."""
    from peft import mapping
    from peft.utils import peft_types

    class Types(str, enum.Enum):
        SURGICAL = "SURGICAL"

    names = ("CONFIG", "TUNER", "PREFIX")
    ours = {name: getattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING")["SURGICAL"] for name in names}
    monkeypatch.setattr(peft_types, "PeftType", Types)
    for name in (*names, "MIXED_MODEL"):
        monkeypatch.setattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING", {})
    peft_types.register_peft_method(name="surgical", config_cls=SurgicalConfig, model_cls=SurgicalModel)
    assert {name: getattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING")[Types.SURGICAL] for name in names} == ours
    assert ours["PREFIX"] == "surgical_"


def test_the_page_on_merging_names_the_hooks_and_the_wrapped_methods():
    rows = table_below("## What PEFT would have to decide")
    hooks = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert hooks
    assert set(hooks) <= set(overridden(SurgicalModel, BaseTuner)) | {"_create_and_replace"}
    wrapped = [row[0].strip("`") for row in table_below("Five methods of `PeftModel` are wrapped")]
    marked = {name for name, value in vars(peft.PeftModel).items() if hasattr(value, "_peft_surgical")}
    assert sorted(wrapped) == sorted(marked)


def test_the_code_to_move_is_what_the_tuner_needs():
    sentence = PAGE[PAGE.index("The code to move") : PAGE.index("Everything else")]
    named = set(re.findall(r"`([\w/]+)`", sentence)) - {"filelock"}
    files = {module_of(file): file for file in SOURCE.rglob("*.py") if file.name not in {"__init__.py", "__main__.py"}}
    found, pending = set(), [name for name in files if name == "config" or name.startswith("tuner.")]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += imported_by(files[name])
    assert {f"{name.split('.')[0]}/" if "." in name else name for name in found} == {
        "evaluation/" if name == "evaluation" else name for name in named
    }
