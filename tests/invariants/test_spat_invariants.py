"""The invariants of SPAT: what the specification says of its two losses, its head, its attack and its step.

Where each is proven, in the order of the specification's list. Names without a file are tests of this one; those of
test_conformance.py are checks that run for every recipe.

S1: z = 0
    test_s1_equal_cosines_of_zero_give_the_logarithm_of_the_classes_whatever_scale_and_margin_are
S2: s = 0, which the head refuses: s near 0
    test_s2_a_scale_near_zero_gives_the_logarithm_of_the_classes_and_no_gradient
S3: x′ = x; L_rob is not negative, and 0 only of equal predictions
    test_s3_equal_predictions_have_no_consistency_term_and_no_gradient_on_either_side
    test_s3_a_step_at_the_clean_images_is_that_of_the_accuracy_loss_alone
    test_s3_the_consistency_term_is_positive_unless_the_predictions_are_equal
S4: Σ r (r + n) = Σ r² + n KL; n = 0; n → ∞
    test_s4_the_consistency_term_is_the_sum_of_squares_plus_n_times_the_divergence
    test_s4_over_n_the_consistency_term_tends_to_the_divergence_of_trades
    test_s4_a_step_with_a_large_n_is_that_of_the_divergence_on_scaled_logits
S5: the second order at z′ = z
    test_s5_the_hessian_at_equal_logits_is_n_times_fishers_and_twice_the_outer_products
S6: r ≥ −q / e, and where the factors r + n and 2 r + n are negative
    test_s6_no_class_contributes_less_than_minus_q_over_e_and_small_q_have_no_negative_factor
S7: the least accuracy loss
    test_s7_the_accuracy_loss_is_least_at_its_closed_form
S8: gradients, by autograd, formula and finite differences; detached factors
    test_s8_the_gradient_of_the_accuracy_loss_is_its_formula_and_its_finite_difference
    test_s8_the_gradient_of_the_consistency_term_is_its_formula_on_both_sides
    test_s8_detached_factors_change_gradients_and_not_the_loss
    test_golden_values.py::test_spat_attack_loss_and_every_gradient_are_those_of_the_official_code
S9: the head
    test_s9_the_head_sees_directions_only_and_leaves_its_weights_as_they_are
S10: one clean forward for the whole attack; ball and box
    test_s10_clean_logits_of_one_forward_give_the_attack_that_computes_them_at_every_step
    test_conformance.py::ball_and_box_hold
S11: the order of the classes; BatchNorm
    test_s11_the_order_of_the_classes_changes_nothing
    test_s11_a_step_updates_the_statistics_twice_clean_images_first_and_the_attack_never
S12: the order of the factors
    test_s12_the_more_similar_class_has_the_larger_factor

Traps
1, 9: the scale is in the logits that every attack and evaluation sees, and the bias in z
    test_the_logits_of_the_head_are_the_scaled_ones
4, 5: classes, not instances; the clean prediction is the target
    test_s4_the_consistency_term_is_the_sum_of_squares_plus_n_times_the_divergence
6: where the plain form turns around, and the margin form does not
    test_the_plain_form_turns_around_and_the_margin_form_is_the_square_of_the_distance
7: no gradient at the clean image
    test_an_attack_from_the_clean_image_would_not_move_and_is_refused
8: weights that are overwritten
    test_s9_the_head_sees_directions_only_and_leaves_its_weights_as_they_are
10: means are over the instances that there are
    test_the_loss_is_one_number_an_instance_whatever_the_batch_it_came_in
The head that the recipe requires
    test_training_by_name_builds_the_head_that_the_recipe_requires
    test_a_model_with_another_head_is_one_clear_line_before_anything_is_written
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I
from instar.methods.spat import SelfPacedCrossEntropy, SelfPacedKL
from instar.models.heads import Cosine
from instar.train import train

SIZE, CLASSES, STEPS, EPS = 8, 5, 10, 0.2
FORMS = [("plain", False), ("plain", True), ("margin", False), ("margin", True)]


class Network(nn.Module):
    """A convolution, BatchNorm and a cosine head, smooth and in float64."""

    def __init__(self, scale: float = 8.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = Cosine(16, CLASSES, scale=scale)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(torch.tanh(self.norm(self.conv(x))), 3).flatten(1))


@pytest.fixture
def model() -> Network:
    """A network with statistics of its own."""
    made = Network()
    made.norm.running_mean.uniform_(-0.3, 0.3)
    made.norm.running_var.uniform_(0.05, 0.2)
    return made.train()


@pytest.fixture
def batch() -> I.Batch:
    return I.Batch(torch.rand(SIZE, 1, 6, 6, dtype=torch.float64), torch.arange(SIZE) % CLASSES)


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _spat(**changes: object) -> I.Method:
    return I.spat(**{"eps": EPS, "step_size": EPS / 4, "steps": STEPS} | changes)


def _cosines(rows: int = 6, classes: int = CLASSES) -> Tensor:
    return torch.rand(rows, classes, dtype=torch.float64) * 2 - 1


def _labels(z: Tensor) -> Tensor:
    return torch.arange(len(z)) % z.shape[1]


def _evidence(z: Tensor, y: Tensor, scale: float = 8.0, adv: Tensor | None = None) -> I.Evidence:
    """What a model with a cosine head of this scale shows, from its cosines."""
    x = torch.zeros(len(y), 1, 1, 1, dtype=z.dtype)
    return I.Evidence(x=x, y=y, clean=scale * z, adv=None if adv is None else scale * adv, scale=scale)


def _robust(z: Tensor, adv: Tensor, n: float, *, scale: float = 8.0, detach: bool = False) -> Tensor:
    return SelfPacedKL(n, detach)(_evidence(z, _labels(z), scale, adv))


def _terms(z: Tensor, adv: Tensor, scale: float = 8.0) -> Tensor:
    """r (B, K), one class after the other."""
    p, q = (scale * z).softmax(1), (scale * adv).softmax(1)
    rows = zip(p, q, strict=True)
    return torch.stack([torch.stack([a * math.log(a / b) for a, b in zip(*row, strict=True)]) for row in rows])


def _least(scale: float, m: float, classes: int) -> tuple[Tensor, float]:
    """Where the plain accuracy loss of label 0 is least (1, K), and its value there."""
    z = torch.full((1, classes), -m / 2, dtype=torch.float64)
    z[0, 0] = (1 + m) / 2
    return z, math.log(1 + (classes - 1) * math.exp(-scale * ((1 + m) ** 2 + m**2) / 4))


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("m", [0.0, 0.2, 0.4])
def test_s1_equal_cosines_of_zero_give_the_logarithm_of_the_classes_whatever_scale_and_margin_are(
    classes: int, scale: float, m: float
) -> None:
    z = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    loss = SelfPacedCrossEntropy(m)(_evidence(z, torch.tensor([0]), scale))
    assert loss.item() == pytest.approx(math.log(classes), abs=1e-14)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient[0, 0].item() == pytest.approx(-(1 - 1 / classes) * scale * (1 + m), abs=1e-13)
    assert gradient[0, 1:].tolist() == pytest.approx([scale * m / classes] * (classes - 1), abs=1e-14)
    if (scale, m, classes) == (8.0, 0.2, 10):
        assert gradient[0, :2].tolist() == pytest.approx([-8.64, 0.16], abs=1e-13)


def test_s2_a_scale_near_zero_gives_the_logarithm_of_the_classes_and_no_gradient(batch: I.Batch) -> None:
    with pytest.raises(I.UserError, match="scale of a cosine head must be positive; got 0"):
        I.spat(scale=0.0)
    lengths = []
    for scale in (1e-3, 1e-6):
        torch.manual_seed(3)
        net = Network(scale)
        method = _spat(scale=scale)
        loss, _, evidence = I.training_loss(net, method, batch, generator=_seed())
        torch.testing.assert_close(loss.detach(), torch.full_like(loss, math.log(CLASSES)), rtol=0, atol=5 * scale)
        assert float(SelfPacedKL()(evidence).detach().abs().max()) < 10 * scale**2
        lengths.append(max(float(g.abs().max()) for g in torch.autograd.grad(loss.mean(), list(net.parameters()))))
    assert 0 < lengths[1] < 1.01e-3 * lengths[0] < 1e-5


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("n", [0.0, 0.2, 3.0])
def test_s3_equal_predictions_have_no_consistency_term_and_no_gradient_on_either_side(n: float, detach: bool) -> None:
    z = _cosines().requires_grad_()
    adv = z.detach().clone().requires_grad_()
    loss = _robust(z, adv, n, detach=detach)
    assert loss.tolist() == [0.0] * len(z)
    for gradient in torch.autograd.grad(loss.sum(), [z, adv]):
        assert float(gradient.abs().max()) < 1e-14
    # The same predictions from other logits: softmax does not see a common shift.
    assert float(_robust(z, adv + 0.3, n, detach=detach).detach().abs().max()) < 1e-14


def test_s3_a_step_at_the_clean_images_is_that_of_the_accuracy_loss_alone(model: Network, batch: I.Batch) -> None:
    loss, adversary, evidence = I.training_loss(model, _spat(eps=0.0), batch)
    assert torch.equal(adversary.x, batch.x)
    assert torch.equal(evidence.clean, evidence.adv)
    alone = I.Method(I.NoAttack(), SelfPacedCrossEntropy(), requires=I.CosineHead())
    expected = I.training_loss(model, alone, batch).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(t.mean(), parameters) for t in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    moved = I.training_loss(model, _spat(), batch, generator=_seed()).loss
    assert bool((moved > expected + 1e-3).all())


@pytest.mark.parametrize("n", [0.0, 0.2, 3.0])
def test_s3_the_consistency_term_is_positive_unless_the_predictions_are_equal(n: float) -> None:
    for spread in (1e-3, 0.1, 2.0):
        z = _cosines(200)
        loss = _robust(z, z + spread * torch.randn_like(z), n)
        assert bool((loss > 0).all())
        assert bool((_terms(z[:20], z[:20] + spread * torch.randn(20, CLASSES)) < 0).any()), "terms have both signs"


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("n", [0.0, 0.2, 1.0, 50.0])
def test_s4_the_consistency_term_is_the_sum_of_squares_plus_n_times_the_divergence(n: float, scale: float) -> None:
    z, adv = _cosines(), _cosines()
    r = _terms(z, adv, scale)
    divergence = F.kl_div((scale * adv).log_softmax(1), (scale * z).softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(r.sum(1), divergence, rtol=0, atol=1e-13)
    expected = r.square().sum(1) + n * divergence
    torch.testing.assert_close(_robust(z, adv, n, scale=scale), expected, rtol=1e-13, atol=1e-14)
    # Neither the square of the divergence nor the divergence the other way round.
    assert not torch.allclose(expected, divergence.square() + n * divergence, rtol=1e-3)
    assert not torch.allclose(expected, _robust(adv, z, n, scale=scale), rtol=1e-3)


def test_s4_over_n_the_consistency_term_tends_to_the_divergence_of_trades() -> None:
    z, adv = _cosines(), _cosines()
    divergence = I.KL()(_evidence(z, _labels(z), adv=adv))
    squares = _terms(z, adv).square().sum(1)
    for n in (1e2, 1e4, 1e6):
        torch.testing.assert_close(_robust(z, adv, n) / n - divergence, squares / n, rtol=1e-6, atol=1e-13)


def test_s4_a_step_with_a_large_n_is_that_of_the_divergence_on_scaled_logits(model: Network, batch: I.Batch) -> None:
    n = 1e9
    ours = _spat(offset=n, beta=6.0 / n)
    attack = replace(ours.attack, objective=I.KL())
    trades = I.Method(attack, SelfPacedCrossEntropy() + 6.0 * I.KL(), requires=I.CosineHead())
    found = [I.training_loss(copy.deepcopy(model), method, batch, generator=_seed()) for method in (ours, trades)]
    torch.testing.assert_close(found[0].adversary.x, found[1].adversary.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0].loss, found[1].loss, rtol=0, atol=1e-7)
    assert float((found[1].loss - SelfPacedCrossEntropy()(found[1].evidence)).detach().min()) > 0.01


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("n", [0.0, 0.2, 1.0])
def test_s5_the_hessian_at_equal_logits_is_n_times_fishers_and_twice_the_outer_products(n: float, scale: float) -> None:
    z = _cosines(1, 4)
    hessian = torch.autograd.functional.hessian(lambda adv: _robust(z, adv.view(1, 4), n, scale=scale).sum(), z[0])
    p = (scale * z[0]).softmax(0)
    expected = n * scale**2 * (torch.diag(p) - torch.outer(p, p))
    for c in range(4):
        slope = torch.stack([-p[c] * scale * ((1.0 if j == c else 0.0) - p[j]) for j in range(4)])
        expected = expected + 2 * torch.outer(slope, slope)
    torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-12)


def test_s6_no_class_contributes_less_than_minus_q_over_e_and_small_q_have_no_negative_factor() -> None:
    # Of two classes the values with n = 0 and n = 1 give both terms: their squares add to one, they themselves add to
    # the difference of both.
    n, grid = 0.2, torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    p, q = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    z, adv = (torch.stack([t.log(), (1 - t).log()], 1) for t in (p, q))
    squares, both = _robust(z, adv, 0.0, scale=1.0), _robust(z, adv, 1.0, scale=1.0)
    total = both - squares
    smaller = (total - (2 * squares - total.square()).clamp_min(0).sqrt()) / 2
    risen = torch.where(q > p, q, 1 - q)  # of two classes the one that the attack makes likelier has the smaller term
    assert bool((smaller >= -risen / math.e - 1e-7).all())
    assert bool((smaller >= -1 / math.e - 1e-7).all())
    assert bool((risen[smaller + n < -1e-7] > n * math.e).all())
    assert bool((smaller + n < 0).any())
    assert bool((2 * smaller + n < 0).any())
    assert n * math.e == pytest.approx(0.5437, abs=5e-5)
    # The bound is met where p = q / e.
    q = torch.tensor([0.3, 0.6, 0.95], dtype=torch.float64)
    p = q / math.e
    z, adv = (torch.stack([t.log(), (1 - t).log()], 1) for t in (p, q))
    other = (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(
        _robust(z, adv, n, scale=1.0), (q / math.e) ** 2 - n * q / math.e + other * (other + n), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(("scale", "value"), [(8.0, 0.38279), (5.0, 0.88175), (1.0, 1.97639)])
def test_s7_the_accuracy_loss_is_least_at_its_closed_form(scale: float, value: float) -> None:
    y = torch.tensor([0])
    z, least = _least(scale, 0.2, 10)
    assert z[0, :2].tolist() == pytest.approx([0.6, -0.1])
    z.requires_grad_()
    loss = SelfPacedCrossEntropy(0.2)(_evidence(z, y, scale))
    assert loss.item() == pytest.approx(least, abs=1e-14)
    assert loss.item() == pytest.approx(value, abs=5e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert float(gradient.abs().max()) < 1e-15
    for spread in (1e-3, 0.1, 1.0):
        others = z.detach() + spread * torch.randn(300, 10, dtype=torch.float64)
        assert bool((SelfPacedCrossEntropy(0.2)(_evidence(others, y.expand(300), scale)) > least).all())


def _modulated(z: Tensor, y: int, m: float, form: str, scale: float, frozen: Tensor | None = None) -> Tensor:
    """u (K,) of one instance; the factors from `frozen` instead of `z`, if they are to be constants."""
    seen = z if frozen is None else frozen
    made = []
    for c, value in enumerate(z):
        factor = 1 + m - seen[c] if c == y else m + seen[c]
        shift = 0.0 if form == "plain" else (m - 1 if c == y else m)
        made.append(scale * factor * (value + shift))
    return torch.stack(made)


def _slope(z: float, m: float, *, form: str, detach: bool, true: bool) -> float:
    """The derivative of u in its cosine over the scale, as the specification has it."""
    if detach:  # of both forms, which differ by a constant then
        return 1 + m - z if true else z + m
    if form == "plain":
        return 1 + m - 2 * z if true else 2 * z + m
    return 2 * (1 - z) if true else 2 * (z + m)


@pytest.mark.parametrize(("form", "detach"), FORMS)
@pytest.mark.parametrize(("scale", "m"), [(8.0, 0.2), (5.0, 0.0), (1.0, 0.4)])
def test_s8_the_gradient_of_the_accuracy_loss_is_its_formula_and_its_finite_difference(
    form: str, detach: bool, scale: float, m: float
) -> None:
    z = _cosines(6).requires_grad_()
    y = _labels(z)
    loss = SelfPacedCrossEntropy(m, form, detach=detach)(_evidence(z, y, scale))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    for i, row in enumerate(z.detach()):
        label = int(y[i])
        u = _modulated(row, label, m, form, scale)
        assert loss[i].item() == pytest.approx(float(-u.log_softmax(0)[label]), abs=1e-13)
        frozen = row if detach else None
        p = u.softmax(0)
        for c in range(CLASSES):
            slope = scale * _slope(float(row[c]), m, form=form, detach=detach, true=c == label)
            formula = -(1 - p[c]) * slope if c == label else p[c] * slope
            assert gradient[i, c].item() == pytest.approx(float(formula), abs=1e-12)
            ends = []
            for step in (1e-5, -1e-5):
                moved = row.clone()
                moved[c] += step
                ends.append(-_modulated(moved, label, m, form, scale, frozen).log_softmax(0)[label])
            assert gradient[i, c].item() == pytest.approx(float(ends[0] - ends[1]) / 2e-5, abs=1e-7)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("scale", "n"), [(8.0, 0.2), (1.0, 0.0), (5.0, 1.0)])
def test_s8_the_gradient_of_the_consistency_term_is_its_formula_on_both_sides(
    detach: bool, scale: float, n: float
) -> None:
    z, adv = _cosines().requires_grad_(), _cosines().requires_grad_()
    found = torch.autograd.grad(_robust(z, adv, n, scale=scale, detach=detach).sum(), [z, adv])
    p, q, r = (
        (scale * z.detach()).softmax(1),
        (scale * adv.detach()).softmax(1),
        _terms(z.detach(), adv.detach(), scale),
    )
    weight = r + n if detach else 2 * r + n
    for i in range(len(z)):
        for j in range(CLASSES):
            clean = moved = 0.0
            for c in range(CLASSES):
                same = 1.0 if c == j else 0.0
                change = p[i, c] * scale * (same - p[i, j])  # of p_c with z_j; that of log p_c is scale (same − p_j)
                clean += weight[i, c] * (change * math.log(p[i, c] / q[i, c]) + change)
                moved -= weight[i, c] * p[i, c] * scale * (same - q[i, j])
            assert found[0][i, j].item() == pytest.approx(float(clean), abs=1e-12)
            assert found[1][i, j].item() == pytest.approx(float(moved), abs=1e-12)
    if not detach:
        step = torch.zeros(len(z), CLASSES, dtype=torch.float64)
        step[0, 1] = 1e-5
        for side in range(2):
            ends = []
            for change in (step, -step):
                moved = [(t + change if k == side else t).detach() for k, t in enumerate((z, adv))]
                ends.append(float(_robust(*moved, n, scale=scale)[0]))
            assert found[side][0, 1].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-7)


@pytest.mark.parametrize("form", ["plain", "margin"])
def test_s8_detached_factors_change_gradients_and_not_the_loss(model: Network, batch: I.Batch, form: str) -> None:
    adversary = _spat().attack(model, batch, generator=_seed())
    losses, gradients = [], []
    for detach in (False, True):
        net = copy.deepcopy(model)
        loss = I.training_loss(net, _spat(form=form, detach=detach), batch, adversary=adversary).loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.mean(), list(net.parameters())))
    assert torch.equal(*losses)
    assert all(float((a - b).abs().max()) > 1e-3 * float(a.abs().max()) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_s9_the_head_sees_directions_only_and_leaves_its_weights_as_they_are(bias: bool) -> None:
    head = Cosine(6, 4, scale=8.0, bias=bias).double()
    features = torch.randn(5, 6, dtype=torch.float64)
    before = head.weight.detach().clone()
    z = head(features) / 8
    for i, h in enumerate(features):
        for c, w in enumerate(before):
            shift = float(head.bias.detach()[c]) if bias else 0.0
            cosine = sum(a * b for a, b in zip(h.tolist(), w.tolist(), strict=True)) / math.hypot(*h) / math.hypot(*w)
            assert z[i, c].item() == pytest.approx(cosine + shift, abs=1e-14)
            assert abs(z[i, c].item() - shift) <= 1
    assert torch.equal(head.weight, before)
    (gradient,) = torch.autograd.grad(z.square().sum(), head.weight)
    assert float((gradient * before).sum(1).abs().max()) < 1e-13 < float(gradient.abs().max())
    longer = torch.tensor([0.01, 3.0, 1.0, 200.0, 7.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(head(longer * features) / 8, z, rtol=0, atol=1e-14)
    with torch.no_grad():
        head.weight.mul_(longer[:4])
    torch.testing.assert_close(head(features) / 8, z, rtol=0, atol=1e-14)


def test_s10_clean_logits_of_one_forward_give_the_attack_that_computes_them_at_every_step(
    model: Network, batch: I.Batch
) -> None:
    n, eval_net = 0.2, copy.deepcopy(model).eval()
    moved = batch.x + 0.001 * torch.randn(batch.x.shape, generator=_seed(), dtype=torch.float64)
    for _ in range(STEPS):
        leaf = moved.detach().requires_grad_()
        p, q = (eval_net(x).log_softmax(1) for x in (batch.x, leaf))
        r = p.exp() * (p - q)
        (gradient,) = torch.autograd.grad((r * (r + n)).sum() / len(leaf), leaf)
        moved = leaf.detach() + EPS / 4 * gradient.sign()
        moved = torch.minimum(torch.maximum(moved, batch.x - EPS), batch.x + EPS).clamp(0, 1)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    found = _spat(offset=n).attack(model, batch, generator=_seed())
    assert torch.equal(found.x, moved)
    assert len(forwards) == 1 + STEPS
    assert float((moved - batch.x).abs().max()) > 0.99 * EPS


@pytest.mark.parametrize("form", ["plain", "margin"])
def test_s11_the_order_of_the_classes_changes_nothing(model: Network, batch: I.Batch, form: str) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        permuted.head.weight.copy_(model.head.weight[order])
        permuted.head.bias.copy_(model.head.bias[order])
    ours = I.training_loss(model, _spat(form=form), batch, generator=_seed())
    theirs = I.training_loss(permuted, _spat(form=form), replace(batch, y=order.argsort()[batch.y]), generator=_seed())
    torch.testing.assert_close(theirs.adversary.x, ours.adversary.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=0, atol=1e-11)
    elsewhere = I.training_loss(permuted, _spat(form=form), batch, adversary=ours.adversary).loss
    assert not torch.allclose(elsewhere, ours.loss, rtol=0.01), "labels that stay behind must show"


def test_s11_a_step_updates_the_statistics_twice_clean_images_first_and_the_attack_never(
    model: Network, batch: I.Batch
) -> None:
    before = [buffer.clone() for buffer in model.buffers()]
    _spat().attack(model, batch, generator=_seed())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        by_hand = copy.deepcopy(model)
        computed, _ = I.training_step(model, _spat(), batch, optimizer, generator=_seed())
        by_hand(batch.x)
        by_hand(computed.adversary.x)
        assert int(model.norm.num_batches_tracked) == 2 * step
        for found, expected in zip(model.buffers(), by_hand.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["plain", "margin"])
def test_s12_the_more_similar_class_has_the_larger_factor(form: str) -> None:
    # With detached factors a logit's gradient over its own softmax part is the scale times the factor.
    m, scale, classes = 0.2, 8.0, 7
    z = _cosines(40, classes).requires_grad_()
    y = torch.zeros(40, dtype=torch.int64)
    loss = SelfPacedCrossEntropy(m, form, detach=True)(_evidence(z, y, scale))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    p = torch.stack([_modulated(row, 0, m, form, scale).softmax(0) for row in z.detach()])
    wrong = gradient[:, 1:] / (scale * p[:, 1:])
    for factors, cosines in zip(wrong, z.detach()[:, 1:], strict=True):
        assert factors.argsort().tolist() == cosines.argsort().tolist()
    true = -gradient[:, 0] / (scale * p[:, 1:].sum(1))
    assert true.argsort().tolist() == z.detach()[:, 0].argsort(descending=True).tolist()
    torch.testing.assert_close(true, 1 + m - z.detach()[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(wrong, m + z.detach()[:, 1:], rtol=0, atol=1e-10)


def test_the_logits_of_the_head_are_the_scaled_ones() -> None:
    # At the least accuracy loss of 10 classes p_y would be 0.183 of the bare cosines, which misleads attacks.
    z, _ = _least(8.0, 0.2, 10)
    head = Cosine(11, 10, scale=8.0, bias=True).double()
    with torch.no_grad():
        head.weight.copy_(torch.eye(10, 11))
        head.bias.zero_()
        head.bias[0] = 0.1
    features = torch.cat([z, torch.zeros(1, 1)], 1)
    features[0, 0] -= 0.1  # the bias is a part of z
    features[0, 10] = (1 - features.square().sum()).sqrt()
    torch.testing.assert_close(head(features), 8 * z, rtol=0, atol=1e-14)
    assert head(features).softmax(1)[0, 0].item() == pytest.approx(0.968, abs=5e-4)
    assert z.softmax(1)[0, 0].item() == pytest.approx(0.183, abs=5e-4)
    evidence = I.Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), clean=head(features), scale=head.scale)
    assert SelfPacedCrossEntropy()(evidence).item() == pytest.approx(0.38279, abs=5e-6)


def test_the_plain_form_turns_around_and_the_margin_form_is_the_square_of_the_distance() -> None:
    m, scale = 0.2, 8.0
    y = torch.tensor([0])
    for value in torch.linspace(-1, 1, 41, dtype=torch.float64).tolist():
        z = torch.full((1, 2), value, dtype=torch.float64, requires_grad=True)
        slopes = {}
        for form in ("plain", "margin"):
            loss = SelfPacedCrossEntropy(m, form)(_evidence(z, y, scale))
            slopes[form] = torch.autograd.grad(loss.sum(), z)[0][0].tolist()
            if form == "margin":
                gap = scale * ((m**2 - (1 - value) ** 2) - (value + m) ** 2)
                assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), abs=1e-9)
        assert (slopes["plain"][0] > 1e-9) == (value > 0.6 + 1e-6), "the true class is pulled back above (1 + m) / 2"
        assert slopes["margin"][0] <= 1e-12, "and never in the margin form"
        assert (slopes["plain"][1] < -1e-9) == (value < -0.1 - 1e-6), "a wrong class below −m / 2 is pulled up"
        assert (slopes["margin"][1] < -1e-9) == (value < -0.2 - 1e-6), "and one below −m in the margin form"


def test_an_attack_from_the_clean_image_would_not_move_and_is_refused(model: Network, batch: I.Batch) -> None:
    lengths = []
    with torch.no_grad():
        clean = model.eval()(batch.x)
    for start in (I.Zero(), I.Gaussian(0.001)):
        at = start(batch.x, I.Linf(EPS), _seed()).requires_grad_()
        evidence = I.Evidence(x=batch.x, y=batch.y, clean=clean, adv=model(at), scale=8.0)
        lengths.append(torch.autograd.grad(SelfPacedKL()(evidence).sum(), at)[0].flatten(1).norm(dim=1))
    assert float(lengths[0].max()) < 1e-14
    assert float(lengths[1].min()) > 1e-6
    assert _spat().attack.start == I.Gaussian(0.001)
    with pytest.raises(I.UserError, match="never moves: its gradient is zero at the clean image") as caught:
        replace(_spat(), attack=replace(_spat().attack, start=I.Zero()))
    assert "\n" not in str(caught.value)


def test_the_loss_is_one_number_an_instance_whatever_the_batch_it_came_in() -> None:
    z, adv = _cosines(6), _cosines(6)
    y = _labels(z)
    loss = I.spat().loss
    whole = loss(_evidence(z, y, adv=adv))
    assert whole.shape == (6,)
    for i in range(6):
        rows = slice(i, i + 1)
        torch.testing.assert_close(loss(_evidence(z[rows], y[rows], adv=adv[rows])), whole[rows], rtol=0, atol=1e-13)
    robust = _terms(z, adv)
    expected = SelfPacedCrossEntropy()(_evidence(z, y)) + 6.0 * (robust * (robust + 0.2)).sum(1)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)


SMALL = {"data": "digits", "width": 4, "batch_size": 256, "epochs": 1, "precision": "float32"}


@pytest.mark.parametrize(
    ("arguments", "scale", "bias"), [({}, 8.0, False), ({"scale": 5.0, "head_bias": True}, 5.0, True)]
)
@pytest.mark.parametrize("named", [None, "small_cnn"])
def test_training_by_name_builds_the_head_that_the_recipe_requires(
    arguments: dict[str, object], scale: float, bias: bool, named: str | None, tmp_path: Path
) -> None:
    done = train("spat", out=tmp_path / "run", model=named, arguments={"steps": 1, **arguments}, **SMALL)
    stored = I.load(tmp_path / "run")
    images = torch.rand(7, 1, 8, 8)
    for net in (done.model, stored):
        assert isinstance(net.head, Cosine)
        assert net.head.scale.item() == scale
        assert (net.head.bias is not None) == bias
        shift = float(net.head.bias.detach().abs().max()) if bias else 0.0
        largest = float(net.eval()(images).detach().abs().max())
        assert 0.1 * scale < largest <= scale * (1 + shift) + 1e-4
    torch.testing.assert_close(stored(images), done.model(images), rtol=0, atol=1e-6)


class Plain(nn.Module):
    """A network of one layer, with the head that it is given."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "has no attribute `head` that is a cosine head"),
        (Plain(nn.Linear(64, 10)), "has no attribute `head` that is a cosine head"),
        (Plain(Cosine(64, 10, scale=4.0)), "its cosine head has the scale 4, not 8"),
    ],
    ids=["none", "linear", "scale"],
)
def test_a_model_with_another_head_is_one_clear_line_before_anything_is_written(
    model: nn.Module, reason: str, tmp_path: Path
) -> None:
    arguments = {"steps": 1}
    with pytest.raises(I.UserError, match=f"needs a model with a cosine head: .*{reason}") as caught:
        train("spat", out=tmp_path / "run", model=model, arguments=arguments, **SMALL)
    assert "\n" not in str(caught.value)
    assert "Cosine(..., scale=8)" in str(caught.value)
    assert not (tmp_path / "run").exists()
    fitting = Plain(Cosine(64, 10, scale=8.0))
    done = train("spat", out=tmp_path / "run", model=fitting, arguments=arguments, **SMALL)
    assert done.log[0]["train_loss"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: I.spat(margin=-0.1), r"margin of SelfPacedCrossEntropy \(m\) must be at least 0; got -0.1"),
        (lambda: I.spat(margin=math.nan), r"margin of SelfPacedCrossEntropy \(m\) must be at least 0; got nan"),
        (lambda: I.spat(offset=-1.0), r"offset of SelfPacedKL \(n\) must be at least 0; got -1.0"),
        (lambda: I.spat(form="circle"), "form of SelfPacedCrossEntropy must be one of 'plain', 'margin'; got 'circle'"),
        (lambda: I.spat(scale=-8.0), "scale of a cosine head must be positive; got -8"),
        (lambda: I.spat(scale=math.nan), "scale of a cosine head must be positive; got nan"),
        (lambda: I.spat(beta=math.nan), "a coefficient of a loss must be a number; got nan"),
        (lambda: SelfPacedCrossEntropy(of="other"), "of of SelfPacedCrossEntropy must be one of"),
    ],
)
def test_a_number_or_name_that_spat_has_no_use_for_is_one_clear_line(make: object, message: str) -> None:
    with pytest.raises(I.UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
