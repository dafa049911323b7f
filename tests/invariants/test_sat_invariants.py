"""The invariants of SAT's variants: P-SAT's strict, one-step and clipped forms, H-SAT, and the baseline Dynamic-AT.

What the specification says of P-SAT itself is in test_p_sat_invariants.py, of the eigenvalues of Hessians in
closed_form/test_curvature.py. Here, of section B:

Strict: gap ≤ λ where the start was feasible, one step less or none, the fall-back, the last iterate
    test_strict_takes_back_the_step_that_crossed_and_no_other
One step to the bound (FGSM-SAT)
    test_one_step_ends_at_the_bound_of_a_linear_difficulty_and_who_is_there_takes_none
    test_a_bound_out_of_reach_is_approached_by_a_quarter_more_than_the_radius
    test_the_one_step_attack_is_the_loop_of_the_published_code
Clipped objectives
    test_the_clipped_cross_entropy_has_no_gradient_once_the_true_class_is_down_to_the_floor
    test_a_clipped_objective_moves_an_instance_until_it_is_reached
    test_a_floor_of_zero_is_pgd_at_and_an_infinite_hinge_the_margin_attack_bit_for_bit
H-SAT: ψ, its limits, its references
    test_the_last_layers_difficulty_is_twice_the_largest_eigenvalue_and_lies_between_zero_and_one
    test_a_bound_of_one_is_pgd_at_bit_for_bit_and_at_its_cost
    test_the_first_crossing_of_the_curvature_stops_for_good_although_it_falls_again
    test_gauss_newton_of_the_head_is_the_closed_form_over_the_reference
    test_references_are_taken_at_the_whole_attack_every_so_many_steps
    test_taking_a_reference_leaves_the_start_and_the_random_numbers_as_they_were
    test_the_power_estimator_is_the_loop_with_dense_hessians
    test_what_a_method_shares_between_steps_survives_the_disk
    test_a_resumed_run_with_the_power_estimator_equals_the_uninterrupted_one_bit_for_bit
Dynamic-AT
    test_the_stationarity_gap_is_the_formula_and_never_negative_in_the_ball
    test_the_stationarity_gap_is_zero_where_a_linear_objective_is_largest
    test_dynamic_at_stops_at_the_first_iterate_below_the_bound
    test_dynamic_at_with_a_bound_of_zero_is_pgd_at_bit_for_bit
All rules
    test_who_stopped_stays_stopped
    test_schedules_end_where_the_recipes_say
    test_a_bound_or_name_that_cannot_be_meant_is_one_clear_line
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import instar as I
from instar.checkpoint import State, load_state, save_state
from instar.instances import InstanceTable, read_instances
from instar.methods.dynamic_at import StationarityGap
from instar.methods.h_sat import ESTIMATORS
from instar.methods.p_sat import ClippedCrossEntropy, LinearisedStep
from instar.train import Event, Interrupted, StepDone, train

SIZE, CLASSES, STEPS, EPS = 8, 4, 10, 0.3
PLACE = {"eps": EPS, "step_size": EPS / STEPS, "steps": STEPS}


def _seed(number: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """Of the network in eval mode, without gradient."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def _gap(logits: Tensor, y: Tensor) -> Tensor:
    """ψ of P-SAT (B,), written out."""
    p = logits.softmax(1)
    return torch.stack([max(v for k, v in enumerate(row) if k != int(j)) - row[j] for row, j in zip(p, y, strict=True)])


def _mu(logits: Tensor) -> Tensor:
    """Largest eigenvalue (B,) of diag p − p pᵀ, by a dense solver."""
    p = logits.softmax(1)
    return torch.linalg.eigvalsh(torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))[:, -1]


def _curvature(logits: Tensor, y: Tensor) -> Tensor:
    """ψ of H-SAT's last layer (B,), written out."""
    return 2 * _mu(logits)


def _trajectory(attack: I.PGD, model: nn.Module, batch: I.Batch, seed: int = 7) -> Tensor:
    """Iterates (K + 1, B, C, H, W) of the attack that nothing stops."""
    whole = replace(attack, stop=None, overshoot=True)
    return torch.stack(
        [replace(whole, steps=k)(model, batch, generator=_seed(seed)).x for k in range(attack.steps + 1)]
    )


def _first(stops: Tensor, otherwise: int) -> Tensor:
    """The first row (B,) in which a column of (K + 1, B) is True."""
    return torch.where(stops.any(0), stops.int().argmax(0), torch.tensor(otherwise))


