"""Every recipe trains through the whole machine, and resumes bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instar.methods import RECIPES
from instar.train import Event, Interrupted, StepDone, train

SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 512, "epochs": 2, "precision": "float32"}
LEFT_OUT = {"kd_swa"}  # needs a teacher: tests/methods/test_kd_swa.py
SPECIAL = {"h_sat": {"estimator": "power", "bound": 0.5}}


def _interrupting(at: int):
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if isinstance(event, StepDone) and seen == at:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


@pytest.mark.parametrize("name", sorted(set(RECIPES) - LEFT_OUT))
def test_a_recipe_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    arguments = SPECIAL.get(name, {}) | ({"steps": 2} if "steps" in (RECIPES[name].__kwdefaults__ or {}) else {})
    whole = train(name, out=tmp_path / "whole", arguments=arguments, **SMALL)
    assert len(whole.log) == 2
    with pytest.raises(Interrupted):
        train(name, out=tmp_path / "parts", arguments=arguments, on_event=_interrupting(3), **SMALL)
    train(name, out=tmp_path / "parts", arguments=arguments, resume=True, **SMALL)
    for part in ("state", "best", "last"):
        a, b = (load_file(tmp_path / run / "checkpoints" / f"{part}.safetensors") for run in ("whole", "parts"))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
