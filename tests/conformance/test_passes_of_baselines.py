"""What a step of each recipe costs: the numbers of the specification's table, counted while a step runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import instar as I
from instar.methods import RECIPES
from instar.models.heads import build_head
from instar.passes import Passes, passes

EXACT: dict[str, tuple[Passes, int]] = {
    "natural": (Passes(1, 0, 1), 3),
    "pgd_at": (Passes(11, 10, 1), 23),
    "gairat": (Passes(11, 10, 1), 23),
    "mail_at": (Passes(11, 10, 1), 23),
    "trades": (Passes(13, 10, 2), 27),
    "gair_trades": (Passes(13, 10, 2), 27),
    "mail_trades": (Passes(13, 10, 2), 27),
    "spat": (Passes(13, 10, 2), 27),
    "mart": (Passes(12, 10, 2), 26),
    "alp": (Passes(12, 10, 2), 26),
    "gair_rst": (Passes(24, 20, 3), 50),
    "iseat": (Passes(13, 10, 3), 29),
    "at_awp": (Passes(12, 10, 2), 26),
    "at_sam": (Passes(12, 10, 2), 26),
    "trades_awp": (Passes(15, 10, 4), 33),
    "mart_awp": (Passes(14, 10, 4), 32),
    "fgsm_at": (Passes(2, 1, 1), 5),
    "fast_at": (Passes(2, 1, 1), 5),
    "n_fgsm": (Passes(2, 1, 1), 5),
    "fgsm_sat": (Passes(2, 1, 1), 5),
    "free_at": (Passes(8, 0, 8), 24),
}
AT_MOST = {"fat": 23, "gair_fat": 23, "p_sat": 23, "h_sat": 23, "dynamic_at": 23, "fat_trades": 27, "fat_mart": 26}
OPTIONS = {
    "alp with a clean term": (I.alp(clean=1.0), Passes(12, 10, 2)),
    "gair_trades on both terms": (I.gair_trades(weighted="both"), Passes(13, 10, 2)),
    "gair_rst in its burn-in": (I.gair_rst().at(I.Progress(0, 2)), Passes(13, 10, 2)),
    "iseat before the first drop": (I.iseat().at(I.Progress(0, 2)), Passes(12, 10, 2)),
    "iseat without awp": (I.iseat(gamma=0.0), Passes(12, 10, 2)),
    "trades_awp in its warm-up": (I.trades_awp().at(I.Progress(0, 200)), Passes(13, 10, 2)),
    "at_awp of no length": (I.at_awp(gamma=0.0), Passes(11, 10, 1)),
    "grad_align of no strength": (I.grad_align(alignment=0), Passes(2, 1, 1)),
    "free_at, three replays": (I.free_at(replays=3), Passes(3, 0, 3)),
    "h_sat, last layer": (I.h_sat(bound=1.0), Passes(11, 10, 1)),
}


def test_every_recipe_has_its_number_in_this_file() -> None:
    # Two teachers of KD+SWA cost forward passes of their own; tests/methods/test_kd_swa.py counts the student's.
    assert {*EXACT, *AT_MOST, "grad_align"} == set(RECIPES) - {"kd_swa"}


@pytest.mark.parametrize("name", EXACT)
def test_a_step_of_a_recipe_costs_what_the_table_says(name: str) -> None:
    expected, units = EXACT[name]
    assert passes(RECIPES[name]()) == expected
    assert passes(RECIPES[name]()).units == units


@pytest.mark.parametrize("name", OPTIONS)
def test_a_part_that_is_switched_off_costs_nothing(name: str) -> None:
    method, expected = OPTIONS[name]
    assert passes(method) == expected


@pytest.mark.parametrize("name", AT_MOST)
def test_an_attack_that_may_stop_costs_no_more_than_the_one_that_does_not(name: str) -> None:
    for epoch in (0, 5, 9):
        method = RECIPES[name]().at(I.Progress(epoch, 10))
        assert passes(method).units <= AT_MOST[name]
    whole = replace(method, attack=replace(method.attack, stop=None))
    assert passes(whole).units == AT_MOST[name]


def test_attacks_that_stop_at_once_cost_the_look_that_stopped_them_and_the_training_pass() -> None:
    # Every difficulty exceeds these bounds, so that no image is moved.
    assert passes(replace(I.h_sat(), attack=replace(I.h_sat().attack, stop=I.Exceeds(I.LastLayerCurvature(), -1)))) == (
        Passes(2, 1, 1)
    )
    assert passes(I.dynamic_at(bound=1e9)) == Passes(2, 1, 1)


def _head(method: I.Method) -> str:
    return "cosine" if method.requires else "linear"


class Watched(nn.Module):
    """A real little network that counts forwards and tells when a gradient of a weight is computed."""

    def __init__(self, head: str = "linear") -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), build_head(head, 48, 3)
        self.forwards = self.weight_gradients = 0
        for p in self.parameters():
            p.register_hook(self._seen)

    def _seen(self, gradient: Tensor) -> None:
        self.weight_gradients += 1

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@pytest.mark.parametrize("name", [*(name for name in EXACT if name != "free_at"), "grad_align"])
def test_forwards_on_a_real_network_are_as_many_and_attacks_compute_no_gradient_of_weights(name: str) -> None:
    method, forwards = RECIPES[name](), EXACT[name][0].forward if name in EXACT else 4
    model, batch = Watched(_head(method)), I.Batch(torch.rand(4, 1, 4, 4), torch.arange(4) % 3)
    adversary = method.at(I.Progress(1, 1)).attack(model, batch)
    assert model.weight_gradients == 0
    loss, _, _ = I.training_loss(model, method, batch, adversary=adversary)
    assert model.forwards == forwards
    assert model.weight_gradients == 0
    loss.mean().backward()
    assert model.forwards == forwards
    assert model.weight_gradients == len(list(model.parameters()))


class Deep(nn.Module):
    """Equal layers without normalisation, whose multiplications are almost all of the work."""

    def __init__(self, head: str = "linear") -> None:
        super().__init__()
        width, layers = 32, 12
        self.layers = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Softplus())))
        self.head = build_head(head, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(1)))


class Multiplications(TorchDispatchMode):
    """Counts those of all matrix products, also of backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def _measured(method: I.Method) -> float:
    """The multiplications of one training step, in units of those of a forward pass."""
    model, batch = Deep(_head(method)), I.Batch(torch.rand(4, 2, 4, 4), torch.arange(4))
    with Multiplications() as once, torch.no_grad():
        model(batch.x)
    with Multiplications() as counted:
        I.training_step(model, method, batch, torch.optim.SGD(model.parameters(), lr=0.0))
    return counted.total / once.total


@pytest.mark.parametrize("name", EXACT)
def test_units_are_the_multiplications_of_a_step_in_those_of_a_forward_pass(name: str) -> None:
    # A full backward pass saves the gradient of its own input, 1 of 13 layers.
    assert _measured(RECIPES[name]()) == pytest.approx(EXACT[name][1], abs=EXACT[name][0].backward_full / 10)


def test_grad_align_costs_the_specified_eleven_to_thirteen_units() -> None:
    # Four forward passes, three backward passes to the input, a full one, and one through a gradient, which goes back
    # through a forward and a backward pass: 4 + 3 + 2 + 4.
    assert _measured(I.grad_align()) == pytest.approx(13, abs=0.1)
    found = passes(I.grad_align())
    assert found.forward == 4
    assert 11 <= found.units <= 13