def _single_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(I.UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "difficulty"), [(I.p_sat, _gap), (I.h_sat, _curvature)], ids=["probability_gap", "curvature"]
)
def test_strict_takes_back_the_step_that_crossed_and_no_other(
    model: nn.Module, batch: I.Batch, recipe: Callable[..., I.Method], difficulty: Callable[[Tensor, Tensor], Tensor]
) -> None:
    iterates = _trajectory(I.pgd_at(**PLACE).attack, model, batch)
    values = torch.stack([difficulty(_logits(model, x), batch.y) for x in iterates])
    clean = difficulty(_logits(model, batch.x), batch.y)
    # Bounds around every value that there is, those of last iterates included.
    ordered = torch.cat([values.flatten(), clean]).sort().values
    bounds = [float(b) for b in (ordered[1:] + ordered[:-1]) / 2][::3]
    # An instance whose last iterate is its hardest crosses at the last step of all.
    hardest = (values[-1] - values[:-1].amax(0)).argmax()
    assert values[-1, hardest] > values[:-1, hardest].max()
    bounds.append(float((values[-1, hardest] + values[:-1, hardest].max()) / 2))
    seen = set()
    for bound in bounds:
        kept = recipe(bound=bound, **PLACE).attack(model, batch, generator=_seed())
        found = recipe(bound=bound, strict=True, **PLACE).attack(model, batch, generator=_seed())
        values_found = difficulty(_logits(model, found.x), batch.y)
        crossing = _first(values > bound, STEPS + 1)
        for i in range(SIZE):
            first = int(crossing[i])
            assert int(kept.moves[i]) == min(first, STEPS)
            if first == 0:
                case = "clean" if clean[i] <= bound else "start"
                expected, moves = (batch.x if case == "clean" else iterates[0])[i], 0
            else:
                case = "never" if first > STEPS else "last" if first == STEPS else "taken back"
                expected, moves = iterates[first - 1, i], first - 1
            seen.add(case)
            assert int(found.moves[i]) == moves
            assert int(kept.moves[i]) - moves == (case in ("last", "taken back"))
            torch.testing.assert_close(found.x[i], expected, rtol=0, atol=1e-12)
            if case != "start":
                assert values_found[i] <= bound + 1e-12
    assert seen == {"clean", "start", "never", "last", "taken back"}


class Affine(I.Signal):
    """⟨w, x′ − x⟩ + c_i: a difficulty that is linear in the image."""

    def __init__(self, weight: Tensor, offset: Tensor) -> None:
        self.weight, self.offset = weight, offset

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"adv"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return ((evidence.x_adv - evidence.x) * self.weight).flatten(1).sum(1) + self.offset


def _linear(norm: str) -> tuple[Affine, I.Batch, float]:
    """A linear difficulty with offsets from −0.5 to 0.5, images in the middle of the box, and the slope in the norm."""
    x = 0.4 + 0.2 * torch.rand(SIZE, 1, 6, 6, dtype=torch.float64)
    weight = torch.randn(1, 6, 6, dtype=torch.float64)
    slope = {"Linf": weight.abs().sum(), "L2": weight.square().sum().sqrt(), "L1": weight.abs().max()}[norm]
    offset = torch.linspace(-0.5, 0.5, SIZE, dtype=torch.float64)
    return Affine(weight, offset), I.Batch(x, torch.zeros(SIZE, dtype=torch.int64)), float(slope)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_one_step_ends_at_the_bound_of_a_linear_difficulty_and_who_is_there_takes_none(
    model: nn.Module, norm: str
) -> None:
    difficulty, batch, slope = _linear(norm)
    ball = I.ball(norm, 0.7 / slope)
    for start in (I.Zero(), I.Uniform(0.2)):
        begun = start(batch.x, ball, _seed())
        before = difficulty(I.Evidence(x=batch.x, y=batch.y, x_adv=begun))
        bound = float(before.sort().values[5])  # of one instance exactly, and below those of two more
        attack = LinearisedStep(ball, bound, difficulty, start=start)
        found = attack(model, batch, generator=_seed())
        after = difficulty(I.Evidence(x=batch.x, y=batch.y, x_adv=found.x))
        below = before < bound
        assert int(below.sum()) == SIZE - 3
        assert found.moves.tolist() == below.int().tolist()
        assert torch.equal(found.x[~below], begun[~below])
        # But for the 1e-9 that keeps the published code from dividing by zero.
        torch.testing.assert_close(after[below], torch.full_like(after[below], bound), rtol=0, atol=2e-9)
        assert float((before - bound).abs()[below].max()) > 0.3
        assert bool((ball.size(found.x - batch.x) < attack.limit.radius - 1e-3 * ball.radius).all()), "nothing clipped"


