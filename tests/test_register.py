import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_surgical
from peft_surgical import SurgicalConfig, SurgicalModel, register
from peft_surgical.config import SurgicalType


def test_the_public_names_are_sorted_and_exist():
    assert peft_surgical.__all__ == sorted(peft_surgical.__all__)
    assert all(hasattr(peft_surgical, name) for name in peft_surgical.__all__)


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
