"""What a user may type by mistake or by right: negative values, stray words, and help that can be read."""

from __future__ import annotations

import pytest

from instar.cli import main
from instar.cli.arguments import parse, parser
from instar.errors import UserError


def made():
    """A command with two flags."""
    found = parser("try", "First paragraph.\n\nlist:\n  one  thing\n  two  things")
    found.add_argument("--eps", type=str)
    found.add_argument("--batch_size", type=int)
    return found


@pytest.mark.parametrize("value", ["-8/255", "-.5", "-3"])
def test_a_negative_value_reaches_its_flag(value):
    assert parse(made(), ["--eps", value, "--batch-size", "4"]).eps == value


def test_a_stray_word_is_not_called_a_flag():
    with pytest.raises(UserError, match=r"'extra'.*No flag stands before it"):
        parse(made(), ["--eps", "1", "extra"])


def test_help_keeps_the_lines_of_a_list():
    assert "\n  one  thing\n  two  things\n" in made().format_help()


def test_about_is_refused_where_no_entry_is_written(capsys):
    assert main(["evaluate", "nowhere", "--suite", "quick", "--about", "name=x"]) == 2
    assert "--about is for --suite robustbench, which alone writes an entry" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--n", "--batch-size"])
def test_doctor_refuses_counts_below_one(flag, capsys):
    assert main(["doctor", "nowhere", flag, "0"]) == 2
    assert "must be at least 1; got 0" in capsys.readouterr().err