@pytest.mark.parametrize("reach", [1.25, 1.0])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_bound_out_of_reach_is_approached_by_a_quarter_more_than_the_radius(
    model: nn.Module, norm: str, reach: float
) -> None:
    difficulty, batch, slope = _linear(norm)
    ball = I.ball(norm, 0.2 / slope)
    attack = LinearisedStep(ball, 10.0, difficulty, reach=reach)
    assert LinearisedStep(ball, 10.0, difficulty).reach == I.fgsm_sat().attack.reach == 1.25
    assert attack.limit == I.ball(norm, reach * ball.radius)
    for start, rises in ((I.Zero(), True), (I.Uniform(), False)):
        found = replace(attack, start=start)(model, batch, generator=_seed())
        size = ball.size(found.x - batch.x)
        assert bool((size <= reach * ball.radius + 1e-12).all())
        rise = difficulty(I.Evidence(x=batch.x, y=batch.y, x_adv=found.x)) - difficulty.offset
        if rises:
            torch.testing.assert_close(rise, torch.full_like(rise, 0.2 * reach), rtol=0, atol=1e-12)
            torch.testing.assert_close(size, torch.full_like(size, reach * ball.radius), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_one_step_attack_is_the_loop_of_the_published_code(model: nn.Module, batch: I.Batch, norm: str) -> None:
    net = copy.deepcopy(model).eval()
    shares = []
    for eps, bound in ((0.3, -0.5), (0.3, 0.0), (0.3, 0.4), (0.03, 0.4), (0.03, 1.0)):
        ball = I.ball(norm, eps if norm == "Linf" else 4 * eps)
        longest = 1.25 * ball.radius
        found = I.fgsm_sat(bound=bound, eps=ball.radius, norm=norm).attack(model, batch, generator=_seed())
        start = I.Uniform()(batch.x, ball, _seed())
        for i in range(SIZE):
            leaf = start[i : i + 1].clone().requires_grad_()
            p, label = net(leaf).softmax(1)[0], int(batch.y[i])
            psi = torch.stack([v for k, v in enumerate(p) if k != label]).max() - p[label]
            (g,) = torch.autograd.grad(psi, leaf)
            dual = g.abs().sum() if norm == "Linf" else g.square().sum().sqrt()
            length = min(max(bound - float(psi.detach()), 0.0) / (float(dual) + 1e-9), longest)
            shares.append(length / longest)
            direction = g.sign() if norm == "Linf" else g / dual
            moved = replace(ball, eps=longest).project(leaf.detach() + length * direction, batch.x[i : i + 1])
            torch.testing.assert_close(found.x[i], moved[0], rtol=0, atol=1e-12)
            assert int(found.moves[i]) == (length > 0)
    assert min(shares) == 0
    assert max(shares) == 1
    assert any(0 < share < 1 for share in shares)


def test_the_clipped_cross_entropy_has_no_gradient_once_the_true_class_is_down_to_the_floor() -> None:
    z = (2 * torch.randn(200, CLASSES, dtype=torch.float64)).requires_grad_()
    y = torch.arange(200) % CLASSES
    evidence = I.Evidence(x=torch.zeros(200, 1, 1, 1), y=y, adv=z)
    p = z.detach().softmax(1)[torch.arange(200), y]
    plain = I.CrossEntropy()(evidence)
    (whole,) = torch.autograd.grad(plain.sum(), z, retain_graph=True)
    for floor in (0.0, 0.1, 0.5, 1.0):
        loss = ClippedCrossEntropy(floor)(evidence)
        (gradient,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
        down = p <= floor
        assert bool(down.any()) == (floor > 0)
        assert bool((~down).any()) == (floor < 1)
        assert torch.equal(gradient[~down], whole[~down])
        assert not gradient[down].any()
        assert torch.equal(loss[~down], plain[~down])
        if floor:
            torch.testing.assert_close(loss[down], torch.full_like(loss[down], -math.log(floor)), rtol=0, atol=1e-15)
    capped = I.Margin(cap=1.0)(evidence)
    (gradient,) = torch.autograd.grad(capped.sum(), z)
    margin = I.Margin()(evidence)
    assert bool((margin > 1).any())
    assert bool((gradient.abs().sum(1) == 0).eq(margin > 1).all())
    assert torch.equal(capped, margin.clamp_max(1.0))


@pytest.mark.parametrize("by", ["clipped_ce", "hinge"])
def test_a_clipped_objective_moves_an_instance_until_it_is_reached(model: nn.Module, batch: I.Batch, by: str) -> None:
    objective = I.CrossEntropy() if by == "clipped_ce" else I.Margin()
    iterates = _trajectory(I.PGD(I.Linf(EPS), objective, steps=STEPS, step_size=EPS / STEPS), model, batch)
    held = set()
    for bound in (0.1, 0.2, 0.3, 0.5) if by == "clipped_ce" else (-2.0, -1.0, 0.0, 1.0):
        stops = []
        for x in iterates:
            logits = _logits(model, x)
            p = logits.softmax(1)[torch.arange(SIZE), batch.y]
            true = logits[torch.arange(SIZE), batch.y]
            best = torch.stack([torch.cat([z[:j], z[j + 1 :]]).max() for z, j in zip(logits, batch.y, strict=True)])
            stops.append(p <= bound if by == "clipped_ce" else best - true >= bound)
        first = _first(torch.stack(stops), STEPS)
        found = I.p_sat(by=by, bound=bound, **PLACE).attack(model, batch, generator=_seed())
        torch.testing.assert_close(found.x, iterates[first, torch.arange(SIZE)], rtol=0, atol=1e-12)
        held |= set(first.tolist())
    assert len(held) >= 4, "bounds that hold nothing back would show nothing"


def _record(model: nn.Module, method: I.Method, batch: I.Batch, seed: int | None = 7) -> tuple[list[Tensor], int]:
    """All that one training step makes and leaves, and how many forwards it takes."""
    net, forwards = copy.deepcopy(model), []
    net.register_forward_hook(lambda *_: forwards.append(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if seed is None:
        torch.manual_seed(11)
    computed, _ = I.training_step(net, method, batch, optimizer, generator=None if seed is None else _seed(seed))
    a = computed.adversary
    return [computed.loss.detach(), a.x, a.kappa, a.inspected, a.moves, *net.state_dict().values()], len(forwards)


def _equal(ours: tuple[list[Tensor], int], theirs: tuple[list[Tensor], int]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True)) and ours[1] == theirs[1]


def test_a_floor_of_zero_is_pgd_at_and_an_infinite_hinge_the_margin_attack_bit_for_bit(
    model: nn.Module, batch: I.Batch
) -> None:
    plain = I.pgd_at(**PLACE)
    assert _equal(_record(model, I.p_sat(by="clipped_ce", bound=0.0, **PLACE), batch), _record(model, plain, batch))
    margin = I.Method(replace(plain.attack, objective=I.Margin()), I.CrossEntropy())
    found = _record(model, I.p_sat(by="hinge", bound=math.inf, **PLACE), batch)
    assert _equal(found, _record(model, margin, batch))
    assert not _equal(found, _record(model, plain, batch))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_last_layers_difficulty_is_twice_the_largest_eigenvalue_and_lies_between_zero_and_one(classes: int) -> None:
    spread = torch.logspace(-2, 2, 300, dtype=torch.float64).unsqueeze(1)
    z = spread * torch.randn(300, classes, dtype=torch.float64)
    y = torch.arange(300) % classes
    psi = I.LastLayerCurvature()(I.Evidence(x=torch.zeros(300, 1, 1, 1), y=y, adv=z))
    torch.testing.assert_close(psi, _curvature(z, y), rtol=0, atol=1e-14)
    assert bool(((psi >= 0) & (psi <= 1)).all())
    assert psi.max() > (0.9 if classes < 10 else 0.5)
    assert psi.min() < 1e-3
    if classes == 2:  # the curvature of logistic regression: largest at the boundary, whichever side
        torch.testing.assert_close(psi, 1 - _gap(z, y).square(), rtol=0, atol=1e-14)
    equal = I.LastLayerCurvature()(I.Evidence(x=torch.zeros(1, 1, 1, 1), y=y[:1], adv=torch.zeros(1, classes)))
    assert equal.item() == pytest.approx(2 / classes)


@pytest.mark.parametrize("seed", [7, None], ids=["own_generator", "global_generator"])
@pytest.mark.parametrize("strict", [False, True], ids=["overshoot", "strict"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bound_of_one_is_pgd_at_bit_for_bit_and_at_its_cost(
    model: nn.Module, batch: I.Batch, estimator: str, strict: bool, seed: int | None
) -> None:
    plain = _record(model, I.pgd_at(**PLACE), batch, seed)
    for bound in (1.0, 1.5, I.Ramp(0.2, 1.0, 0.3, 0.7)):  # schedules stand at their end
        method = I.h_sat(bound=bound, estimator=estimator, strict=strict, **PLACE)
        assert _equal(_record(model, method, batch, seed), plain)
    assert plain[1] == STEPS + 1
    assert not batch.shared
    lower = _record(model, I.h_sat(bound=0.3, estimator=estimator, strict=strict, **PLACE), batch, seed)
    assert not _equal(lower, plain)


def test_the_first_crossing_of_the_curvature_stops_for_good_although_it_falls_again() -> None:
    # A logistic model walks over its boundary, where the curvature is largest, to where it is sure again.
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[-5.0] * 4, [5.0] * 4]))
        net[1].bias.copy_(torch.tensor([10.0, -10.0]))
    # Rows stand further and further from the boundary at a mean of 0.5.
    x = torch.tensor([0.45, 0.4, 0.35], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 1, 2, 2).clone()
    batch = I.Batch(x, torch.zeros(3, dtype=torch.int64))
    attack = replace(I.h_sat(bound=0.9, eps=0.35, step_size=0.02, steps=17).attack, start=I.Zero())
    psi = torch.stack([_curvature(_logits(net, x), batch.y) for x in _trajectory(attack, net, batch)])
    above = psi > 0.9
    assert above.any(0).all()
    assert not above[-1].any(), "all have crossed back by the end"
    found = attack(net, batch)
    first = _first(above, 17)
    assert len(set(first.tolist())) == 3
    assert found.moves.tolist() == first.tolist()
    torch.testing.assert_close(found.x, x + 0.02 * first.double().view(-1, 1, 1, 1), rtol=0, atol=1e-12)


def _of_head(model: nn.Module, x: Tensor) -> Tensor:
    """(‖h‖² + 1) μ(p) (B,)."""
    net = copy.deepcopy(model).eval()
    with torch.no_grad():
        return (net.features(x).square().sum(1) + 1) * _mu(net(x))


def test_gauss_newton_of_the_head_is_the_closed_form_over_the_reference(model: nn.Module, images: Tensor) -> None:
    net = model.eval()
    expected = _of_head(net, images)
    assert len(set(expected.tolist())) == SIZE
    for reference in (2 * expected.max(), expected.median(), expected.min() / 2):
        evidence = I.Evidence(
            x=images,
            y=torch.zeros(SIZE, dtype=torch.int64),
            x_adv=images,
            params={name: p.detach() for name, p in net.named_parameters()},
            shared={"h_sat.reference.gauss_newton": reference},
            forward=lambda x, p=None: functional_call(net, p or {}, (x,)),
        )
        psi = I.GaussNewtonCurvature(of="head")(evidence)
        torch.testing.assert_close(psi, (expected / reference).clamp_max(1), rtol=1e-12, atol=0)
        everything = I.GaussNewtonCurvature()(evidence)
        assert bool((everything >= psi - 1e-12).all()), "a block has no larger eigenvalue than the whole"
    with pytest.raises(I.UserError, match="no parameter whose name begins with 'tail'"):
        I.GaussNewtonCurvature(of="tail")(evidence)


def test_references_are_taken_at_the_whole_attack_every_so_many_steps(model: nn.Module, batch: I.Batch) -> None:
    every, memory, bound = 3, 0.75, 0.6
    difficulty = I.GaussNewtonCurvature(of="head", every=every, memory=memory)
    plain = I.pgd_at(**PLACE).attack
    method = I.Method(replace(plain, stop=I.Exceeds(difficulty, bound)), I.CrossEntropy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    shared: dict[str, Tensor] = {}
    reference, taken, stopped = None, [], 0
    for step in range(2 * every + 1):
        given = replace(batch, shared=shared)
        iterates = _trajectory(plain, model, batch, seed=step)
        if step % every == 0:
            found = torch.stack([_of_head(model, x).mean() for x in iterates]).max()
            reference = found if reference is None else memory * reference + (1 - memory) * found
            taken.append(float(reference))
        psi = torch.stack([(_of_head(model, x) / reference).clamp_max(1) for x in iterates])
        first = _first(psi > bound, STEPS)
        computed, _ = I.training_step(model, method, given, optimizer, generator=_seed(step))
        torch.testing.assert_close(shared["h_sat.reference.gauss_newton"], reference, rtol=1e-12, atol=0)
        assert int(shared["h_sat.age.gauss_newton"]) == step + 1
        assert computed.adversary.moves.tolist() == first.tolist()
        torch.testing.assert_close(computed.adversary.x, iterates[first, torch.arange(SIZE)], rtol=0, atol=1e-11)
        stopped += int((first < STEPS).sum())
    assert len(set(taken)) == 3
    assert 0 < stopped < SIZE * (2 * every + 1)


@pytest.mark.parametrize("own", [True, False], ids=["own_generator", "global_generator"])
@pytest.mark.parametrize("estimator", ["gauss_newton", "power"])
def test_taking_a_reference_leaves_the_start_and_the_random_numbers_as_they_were(
    model: nn.Module, batch: I.Batch, estimator: str, own: bool
) -> None:
    def attacked(method: I.Method) -> tuple[I.Adversary, Tensor]:
        generator = torch.Generator() if own else torch.default_generator
        generator.manual_seed(5)
        found = method.attack(model, batch, generator=generator if own else None)
        return found, generator.get_state()

    start = I.Uniform()(batch.x, I.Linf(EPS), _seed(5))
    found, after = attacked(I.h_sat(bound=0.0, estimator=estimator, **PLACE))
    key = {"gauss_newton": "gauss_newton", "power": "hessian"}[estimator]
    assert float(batch.shared[f"h_sat.reference.{key}"]) > 0, "it was taken"
    assert found.moves.tolist() == [0] * SIZE, "every curvature is above 0"
    assert torch.equal(found.x, start)
    whole, expected = attacked(I.pgd_at(**PLACE))
    assert torch.equal(after, expected)
    assert not torch.equal(whole.x, start)


def _dense_hessian(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian (P, P) of the mean cross-entropy in all weights, by autograd's own dense routine."""
    named = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named, flat.split(sizes), strict=True)
        weights = {name: part.view_as(named[name]) for name, part in parts}
        return F.cross_entropy(functional_call(net, weights, (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in named.values()]))


def test_the_power_estimator_is_the_loop_with_dense_hessians() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    x, y = torch.rand(6, 1, 2, 2, dtype=torch.float64), torch.arange(6) % 3
    every, memory, bound, steps = 2, 0.5, 0.97, 4
    difficulty = I.HessianCurvature(cold=400, every=every, memory=memory)
    plain = I.PGD(I.Linf(0.3), steps=steps, step_size=0.1)
    method = I.Method(replace(plain, stop=I.Exceeds(difficulty, bound)), I.CrossEntropy())
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    shared: dict[str, Tensor] = {}
    vector = reference = None
    counts = []
    for step in range(6):
        iterates = _trajectory(plain, net, I.Batch(x, y), seed=step)
        if step % every == 0:
            seen = []
            for x_k in iterates:
                hessian = _dense_hessian(net, x_k, y)
                if vector is None:  # a cold start has iterations enough to forget where it began
                    values, vectors = torch.linalg.eigh(hessian)
                    top = values.abs().argmax()
                    rho, vector = values[top], vectors[:, top]
                else:
                    rho = vector @ hessian @ vector
                    vector = F.normalize(hessian @ vector, dim=0)
                seen.append(rho)
            rho = torch.stack(seen).max()
            reference = rho if reference is None else memory * reference + (1 - memory) * rho
        moves = steps
        for k in range(steps):
            hessian = _dense_hessian(net, iterates[k], y)
            rho = vector @ hessian @ vector
            vector = F.normalize(hessian @ vector, dim=0)
            if min(1.0, float(rho / reference)) > bound:
                moves = k
                break
        computed, _ = I.training_step(net, method, I.Batch(x, y, shared=shared), optimizer, generator=_seed(step))
        counts.append(moves)
        assert computed.adversary.moves.tolist() == [moves] * 6
        torch.testing.assert_close(computed.adversary.x, iterates[moves], rtol=0, atol=1e-12)
        torch.testing.assert_close(shared["h_sat.reference.hessian"], reference, rtol=1e-8, atol=0)
        kept = torch.cat([shared[f"h_sat.vector.{name}"].flatten() for name, _ in net.named_parameters()])
        torch.testing.assert_close(kept * (kept @ vector).sign(), vector, rtol=0, atol=1e-7)
    assert len(set(counts)) > 1, f"a bound that all or none exceed shows nothing: {counts}"


def test_what_a_method_shares_between_steps_survives_the_disk(model: nn.Module, batch: I.Batch, tmp_path: Path) -> None:
    def fresh(net: nn.Module) -> State:
        return State(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), InstanceTable(SIZE))

    method = I.h_sat(bound=0.5, estimator="power", **PLACE)
    straight = fresh(copy.deepcopy(model))

    def step(state: State, number: int) -> I.Loss:
        given = replace(batch, shared=state.table.shared)
        return I.training_step(state.model, method, given, state.optimizer, generator=_seed(number))[0]

    for number in range(2):
        step(straight, number)
    save_state(straight, tmp_path / "state.safetensors", fingerprint="one")
    resumed = fresh(copy.deepcopy(model))
    handed_out = resumed.table.shared
    handed_out["left over"] = torch.zeros(1)
    load_state(resumed, tmp_path / "state.safetensors", fingerprint="one")
    assert resumed.table.shared is handed_out
    names = {f"h_sat.vector.{name}" for name, _ in model.named_parameters()}
    assert resumed.table.shared.keys() == names | {"h_sat.reference.hessian", "h_sat.age.hessian"}
    for number in (2, 3):
        for key, kept in straight.table.shared.items():
            assert torch.equal(resumed.table.shared[key], kept)
            assert resumed.table.shared[key].dtype == kept.dtype
        ours, theirs = step(resumed, number), step(straight, number)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.adversary.x, theirs.adversary.x)
    assert int(straight.table.shared["h_sat.age.hessian"]) == 4
    length = sum(float(straight.table.shared[name].square().sum()) for name in names)
    assert length == pytest.approx(1.0, abs=1e-12)


SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 2, "precision": "float32"}


