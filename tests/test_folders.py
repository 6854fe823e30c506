"""Writing into folders: where no other folder can be written, by several processes, and past what others have left."""

import os
import shutil
import threading
import time

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from peft_surgical import SurgicalConfig, folders
from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.errors import AdapterError, AdapterFileError
from peft_surgical.files import Content
from peft_surgical.folders import commit, locked, staging, write_atomically
from peft_surgical.keys import CONFIG, SCRATCH, WEIGHTS


def network():
    return tiny.used_batchnorm()


def adapted(seed=0, target="block1"):
    model = get_peft_model(network(), SurgicalConfig(target=target))
    tiny.disturb(model, seed=seed)
    return model.eval()


# --- where there is no room but in the folder itself ---


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saving_through_a_link_and_to_a_long_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    for folder in (tmp_path / "link", tmp_path / ("a" * 250)):
        adapted().save_pretrained(folder)
        assert names(folder) == ["README.md", CONFIG, WEIGHTS]
        read_adapter(folder).save(tmp_path / "copy" / folder.name)


def test_saving_writes_nothing_beside_the_folder(tmp_path, monkeypatch):
    """As where the parent is read-only or of another file system: a mounted volume."""
    (tmp_path / "volume").mkdir()
    made = []
    original = os.mkdir
    monkeypatch.setattr(
        os, "mkdir", lambda path, *args, **kwargs: (made.append(str(path)), original(path, *args, **kwargs))
    )
    adapted().save_pretrained(tmp_path / "volume")
    assert made
    assert all(path.startswith(str(tmp_path / "volume")) for path in made)


def test_nothing_is_left_of_a_save_that_fails(tmp_path):
    model = adapted()
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "old")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "old") as stage:  # noqa: PT012
        (stage / "half").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path / "old") == ["README.md", CONFIG, WEIGHTS]


