"""A training step never asks what the device holds: no host waits for it, and an attack can be captured whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import instar as I
import instar.train
from instar.data import ResidentImages, info
from instar.models import create
from instar.signals import Margin
from instar.threat import L1, L2

FIXED = ["pgd_at", "gairat", "trades", "mart", "mail_at", "mail_trades", "spat", "iseat", "at_awp", "gair_rst"]
REWEIGHTING = {"gairat", "mail_at", "mail_trades", "gair_rst"}
"""Their burn-in is over in the second of two epochs."""
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "allclose",
    "bincount",
}


class AskedError(AssertionError):
    """The host wanted to know what a tensor holds."""


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would wait for a GPU: values read on the host, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in WAITING:
            raise AskedError(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            places = [place for place in args[1] if place is not None]
            if any(place.dtype in (torch.bool, torch.uint8) for place in places):
                raise AskedError(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a tensor of the CPU without PyTorch's dispatcher being told."""

    def refuse(*given: object, **named: object) -> None:
        if watching():
            raise AskedError

    for name in ("tolist", "numpy", "cpu"):
        usual = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *given, usual=usual, **named: refuse() or usual(*given, **named))


def watching() -> bool:
    """Whether a `NoWaiting` is in force."""
    return any(isinstance(mode, NoWaiting) for mode in _get_current_dispatch_mode_stack())


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t.masked_fill_(t > 0, 1)[(t > 0).nonzero()],
        lambda t: t.__setitem__(t > 0, torch.ones(3)[t > 0]),
        lambda t: torch.equal(t, t),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.long().unique(),
        lambda t: torch.arange(int(t[0])),
    ],
)
def test_the_watch_sees_every_way_of_asking(ask: Any) -> None:
    with NoWaiting(), pytest.raises(AskedError):
        ask(torch.ones(3))


@pytest.fixture
def images() -> ResidentImages:
    draws = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (80, 1, 8, 8), generator=draws, dtype=torch.uint8)
    return ResidentImages(pictures, torch.randint(10, (80,), generator=draws), info("digits"))


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("recipe", FIXED)
def test_a_step_of_a_run_waits_for_nothing(
    recipe: str, images: ResidentImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = 2 if recipe in REWEIGHTING else 1
    make_step, watched = instar.train._step, []

    def step(*given: Any) -> dict[str, Tensor]:
        with NoWaiting():
            watched.append(make_step(*given))
        return watched[-1]

    monkeypatch.setattr(instar.train, "_step", step)
    instar.train.train(
        recipe,
        arguments={"steps": 2},
        out=tmp_path / "run",
        data=images,
        width=2,
        epochs=epochs,
        batch_size=24,
        selection=8,
        device="cpu",
    )
    assert len(watched) == epochs * (72 // 24)


@pytest.mark.parametrize(
    "attack",
    [
        I.pgd_at(steps=2).attack,
        I.trades(steps=2).attack,
        I.PGD(L2(0.5), Margin(), steps=2, step_size=0.2),
        I.PGD(L1(2.0), steps=2, step_size=0.5),
        I.PGD(steps=2, start=I.Zero()),
    ],
    ids=["linf", "kl", "l2", "l1", "zero"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_an_attack_runs_where_there_is_nothing_to_ask(attack: I.PGD, dtype: torch.dtype | None) -> None:
    """On the device "meta" tensors have shapes and no values, and none of the CPU's may come near them."""
    net = create(
        "small_cnn", classes=3, channels=1, image_size=8, width=2, mean=[0.5], std=[0.3], seed=0, head="cosine"
    )
    stand_in = I.Folded(net, dtype=dtype).to("meta")
    stand_in.logit_scale = net.head.scale.to("meta")
    x, y = torch.empty(4, 1, 8, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    found = attack(stand_in, I.Batch(x, y))
    assert found.x.device.type == found.kappa.device.type == "meta"
    assert found.x.shape == x.shape