def _interrupting(at: int) -> Callable[[Event], None]:
    """Ask to stop after the step with this number in the session, as Ctrl-C does."""
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        if isinstance(event, StepDone):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGINT)

    return watch


def test_a_resumed_run_with_the_power_estimator_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    arguments = {"bound": 0.5, "estimator": "power", "steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = train("h_sat", out=whole, arguments=arguments, **SMALL).log
    for resume, at in ((False, 2), (True, 3), (True, 2)):  # within epoch 0, at its end, within epoch 1
        with pytest.raises(Interrupted, match="--resume"):
            train("h_sat", out=parts, arguments=arguments, resume=resume, on_event=_interrupting(at), **SMALL)
    train("h_sat", out=parts, arguments=arguments, resume=True, **SMALL)
    for name in ("state", "best", "last"):
        a, b = (load_file(folder / "checkpoints" / f"{name}.safetensors") for folder in (whole, parts))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    state = load_file(parts / "checkpoints" / "state.safetensors")
    updates = int(state["shared.h_sat.age.hessian"])
    assert updates == 10
    assert state["shared.h_sat.reference.hessian"].ndim == 0
    assert "shared.h_sat.vector.conv1.weight" in state
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole, parts)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    for number in range(2):
        tables = [read_instances(folder / "instances" / f"epoch_{number:03d}.npz") for folder in (whole, parts)]
        assert all((tables[0][key] == tables[1][key]).all() for key in tables[0])
    # The rule did something: plain adversarial training of the same seed goes another way.
    other = train("pgd_at", out=tmp_path / "plain", arguments={"steps": 2}, **SMALL).log
    assert other[-1]["train_loss"] != log[-1]["train_loss"]


