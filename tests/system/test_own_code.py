"""Functions of the user's own: found in files and modules alike, and one line where their code fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.cli import main
from instar.errors import UserError
from instar.models import create
from instar.own_code import own_function

NET = """
from torch import nn

def make(classes, channels=1, image_size=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, classes))
"""


def test_a_model_comes_from_a_file_and_no_run_chooses_that_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET)
    run = str(tmp_path / "run")
    words = ["--data", "digits", "--epochs", "1", "--steps", "1", "--batch-size", "512"]
    assert main(["train", "pgd_at", "--model", f"{file}:make", *words, "--out", run]) == 0
    assert main(["evaluate", run, "--suite", "quick", "--n", "10"]) == 2
    assert "no file may choose code to run" in capsys.readouterr().err
    # Named by the user it is made as for training, with the normalisation that training puts in front.
    assert main(["evaluate", run, "--model", f"{file}:make", "--suite", "quick", "--n", "10"]) == 0


def test_an_edit_counts_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "edited.py"
    file.write_text("def size():\n    return 1\n")
    assert own_function(f"{file}:size", what="model")() == 1
    file.write_text("def size():\n    return 2000\n")
    assert own_function(f"{file}:size", what="model")() == 2000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def make(:\n", r"cannot be run for the recipe 'make': SyntaxError: .*line 1"),
        ("1 / 0\n", r"cannot be run for the recipe 'make': ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found\n", r"cannot be run .* No module named 'nowhere_to_be_found'"),
        ("make = 3\ndef mike():\n    pass\n", r"unknown function of .*broken.py 'make'. Did you mean 'mike'"),
    ],
)
def test_a_file_that_fails_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=line):
        own_function(f"{tmp_path / 'broken.py'}:make", what="recipe")


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match=r"there is no file absent.py to take the model 'make' from"):
        create("absent.py:make", classes=2)
    with pytest.raises(UserError, match=r"cannot import '' for the recipe ':f'"):
        own_function(":f", what="recipe")
