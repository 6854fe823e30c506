import ast
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from types import FunctionType

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_surgical
from peft_surgical import SurgicalConfig
from peft_surgical.config import SurgicalType
from peft_surgical.tuner import register
from peft_surgical.tuner.model import SurgicalModel

PUBLIC = """
AdapterPool Anatomy BlockScores CachedPrefix Pace Penalty SurgicalCallback SurgicalConfig SurgicalError anatomy_of
combine_adapters compare diff extract_adapter load_adapted pull push_adapter read_adapter resolve_target score_blocks
set_scale to_lora tune with_base_names
"""

IMPORTED = """
blocks blocks.anatomy blocks.inventory blocks.layouts blocks.parsing blocks.regexes blocks.segmentation
blocks.sources blocks.stacks blocks.towers config errors evaluation evaluation.intervals evaluation.metrics
evaluation.report extras files fingerprints folders keys peft_api results texts tuner tuner.attach tuner.base
tuner.by_name tuner.combine tuner.layer tuner.loading tuner.mixed tuner.model tuner.plan tuner.saving tuner.sharing
tuner.specialise tuner.support tuner.switch
"""


def in_a_process(code):
    """What code prints in a fresh process, as words."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_public_names_are_sorted_and_exist():
    assert peft_surgical.__all__ == sorted(PUBLIC.split())
    assert all(getattr(peft_surgical, name).__name__ == name for name in PUBLIC.split())
    assert set(PUBLIC.split()) <= set(dir(peft_surgical))
    with pytest.raises(AttributeError, match="module 'peft_surgical' has no attribute 'score_block'"):
        _ = peft_surgical.score_block


def test_names_imported_when_first_used_are_the_ones_that_type_checkers_see():
    tree = ast.parse(Path(peft_surgical.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == peft_surgical._MODULES


def test_importing_the_package_imports_what_registering_needs_and_no_further_library():
    found = in_a_process("""
        import sys
        import peft
        before = set(sys.modules)
        import peft_surgical
        print(*sorted(set(sys.modules) - before))
    """)
    assert found.pop(0) == "peft.utils.transformers_weight_conversion"  # of PEFT itself, for injection
    assert found == ["peft_surgical", *(f"peft_surgical.{name}" for name in sorted(IMPORTED.split()))]


@pytest.mark.slow
def test_importing_the_package_takes_at_most_a_tenth_of_the_time_of_peft():
    def share():
        peft, ours = in_a_process("""
            import time
            import peft
            between = time.process_time()
            import peft_surgical
            print(between, time.process_time() - between)
        """)
        return float(ours) / float(peft)

    assert statistics.median(share() for _ in range(3)) < 0.1


@pytest.mark.parametrize("key", ["SURGICAL", SurgicalType.SURGICAL])
def test_the_mappings_know_the_method_under_both_keys(key):
    assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is SurgicalConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[key] is SurgicalModel
    # transformers derives the prefix from the type instead of reading the mapping
    assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == SurgicalType.SURGICAL.value.lower() + "_"


def test_registering_twice_changes_nothing():
    saving = peft.PeftModel.save_pretrained
    register()
    assert peft.PeftModel.save_pretrained is saving


def test_other_methods_save_as_ever(tmp_path):
    from tiny import vit

    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()


@pytest.mark.parametrize(
    ("content", "error"),
    [('{"peft_type": "LO', "JSONDecodeError"), ("{}", "KeyError"), ('{"peft_type": "NEW"}', "KeyError")],
)
def test_configs_of_other_methods_fail_in_pefts_own_words(tmp_path, content, error):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises((ValueError, KeyError), match=r"Unterminated|'peft_type'|'NEW'") as caught:
        peft.PeftModel.from_pretrained(torch.nn.Linear(2, 2), tmp_path)
    assert type(caught.value).__name__ == error


def test_nothing_but_what_docs_tuner_lists_is_changed_in_other_packages():
    """Functions of this package that other packages' classes and modules have as attributes."""
    own = str(Path(peft_surgical.__file__).parent)
    changed = set()
    for module in [
        m for n, m in sys.modules.items() if n.partition(".")[0] in ("peft", "transformers", "timm", "torch")
    ]:
        for holder in (module, *(value for value in vars(module).values() if isinstance(value, type))):
            for name, value in vars(holder).items():
                function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                if isinstance(function, FunctionType) and function.__code__.co_filename.startswith(own):
                    changed.add(f"{holder.__name__}.{name}")
    assert changed == {
        f"PeftModel.{name}"
        for name in (
            "save_pretrained",
            "load_adapter",
            "disable_adapter",
            "push_to_hub",
            "create_or_update_model_card",
        )
    }
    page = (Path(__file__).parents[1] / "docs" / "tuner.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in changed)