BALLS = {"Linf": I.Linf(0.1), "L2": I.L2(0.5), "L1": I.L1(2.0)}


def _points(ball: I.Ball, x: Tensor) -> Tensor:
    """Images in the ball: random ones, some on its surface, and the centre."""
    moved = x + 5 * ball.sample(x, _seed())
    moved[::3] = x[::3] + 0.5 * ball.sample(x, _seed())[::3]
    moved[0] = x[0]
    return ball.project(moved, x)


def _stationarity(ball: I.Ball, x: Tensor, moved: Tensor, g: Tensor) -> list[float]:
    """FOSC by loops: radius times the dual norm, less the inner product."""
    found = []
    for a, b, slope in zip(x.flatten(1).tolist(), moved.flatten(1).tolist(), g.flatten(1).tolist(), strict=True):
        dual = {
            "Linf": sum(abs(v) for v in slope),
            "L2": math.sqrt(sum(v * v for v in slope)),
            "L1": max(abs(v) for v in slope),
        }[ball.norm]
        found.append(ball.radius * dual - sum((q - p) * v for p, q, v in zip(a, b, slope, strict=True)))
    return found


@pytest.mark.parametrize("norm", BALLS)
def test_the_stationarity_gap_is_the_formula_and_never_negative_in_the_ball(norm: str) -> None:
    ball = BALLS[norm]
    x, g = torch.rand(60, 1, 5, 5, dtype=torch.float64), torch.randn(60, 1, 5, 5, dtype=torch.float64)
    moved = _points(ball, x)
    y = torch.zeros(60, dtype=torch.int64)
    gap = StationarityGap()(I.Evidence(x=x, y=y, x_adv=moved, input_grad=g, ball=ball))
    assert gap.tolist() == pytest.approx(_stationarity(ball, x, moved, g), abs=1e-12)
    assert bool((gap > 0).all())
    assert gap[0].item() == pytest.approx(float(ball.support(g)[0])), "at the centre all is left to gain"


