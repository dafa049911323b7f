"""`accelerate` in a run: recorded, changeable at a resume, one line where it cannot be, and no part in the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import instar
import instar.train
from instar.attacks import Captured, Recording, captured
from instar.cli import main
from instar.errors import UserError

SMALL = {"data": "digits", "width": 2, "batch_size": 400, "selection": 100, "epochs": 1, "precision": "float32"}


class Again:
    """Stands where there is no GPU for CUDA graphs: remembers the work, and does it again."""

    replays = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def __call__(self, work: captured.Work) -> Recording:
        results = tuple(torch.zeros_like(found) for found in work())

        def replay() -> None:
            Again.replays += 1
            for held, found in zip(results, work(), strict=True):
                held.copy_(found)

        return Recording(results, replay)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on the CPU, of that kind."""
    monkeypatch.setattr(captured, "CudaGraphs", Again)
    monkeypatch.setattr(instar.train, "choose_acceleration", lambda name, device: name)
    monkeypatch.setattr(Again, "replays", 0)


def _train(out: Path, recipe: str = "trades", **more: Any) -> tuple[instar.train.Result, list[str]]:
    notes: list[str] = []
    given = {"recipe": recipe, "arguments": {"steps": 2}, "note": notes.append, "device": "cpu", **SMALL, **more}
    return instar.train.train(out=out, **given), notes


def _equal(one: instar.train.Result, other: instar.train.Result) -> None:
    for ours, theirs in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("graphs")
def test_a_run_with_captured_attacks_is_the_run_and_says_how_it_was_made(tmp_path: Path) -> None:
    plain, _ = _train(tmp_path / "plain")
    fast, notes = _train(tmp_path / "fast", accelerate="graphs")
    _equal(fast, plain)
    assert Again.replays == 3 - 1  # every step but the first
    assert not any("captured" in note for note in notes)
    stored = json.loads((tmp_path / "fast" / "run.json").read_text())
    assert stored["training"]["accelerate"] == stored["acceleration"] == "graphs"
    assert json.loads((tmp_path / "plain" / "run.json").read_text())["acceleration"] == "none"


@pytest.mark.usefixtures("graphs")
def test_a_run_goes_on_in_another_way(tmp_path: Path) -> None:
    whole, _ = _train(tmp_path / "whole", epochs=2)

    class StopError(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, instar.train.EpochDone):
            raise StopError

    with pytest.raises(StopError):
        _train(tmp_path / "run", epochs=2, accelerate="graphs", on_event=stop)
    _equal(instar.train.resume(tmp_path / "run", accelerate="none"), whole)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    ("recipe", "said"),
    [("fat", "the attack is not captured: Patience"), ("iseat", "accelerate=graphs is not used"), ("natural", "no")],
)
def test_a_run_says_where_there_is_nothing_to_capture(recipe: str, said: str, tmp_path: Path) -> None:
    arguments = {} if recipe == "natural" else {"steps": 2}
    _, notes = _train(tmp_path / "run", recipe, accelerate="graphs", arguments=arguments)
    assert len([note for note in notes if said in note]) == 1
    assert Again.replays == 0


def test_auto_says_nothing(tmp_path: Path) -> None:
    _, notes = _train(tmp_path / "run", "fat", accelerate="auto")
    assert not any("accelerate" in note or "captured" in note for note in notes)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["acceleration"] == "none"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accelerate", "graphs"], "need a GPU"),
        (["--accelerate", "fast"], "accelerate"),
        (["--accelerate", "compile", "--fold", "false"], "folded copy"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "pgd_at", *words, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_resume_that_asks_for_what_cannot_be_is_refused_and_the_run_stays(tmp_path: Path) -> None:
    _train(tmp_path / "run")
    with pytest.raises(UserError, match="need a GPU"):
        instar.train.resume(tmp_path / "run", accelerate="graphs")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--accelerate", "none"]) == 0


def test_the_stand_in_of_a_run_is_captured_where_graphs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    monkeypatch.setattr(instar.train, "choose_acceleration", lambda name, device: "both")
    monkeypatch.setattr(captured, "CudaGraphs", Again)
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options) or function)
    stand_in = instar.train._stand_in
    monkeypatch.setattr(instar.train, "_stand_in", lambda *given: made.append(stand_in(*given)) or made[-1])
    _train(tmp_path / "run", accelerate="both")
    assert made[0] == {"dynamic": False}
    assert isinstance(made[1], Captured)