# --- unfinished files ---


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / f"{SCRATCH}0123" / "deep").mkdir(parents=True)
    (tmp_path / f"{SCRATCH}4567").write_text("half")
    (tmp_path / f"{SCRATCH}link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".others").mkdir()
    with staging(tmp_path) as living:
        adapted().save_pretrained(tmp_path)
        kept = {".others", f"{SCRATCH}link"}  # somebody else's
        assert {*names(tmp_path)} == {"README.md", CONFIG, WEIGHTS, living.name, *kept}


def test_unfinished_files_cannot_be_guessed_or_redirected(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr(folders.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / f"{SCRATCH}guessed").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "precious").read_text() == "precious"
    monkeypatch.undo()
    write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


# --- one writer at a time ---


def test_a_folder_is_locked_while_files_take_their_places(tmp_path, monkeypatch):
    adapted(0).save_pretrained(tmp_path)
    adapted(1).save_pretrained(tmp_path / "second")
    with staging(tmp_path) as stage:
        shutil.copy(tmp_path / "second" / CONFIG, stage)
        shutil.copy(tmp_path / "second" / WEIGHTS, stage)
        with locked(tmp_path):
            thread = threading.Thread(target=commit, args=(stage, tmp_path))
            before = (tmp_path / WEIGHTS).read_bytes()
            thread.start()
            time.sleep(0.1)
            assert (tmp_path / WEIGHTS).read_bytes() == before
        thread.join()
    assert (tmp_path / WEIGHTS).read_bytes() != before
    monkeypatch.setattr(folders, "LOCK_TIMEOUT", 0.05)
    with locked(tmp_path), pytest.raises(AdapterError, match=r"has been writing into .*: save to another folder"):
        adapted(2).save_pretrained(tmp_path)


def test_where_folders_cannot_be_locked_a_file_in_them_is(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_waited", lambda descriptor, folder: False)
    monkeypatch.setattr(folders, "LOCK_TIMEOUT", 0.05)
    with locked(tmp_path), pytest.raises(AdapterError, match="save to another folder"), locked(tmp_path):
        pass


def test_a_broken_config_does_not_keep_one_from_saving(tmp_path):
    model = adapted()
    for broken in ("", "[1]", "[" * 100_000, '{"superseded": 3}', "\x00"):
        (tmp_path / CONFIG).write_text(broken)
        model.save_pretrained(tmp_path)
        read_adapter(tmp_path)


# --- one reader beside writers ---


@pytest.fixture
def alternating(tmp_path):
    """A folder, and what replaces the adapter in it by the other one of two."""
    models = [adapted(0), adapted(1)]
    models[0].save_pretrained(tmp_path / "folder")

    def replace():
        models.append(models.pop(0))
        models[0].save_pretrained(tmp_path / "folder")

    return tmp_path / "folder", replace


def logits_of(model):
    return tiny.outputs(model.eval(), tiny.images())


def test_the_file_that_was_verified_is_the_one_that_is_loaded(alternating, monkeypatch):
    folder, replace = alternating
    expected = logits_of(adapted(0))
    import peft.peft_model as module

    original = module.load_peft_weights

    def late(*args, **kwargs):
        replace()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "load_peft_weights", late)
    model = PeftModel.from_pretrained(network(), folder)
    assert torch.equal(logits_of(model), expected)
    assert model.peft_config["default"].content is None  # no second copy is kept

    def twice(*args, **kwargs):
        replace()
        found = original(*args, **kwargs)
        replace()
        return found

    model = adapted(3)
    monkeypatch.setattr(module, "load_peft_weights", twice)
    with pytest.raises(AdapterFileError, match="was replaced while it was being loaded: load it again"):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("error", [RuntimeError("size <4> is smaller than the required mapping size <5>"), OSError(2)])
def test_a_file_that_changes_while_it_is_read_is_named(alternating, monkeypatch, error):
    folder, replace = alternating
    import peft.peft_model as module

    def broken(*args, **kwargs):
        raise error

    def late(*args, **kwargs):
        replace()
        raise error

    model = adapted(3)
    before = logits_of(model)
    monkeypatch.setattr(module, "load_peft_weights", late)
    with pytest.raises(AdapterFileError, match="was replaced while it was being loaded: load it again"):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default"]
    assert not any(".other." in name for name, _ in model.named_parameters())
    assert torch.equal(logits_of(model), before)
    base = network()
    with pytest.raises(AdapterFileError, match="load it again"):
        PeftModel.from_pretrained(base, folder)
    assert not hasattr(base, "peft_config")
    monkeypatch.setattr(module, "load_peft_weights", broken)
    with pytest.raises(type(error)):  # no file has changed: whatever it is, it is shown
        model.load_adapter(folder, "another")


def test_what_is_loaded_has_no_tensors_of_an_adapter_that_tunes_more(tmp_path, monkeypatch):
    import peft.peft_model as module

    adapted(0, "block1").save_pretrained(tmp_path)
    larger, original = adapted(1, "all"), module.load_peft_weights

    def late(*args, **kwargs):
        larger.save_pretrained(tmp_path)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "load_peft_weights", late)
    model = PeftModel.from_pretrained(network(), tmp_path)
    assert torch.equal(logits_of(model), logits_of(adapted(0, "block1")))


def test_a_whole_head_is_loaded_as_it_was_verified(tmp_path, monkeypatch):
    import peft.peft_model as module

    models = []
    for seed in (0, 1):
        model = get_peft_model(network(), SurgicalConfig(target="block1", modules_to_save=["fc"]))
        tiny.disturb(model, seed=seed)
        torch.nn.init.constant_(model.base_model.model.fc.modules_to_save["default"].weight, seed + 1.0)
        models.append(model.eval())
    models[0].save_pretrained(tmp_path)
    original = module.load_peft_weights

    def late(*args, **kwargs):
        models[1].save_pretrained(tmp_path)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "load_peft_weights", late)
    assert torch.equal(logits_of(PeftModel.from_pretrained(network(), tmp_path)), logits_of(models[0]))


def test_config_and_weights_are_read_again_until_they_belong_together(alternating, monkeypatch):
    folder, replace = alternating
    times = iter([True, True, False])

    class Late(Content):
        def __init__(self, path):
            if next(times, False):
                replace()
            super().__init__(path)

    monkeypatch.setattr("peft_surgical.config.Content", Late)
    assert read_adapter(folder).config.target == "block1"
    assert next(times, None) is None
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace(read_adapter(folder).sha256, "0" * 64))
    with pytest.raises(AdapterFileError, match="is not the file that its config was saved with"):
        read_adapter(folder)


def test_ones_own_tensors_are_loaded_with_a_config_from_disk(alternating):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    folder, _ = alternating
    own = adapted(5)
    model = get_peft_model(network(), SurgicalConfig.from_pretrained(folder))
    set_peft_model_state_dict(model, get_peft_model_state_dict(own))
    assert torch.equal(logits_of(model), logits_of(own))