@pytest.mark.parametrize("norm", BALLS)
def test_the_stationarity_gap_is_zero_where_a_linear_objective_is_largest(norm: str) -> None:
    ball = I.ball(norm, 0.1)
    x, g = 0.3 + 0.4 * torch.rand(40, 1, 5, 5, dtype=torch.float64), torch.randn(40, 1, 5, 5, dtype=torch.float64)
    best = x + 0.1 * ball.steepest(g, x)
    y = torch.zeros(40, dtype=torch.int64)
    evidence = I.Evidence(x=x, y=y, x_adv=best, input_grad=g, ball=ball)
    assert float(StationarityGap()(evidence).abs().max()) < 1e-14
    # Opposite of it there is twice the rise to gain.
    opposite = StationarityGap()(replace(evidence, x_adv=2 * x - best))
    torch.testing.assert_close(opposite, 2 * ball.support(g), rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_dynamic_at_stops_at_the_first_iterate_below_the_bound(model: nn.Module, batch: I.Batch, norm: str) -> None:
    net = copy.deepcopy(model).eval()
    eps = {"Linf": 0.1, "L2": 0.6, "L1": 2.0}[norm]
    place = {"eps": eps, "step_size": eps / 4, "steps": STEPS, "norm": norm}
    plain = I.pgd_at(**place).attack
    iterates = _trajectory(plain, model, batch)
    gaps = []
    for x in iterates:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(leaf), batch.y, reduction="sum"), leaf)
        gaps.append(_stationarity(plain.ball, batch.x, x, g))
    values = torch.tensor(gaps, dtype=torch.float64)
    seen = set()
    for bound in torch.quantile(values.flatten(), torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98]).double()).tolist():
        found = I.dynamic_at(bound=bound, **place).attack(model, batch, generator=_seed())
        first = _first(values < bound, STEPS)
        assert found.moves.tolist() == first.tolist()
        torch.testing.assert_close(found.x, iterates[first, torch.arange(SIZE)], rtol=0, atol=1e-12)
        seen |= set(first.tolist())
    assert len(seen) > 4


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_dynamic_at_with_a_bound_of_zero_is_pgd_at_bit_for_bit(norm: str, kind: torch.dtype) -> None:
    # Linear networks reach the maximum of the linearisation itself, where the gap is zero up to rounding.
    eps = {"Linf": 8 / 255, "L2": 0.5, "L1": 1.0}[norm]
    place = {"eps": eps, "step_size": eps / 2, "norm": norm}
    for seed in range(10):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).to(kind)
        batch = I.Batch(0.4 + 0.2 * torch.rand(SIZE, 1, 6, 6, dtype=kind), torch.arange(SIZE) % 2)
        runs = []
        for method in (I.dynamic_at(bound=0.0, **place), I.pgd_at(**place)):
            from_clean = replace(method, attack=replace(method.attack, start=I.Zero()))
            runs.append(_record(net, from_clean, batch))
        names = ["loss", "images", "kappa", "inspected", "moves", *net.state_dict()]
        differ = [n for n, a, b in zip(names, runs[0][0], runs[1][0], strict=True) if not torch.equal(a, b)]
        assert (seed, differ) == (seed, [])
        assert runs[0][1] == runs[1][1]
        assert runs[1][0][4].tolist() == [STEPS] * SIZE


