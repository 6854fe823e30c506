"""Texts of strangers: nothing in them is obeyed, by a terminal, a page or a spreadsheet."""

import pytest

from peft_surgical.texts import csv_cell, escaped, markdown_code, markdown_text
from peft_surgical_cli.terminal import printable_text


@pytest.mark.parametrize("function", [escaped, printable_text])
def test_control_characters_become_escapes(function):
    assert function("plain, ünïcode 猫") == "plain, ünïcode 猫"
    assert function("\x1b[2J\x07\r\n\u202e\udcff") == r"\x1b[2J\x07\r\n\u202e\udcff"
    assert function("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_markdown():
    assert (
        markdown_text("a | b\n<img src=x> ![x](http://y) [all] \\|")
        == r"a \| b &lt;img src=x> ![x]\(http://y) [all] \|"
    )
    assert markdown_code("*.norm* | `x`\ny") == r"`*.norm* \| 'x' y`"


@pytest.mark.parametrize("begins", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(begins):
    assert csv_cell(f"{begins}HYPERLINK()") == f"'{begins}HYPERLINK()"
    assert csv_cell(f"a{begins}") == f"a{begins}"
