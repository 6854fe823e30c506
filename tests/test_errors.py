"""Scripts end in words where the user can mend something, and in a traceback where it is a bug."""

import subprocess
import sys

import pytest
from scripts import ROOT

from peft_surgical.errors import INTERRUPTED, USER_ERROR, ConfigError, run_in_words


def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys):
    def fails():
        raise ConfigError("lr=-1 is no rate: give a positive one")

    monkeypatch.setattr(sys, "argv", ["recipes/frost.py"])
    assert run_in_words(fails) == USER_ERROR == 2
    assert capsys.readouterr().err == "frost.py: lr=-1 is no rate: give a positive one\n"
    assert run_in_words(lambda: "whatever main returns") == 0
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_script_says_that_it_goes_on(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["frost.py"])
    assert run_in_words(stopped) == INTERRUPTED == 130
    assert capsys.readouterr().err == "frost.py: interrupted; start it again to go on\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_in_words(lambda: 1 / 0)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.py")), ids=lambda file: file.stem)
def test_every_recipe_ends_in_words(file):
    assert file.read_text(encoding="utf-8").endswith('if __name__ == "__main__":\n    sys.exit(run_in_words(main))\n')


def test_a_recipe_in_a_process_of_its_own():
    command = [sys.executable, "recipes/synthetic.py", "--data", "no/such/file.parquet", "--target", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == USER_ERROR
    assert done.stderr.strip().splitlines()[-1].startswith("synthetic.py: ")
    assert "Traceback" not in done.stderr