RULES = {
    "curvature": I.h_sat(bound=0.8, **PLACE),
    "gauss_newton": I.h_sat(bound=0.9, estimator="gauss_newton", **PLACE),
    "stationarity": I.dynamic_at(bound=0.12, eps=0.1, step_size=0.02, steps=STEPS),
}


@pytest.mark.parametrize("rule", RULES)
def test_who_stopped_stays_stopped(model: nn.Module, batch: I.Batch, rule: str) -> None:
    attack = RULES[rule].attack
    runs = [
        replace(attack, steps=k)(model, replace(batch, shared=_referenced(attack, model, batch)), generator=_seed())
        for k in range(STEPS + 1)
    ]
    last = runs[-1]
    assert len(set(last.moves.tolist())) > 2
    for steps, found in enumerate(runs):
        assert found.moves.tolist() == last.moves.clamp_max(steps).tolist()
        done = last.moves <= steps
        torch.testing.assert_close(found.x[done], last.x[done], rtol=0, atol=1e-12)
    active = torch.stack([found.moves == steps for steps, found in enumerate(runs)])
    assert bool((active[1:] <= active[:-1]).all()), "masks never rise"


def _referenced(attack: I.PGD, model: nn.Module, batch: I.Batch) -> dict[str, Tensor]:
    """What the whole attack leaves in `shared`: a shorter one does not measure again."""
    shared: dict[str, Tensor] = {}
    attack(model, replace(batch, shared=shared), generator=_seed())
    return {name: kept.clone() for name, kept in shared.items()}


def test_schedules_end_where_the_recipes_say() -> None:
    def bounds(method: I.Method, read: Callable[[I.PGD], float]) -> list[float]:
        return [read(method.at(I.Progress(epoch, 100)).attack) for epoch in range(100)]

    h_sat = bounds(I.h_sat(), lambda attack: attack.stop.bound)
    assert h_sat[:30] == [0.2] * 30
    assert h_sat[30:70] == pytest.approx([0.2 + 0.02 * k for k in range(1, 41)])
    assert h_sat[69:] == [1.0] * 31, "exactly: the last epochs are PGD-AT"
    dynamic = bounds(I.dynamic_at(), lambda attack: attack.stop.bound)
    assert dynamic[:79] == pytest.approx([0.5 * (1 - (e + 1) / 80) for e in range(79)])
    assert dynamic[79:] == [0.0] * 21
    one_step = bounds(I.fgsm_sat(), lambda attack: attack.bound)
    assert one_step[:30] == [0.0] * 30
    assert one_step[69:] == pytest.approx([0.4] * 31, abs=1e-15)
    floor = bounds(I.p_sat(by="clipped_ce"), lambda attack: attack.objective.floor)
    assert floor[:30] == [0.5] * 30
    assert floor[69:] == [0.0] * 31
    cap = bounds(I.p_sat(by="hinge"), lambda attack: attack.objective.cap)
    assert cap[:30] == [0.0] * 30
    assert cap[69:] == [10.0] * 31
    for epochs in (1, 3, 7, 30):  # a short run ends there too
        last = I.Progress(epochs - 1, epochs)
        assert I.h_sat().at(last).attack.stop.idle
        assert I.dynamic_at().at(last).attack.stop.bound == 0.0


