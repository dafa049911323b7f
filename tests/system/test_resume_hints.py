"""How an interrupted run says that it can be gone on with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from instar import pgd_at
from instar.data import load
from instar.errors import UserError
from instar.runs import onward
from instar.train import Event, Interrupted, StepDone, train

SMALL = {"model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 1, "precision": "float32"}


def _stop(event: Event) -> None:
    """What Ctrl-C does after a step."""
    if isinstance(event, StepDone) and event.step == 0:
        os.kill(os.getpid(), signal.SIGINT)


def _hint(out: Path, recipe: object, **more: object) -> str:
    with pytest.raises(Interrupted) as caught:
        train(recipe, out=out, on_event=_stop, **SMALL | more)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_hint_of_an_interrupted_run_names_trust_where_code_of_ones_own_is_run(tmp_path: Path) -> None:
    own = tmp_path / "my_file.py"
    own.write_text("from instar import pgd_at\n\n\ndef mine(steps=1):\n    return pgd_at(eps=0.1, steps=steps)\n")
    hint = _hint(tmp_path / "own", f"{own}:mine")
    assert hint.endswith(f"go on with: instar train --resume --trust --out {tmp_path / 'own'}")
    hint = _hint(tmp_path / "known", "pgd_at", arguments={"steps": 1})
    assert hint.endswith(f"go on with: instar train --resume --out {tmp_path / 'known'}")
    with pytest.raises(UserError, match=r"not empty: go on with: instar train --resume --trust --out "):
        train("pgd_at", out=tmp_path / "own", **SMALL)  # type: ignore[arg-type]


def test_a_run_on_data_from_python_is_gone_on_with_in_python(tmp_path: Path) -> None:
    hint = _hint(tmp_path / "run", pgd_at(eps=0.1, steps=1), data=load("digits"))
    assert "instar train --resume" not in hint
    assert f"instar.train.train(..., out='{tmp_path / 'run'}', resume=True), from Python" in hint


def test_a_folder_with_a_space_is_quoted_for_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"recipe": "gairat", "training": {"model": None}}))
    assert onward(folder) == f"go on with: instar train --resume --out '{folder}'"


def test_a_folder_that_holds_something_else_is_not_called_a_run(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty and holds no run: choose another --out$"):
        train("pgd_at", out=tmp_path, **SMALL)  # type: ignore[arg-type]