NAN_LATER = I.Steps(0.0, ((0.5, math.nan),))


def _at_the_end(method: I.Method) -> I.Method:
    return method.at(I.Progress(9, 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: I.p_sat(bound=-1.5), "bound of P-SAT must be at least -1, the smallest gap there is; got -1.5"),
        (lambda: I.p_sat(bound=I.Ramp(-2, 0.4)), r"bound of P-SAT must be at least -1, .*; got Ramp\(-2, 0.4\)"),
        (lambda: I.p_sat(bound=math.nan), "bound of P-SAT must be at least -1, .*; got nan"),
        (lambda: _at_the_end(I.p_sat(bound=NAN_LATER)), "must be a number; got nan"),
        (lambda: I.p_sat(by="stopp"), "unknown way to hold the attack back 'stopp'. Did you mean 'stop'"),
        (lambda: I.p_sat(by="hinge", strict=True), "strict .* goes with by='stop', not 'hinge'"),
        (lambda: I.p_sat(by="clipped_ce", strict=True), "strict .* goes with by='stop', not 'clipped_ce'"),
        (lambda: I.p_sat(by="clipped_ce", bound=1.5), "floor .* must be a probability .*; got 1.5"),
        (lambda: I.p_sat(by="clipped_ce", bound=math.nan), "floor .* must be a probability .*; got nan"),
        (lambda: _at_the_end(I.p_sat(by="clipped_ce", bound=NAN_LATER)), "floor .* must be a probability .*; got nan"),
        (lambda: I.p_sat(by="hinge", bound=math.nan), "cap of Margin must be a number or inf; got nan"),
        (lambda: I.fgsm_sat(bound=-1.5), "bound of P-SAT must be at least -1, .*; got -1.5"),
        (lambda: I.fgsm_sat(bound=I.Ramp(-2, 0.4)), r"bound of P-SAT must be at least -1, .*; got Ramp\(-2, 0.4\)"),
        (lambda: I.fgsm_sat(bound=math.nan), "bound of P-SAT must be at least -1, .*; got nan"),
        (lambda: _at_the_end(I.fgsm_sat(bound=NAN_LATER)), "must be a number; got nan"),
        (lambda: LinearisedStep(I.Linf(0.1), math.nan), "must be a number; got nan"),
        (lambda: I.fgsm_sat(reach=0.0), "reach of LinearisedStep must be a positive number; got 0"),
        (lambda: I.fgsm_sat(reach=math.nan), "reach of LinearisedStep must be a positive number; got nan"),
        (lambda: I.h_sat(bound=-0.1), "bound of H-SAT must be at least 0, the smallest curvature there is; got -0.1"),
        (lambda: I.h_sat(bound=I.Ramp(-0.1, 1)), r"bound of H-SAT must be at least 0, .*; got Ramp\(-0.1, 1\)"),
        (lambda: I.h_sat(bound=math.nan), "bound of H-SAT must be at least 0, .*; got nan"),
        (lambda: _at_the_end(I.h_sat(bound=NAN_LATER)), "must be a number; got nan"),
        (lambda: I.h_sat(estimator="powr"), "unknown estimator 'powr'. Did you mean 'power'"),
        (lambda: I.dynamic_at(bound=-0.1), "bound of Dynamic-AT must be at least 0, .*; got -0.1"),
        (lambda: I.dynamic_at(bound=math.nan), "bound of Dynamic-AT must be at least 0, .*; got nan"),
        (lambda: _at_the_end(I.dynamic_at(bound=NAN_LATER)), "must be a number; got nan"),
        (lambda: I.Exceeds(I.ProbabilityGap(), math.nan), "bound of Exceeds must be a number; got nan"),
        (lambda: I.Below(StationarityGap(), math.nan), "bound of Below must be a number; got nan"),
        (lambda: I.HessianCurvature(iterations=0), "at least 1 iteration; got 0"),
        (lambda: I.HessianCurvature(memory=1.0), r"a memory in \[0, 1\); got 100 and 1.0"),
        (lambda: I.GaussNewtonCurvature(every=0), "every of at least 1 step .*; got 0"),
    ],
)
def test_a_bound_or_name_that_cannot_be_meant_is_one_clear_line(make: Callable[[], object], message: str) -> None:
    _single_line(make, message)


def test_the_bounds_at_the_edge_of_what_is_refused_are_taken() -> None:
    assert I.p_sat(bound=-1.0).attack.stop.bound == -1.0
    assert I.p_sat(bound=I.Ramp(-1, 0.4, 0.3, 0.7)).at(I.Progress(0, 10)).attack.stop.bound == -1.0
    assert I.h_sat(bound=0.0).attack.stop.bound == 0.0
    assert I.dynamic_at(bound=0.0).attack.stop.bound == 0.0
    assert I.p_sat(strict=True).attack.overshoot is False
