"""FGSM-AT, Fast-AT, N-FGSM and GradAlign: against plain loops and in their limits (invariants F32 to F34)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I
from instar.config import Settings, build_method
from instar.data.catalogue import CATALOGUE
from instar.methods.grad_align import GradientMisalignment
from instar.passes import passes

SIZE, CLASSES, EPS = 8, 3, 0.1


class Network(nn.Module):
    """Convolution, BatchNorm and a linear layer, smooth and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(F.avg_pool2d(F.softplus(3 * self.norm(self.conv(x))), 3).flatten(1))


@pytest.fixture
def model() -> Network:
    return Network().train()


@pytest.fixture
def batch() -> I.Batch:
    x = torch.rand(SIZE, 1, 6, 6, dtype=torch.float64)
    x[x < 0.1], x[x > 0.9] = 0.0, 1.0
    return I.Batch(x, torch.arange(SIZE) % CLASSES)


def _seed(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def _steps(model: nn.Module, batch: I.Batch, method: I.Method) -> list[Tensor]:
    """Losses, adversaries, gradients and the whole state after every one of three steps."""
    net, seen = copy.deepcopy(model), []
    optimizer = _sgd(net)
    for update in range(3):
        computed, _ = I.training_step(net, method, batch, optimizer, generator=_seed(update))
        seen += [computed.loss.detach(), computed.adversary.x, *(p.grad.clone() for p in net.parameters())]
        seen += [t.clone() for t in net.state_dict().values()]
    return seen


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _one_step(model: nn.Module, x: Tensor, y: Tensor, *, start: Tensor, step: float, eps: float | None) -> Tensor:
    """x + η + step · sign ∇CE(x + η) in train mode, cut to the ball where there is one and to the box."""
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    offset = start + step * gradient.sign() - x
    return (x + (offset if eps is None else offset.clamp(-eps, eps))).clamp(0, 1)


def _uniform(like: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    return reach * (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1)


def _fgsm(model: nn.Module, batch: I.Batch, draws: torch.Generator) -> Tensor:
    return _one_step(model, batch.x, batch.y, start=batch.x, step=EPS, eps=EPS)


def _fast(model: nn.Module, batch: I.Batch, draws: torch.Generator) -> Tensor:
    start = (batch.x + _uniform(batch.x, EPS, draws)).clamp(0, 1)
    return _one_step(model, batch.x, batch.y, start=start, step=1.25 * EPS, eps=EPS)


def _noisy(model: nn.Module, batch: I.Batch, draws: torch.Generator) -> Tensor:
    start = (batch.x + _uniform(batch.x, 2 * EPS, draws)).clamp(0, 1)
    return _one_step(model, batch.x, batch.y, start=start, step=EPS, eps=None)


@pytest.mark.parametrize(
    ("method", "attack"),
    [(I.fgsm_at(eps=EPS), _fgsm), (I.fast_at(eps=EPS), _fast), (I.n_fgsm(eps=EPS), _noisy)],
    ids=["fgsm_at", "fast_at", "n_fgsm"],
)
def test_three_steps_are_those_of_the_written_loop_in_weights_and_statistics(
    model: Network,
    batch: I.Batch,
    method: I.Method,
    attack: Callable[[nn.Module, I.Batch, torch.Generator], Tensor],
) -> None:
    by_hand = copy.deepcopy(model)
    ours, theirs = _sgd(model), _sgd(by_hand)
    for update in range(3):
        x_adv = attack(by_hand, batch, _seed(update))
        theirs.zero_grad()
        F.cross_entropy(by_hand(x_adv), batch.y).backward()
        theirs.step()
        computed, _ = I.training_step(model, method, batch, ours, generator=_seed(update))
        _near(computed.adversary.x, x_adv)
        for (name, found), expected in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert int(model.norm.num_batches_tracked) == 6, "attack and update each see the batch in train mode"


def test_f32_a_random_start_of_no_size_and_a_step_of_eps_make_fast_at_fgsm_at(model: Network, batch: I.Batch) -> None:
    fgsm, fast = _steps(model, batch, I.fgsm_at(eps=EPS)), I.fast_at(eps=EPS, step_size=EPS)
    for start in (I.Zero(), I.Uniform(0.0)):
        assert _equal(_steps(model, batch, replace(fast, attack=replace(fast.attack, start=start))), fgsm)
    assert not _equal(_steps(model, batch, fast), fgsm)
    longer = replace(I.fast_at(eps=EPS), attack=replace(I.fast_at(eps=EPS).attack, start=I.Zero()))
    assert _equal(_steps(model, batch, longer), fgsm), "from the clean image a longer step is brought back"


def test_f33_n_fgsm_without_noise_is_fgsm_at(model: Network, batch: I.Batch) -> None:
    fgsm = _steps(model, batch, I.fgsm_at(eps=EPS))
    assert _equal(_steps(model, batch, I.n_fgsm(noise=0, eps=EPS)), fgsm)
    assert not _equal(_steps(model, batch, I.n_fgsm(noise=0.5, eps=EPS)), fgsm)


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0, 3.0])
def test_n_fgsm_leaves_the_ball_by_its_noise_and_never_the_box(model: Network, batch: I.Batch, noise: float) -> None:
    batch = I.Batch(torch.cat([batch.x, torch.full_like(batch.x, 0.5)]), batch.y.repeat(2))
    method = I.n_fgsm(noise=noise, eps=EPS)
    found = method.attack(model, batch, generator=_seed())
    size = (found.x - batch.x).abs()
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1
    assert float(size.max()) <= (noise + 1) * EPS + 1e-12
    assert float(size.max()) > (noise + 0.9) * EPS, "over 500 pixels, some draw nearly all of the noise"
    assert method.attack.limit.radius == pytest.approx((noise + 1) * EPS)
    inside = I.fast_at(eps=EPS).attack(model, batch, generator=_seed())
    assert float((inside.x - batch.x).abs().max()) <= EPS + 1e-12


def test_step_sizes_follow_the_radius_also_where_it_is_a_schedule() -> None:
    early, late = I.Progress(0, 4), I.Progress(3, 4)
    growing = I.Steps(0.02, ((0.5, 0.08),))
    for recipe, factor in ((I.fgsm_at, 1.0), (I.fast_at, 1.25), (I.n_fgsm, 1.0), (I.free_at, 1.0)):
        assert recipe(eps=0.08).attack.step_size == pytest.approx(factor * 0.08, abs=1e-15)
        for progress, eps in ((early, 0.02), (late, 0.08)):
            attack = recipe(eps=growing).at(progress).attack
            assert attack.ball.radius == eps
            assert attack.step_size == pytest.approx(factor * eps, abs=1e-15)


@pytest.mark.parametrize(("recipe", "in_255"), [(I.fast_at, 10), (I.n_fgsm, 8), (I.free_at, 8)])
def test_the_step_size_is_left_to_the_recipe_and_not_to_the_data_set(
    recipe: Callable[..., I.Method], in_255: int
) -> None:
    def step(**arguments: float) -> float:
        method = build_method(recipe, arguments, info=CATALOGUE["cifar10"], settings=Settings(ema=0.0))
        return float(method.attack.step_size)

    assert build_method(I.pgd_at, {}, info=CATALOGUE["cifar10"], settings=Settings()).attack.step_size == 2 / 255
    assert step() == pytest.approx(in_255 / 255, abs=1e-15)
    assert step(eps=16 / 255) == pytest.approx(2 * in_255 / 255, abs=1e-15)
    assert step(step_size=3 / 255) == 3 / 255


# GradAlign


def _evidence(model: nn.Module, x: Tensor, y: Tensor, *, eps: float = EPS, seed: int = 7) -> I.Evidence:
    return I.Evidence(x=x, y=y, ball=I.Linf(eps), generator=_seed(seed), forward=model)


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, graph: bool = False) -> Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf, create_graph=graph)
    return gradient.flatten(1)


def _cosines(a: Tensor, b: Tensor) -> list[float]:
    return [float((u @ v) / (u.norm() * v.norm())) for u, v in zip(a, b, strict=True)]


def test_f34_gradients_of_two_linear_classes_are_aligned_everywhere() -> None:
    x = torch.rand(20, 1, 3, 3, dtype=torch.float64)
    for classes, aligned in ((2, True), (3, False)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, classes)).double()
        gap = GradientMisalignment()(_evidence(model, x, torch.arange(20) % classes, eps=0.5)).detach()
        assert float(gap.min()) >= -1e-12
        # With more classes the gradient turns with the predicted probabilities, although the logits are linear.
        assert (float(gap.max()) < 1e-12) == aligned


def test_f34_the_misalignment_is_one_minus_the_cosine_of_the_gradients_at_image_and_neighbour(
    model: Network, batch: I.Batch
) -> None:
    found = GradientMisalignment()(_evidence(model, batch.x, batch.y))
    here = _input_gradient(model, batch.x, batch.y)
    there = _input_gradient(model, batch.x + _uniform(batch.x, EPS, _seed()), batch.y)
    expected = torch.tensor([1 - c for c in _cosines(here, there)], dtype=torch.float64)
    assert float(expected.max()) > 1e-3
    _near(found, expected)


class Parabola(nn.Module):
    """Two classes of one-pixel images whose logits differ by a parabola with its top at ½."""

    def __init__(self) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        level = self.height * (x.flatten(1) - 0.5).square()
        return torch.cat([level, -level], dim=1)


def test_f34_the_misalignment_goes_from_zero_to_two_where_the_neighbour_lies_behind_an_extremum() -> None:
    x = torch.linspace(0.4, 0.6, 201, dtype=torch.float64).view(-1, 1, 1, 1) + 1e-4
    gap = GradientMisalignment()(_evidence(Parabola(), x, torch.arange(201) % 2))
    behind = (x - 0.5).sign() != (x + _uniform(x, EPS, _seed()) - 0.5).sign()
    assert 20 < int(behind.sum()) < 180
    _near(gap, 2.0 * behind.flatten().double())


def test_f34_the_misalignment_of_any_network_lies_between_zero_and_two(batch: I.Batch) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        gap = GradientMisalignment()(_evidence(Network().train(), batch.x, batch.y, eps=0.9, seed=seed)).detach()
        assert float(gap.min()) >= 0
        assert float(gap.max()) <= 2
        assert float(gap.mean()) > 1e-3


def test_f34_without_its_regulariser_grad_align_is_fgsm_at_bit_for_bit_and_at_its_cost(
    model: Network, batch: I.Batch
) -> None:
    ours, theirs = I.grad_align(alignment=0, eps=EPS), I.fgsm_at(eps=EPS)
    assert _equal(_steps(model, batch, ours), _steps(model, batch, theirs))
    assert passes(ours) == passes(theirs)
    assert not _equal(_steps(model, batch, I.grad_align(alignment=0.1, eps=EPS)), _steps(model, batch, theirs))


def test_grad_align_adds_lambda_times_the_misalignment_of_clean_gradients_to_fgsm_at(
    model: Network, batch: I.Batch
) -> None:
    loss, found, _ = I.training_loss(model, I.grad_align(alignment=0.7, eps=EPS), batch, generator=_seed())
    plain = F.cross_entropy(model(found.x), batch.y, reduction="none")
    gap = GradientMisalignment()(_evidence(model, batch.x, batch.y))
    _near(loss, plain + 0.7 * gap)
    updated = Network().train()
    I.training_loss(updated, I.grad_align(eps=EPS), batch)
    assert int(updated.norm.num_batches_tracked) == 2, "the regulariser's own forwards leave the statistics alone"


def _moved(model: nn.Module, direction: list[Tensor], by: float) -> nn.Module:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, d in zip(moved.parameters(), direction, strict=True):
            parameter.add_(d, alpha=by)
    return moved


def test_f34_the_gradient_in_the_weights_is_that_of_the_form_in_which_the_first_gradient_is_held(
    model: Network, batch: I.Batch
) -> None:
    neighbour = batch.x + _uniform(batch.x, EPS, _seed())
    held = _input_gradient(model, batch.x, batch.y)

    def misalignment(net: nn.Module, here: Tensor) -> float:
        cosines = _cosines(here, _input_gradient(net, neighbour, batch.y))
        return 1 - sum(cosines) / len(cosines)

    gap = GradientMisalignment()(_evidence(model, batch.x, batch.y)).mean()
    gradients = torch.autograd.grad(gap, list(model.parameters()), allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, model.parameters(), strict=True)]
    assert float(gradients[0].norm()) > 1e-3
    apart, h = [], 1e-6
    for seed in range(6):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in model.parameters()]
        up, down = _moved(model, direction, h), _moved(model, direction, -h)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert slope == pytest.approx((misalignment(up, held) - misalignment(down, held)) / (2 * h), abs=2e-8)
        both = misalignment(up, _input_gradient(up, batch.x, batch.y))
        both -= misalignment(down, _input_gradient(down, batch.x, batch.y))
        apart.append(abs(slope - both / (2 * h)))
    assert max(apart) > 1e-3, "differentiating both gradients is another thing"


class Bending(nn.Module):
    """Smooth logits that black images do not move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(9, 5, bias=False), nn.Linear(5, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(2 * self.first(x.flatten(1))).square())


def test_f34_rows_without_a_gradient_are_dropped_and_the_mean_is_that_of_the_others() -> None:
    x, y = torch.rand(7, 1, 3, 3, dtype=torch.float64), torch.arange(7) % CLASSES
    x[[2, 5]] = 0.0
    y[6] = -1
    model, kept = Bending(), [0, 1, 3, 4]
    gap = GradientMisalignment()(_evidence(model, x, y))
    here = _input_gradient(model, x[kept], y[kept])
    there = _input_gradient(model, (x + _uniform(x, EPS, _seed()))[kept], y[kept])
    expected = [1 - c for c in _cosines(here, there)]
    assert gap[[2, 5, 6]].tolist() == [0, 0, 0]
    assert gap.mean().item() == pytest.approx(sum(expected) / 4, abs=1e-12)
    gradients = torch.autograd.grad(gap.mean(), list(model.parameters()), allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    assert float(gradients[0].norm()) > 1e-3


def test_f34_a_batch_without_any_gradient_has_no_misalignment_and_a_gradient_of_zero() -> None:
    model = Bending()
    gap = GradientMisalignment()(_evidence(model, torch.zeros(3, 1, 3, 3, dtype=torch.float64), torch.arange(3)))
    assert gap.tolist() == [0, 0, 0]
    gradients = torch.autograd.grad(gap.mean(), list(model.parameters()), allow_unused=True)
    assert all(not bool(g.any()) for g in gradients if g is not None)


def test_grad_align_looks_at_gradients_in_float32_while_the_network_runs_in_bfloat16(
    model: Network, batch: I.Batch
) -> None:
    model, batch = model.float(), replace(batch, x=batch.x.float())
    method = I.grad_align(alignment=1.0, eps=EPS)
    whole, half = copy.deepcopy(model), copy.deepcopy(model)
    adversary = method.attack(copy.deepcopy(model), batch)
    expected = I.training_loss(whole, method, batch, adversary=adversary, generator=_seed())
    with torch.autocast("cpu", torch.bfloat16):
        assert half(batch.x).dtype == torch.bfloat16
        found = I.training_loss(half, method, batch, adversary=adversary, generator=_seed())
    assert found.loss.dtype == torch.float32
    gaps = [
        c.loss.detach() - F.cross_entropy(c.evidence.adv.detach(), batch.y, reduction="none") for c in (found, expected)
    ]
    assert not torch.equal(found.evidence.adv, expected.evidence.adv), "the rest does run in bfloat16"
    assert float(gaps[1].mean()) > 1e-3
    _near(gaps[0], gaps[1], 1e-5)

    with torch.autocast("cpu", torch.bfloat16):
        I.training_step(half, method, batch, _sgd(half), generator=_seed())
        plain = copy.deepcopy(model)
        I.training_step(plain, I.fgsm_at(eps=EPS), batch, _sgd(plain), generator=_seed())
    for parameter in half.parameters():
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())
    assert float((half.conv.weight.grad - plain.conv.weight.grad).abs().max()) > 1e-3


def test_the_rule_for_lambda_is_a_fifth_at_eight_and_two_at_sixteen_and_needs_a_number_for_eps(
    model: Network, batch: I.Batch
) -> None:
    for eps, expected in ((8 / 255, 0.2), (16 / 255, 2.0)):
        assert I.grad_align(eps=eps) == I.grad_align(alignment=expected, eps=eps)
        losses = [
            I.training_loss(copy.deepcopy(model), m, batch, generator=_seed()).loss.mean().item()
            for m in (I.grad_align(eps=eps), I.fgsm_at(eps=eps))
        ]
        gap = GradientMisalignment()(_evidence(model, batch.x, batch.y, eps=eps)).mean().item()
        assert losses[0] - losses[1] == pytest.approx(expected * gap, abs=1e-12)
    with pytest.raises(I.UserError, match="give alignment too"):
        I.grad_align(eps=I.Ramp(0, 8 / 255))
    growing = I.grad_align(alignment=0.2, eps=I.Ramp(0, 8 / 255, 0.0, 0.5))
    assert growing.at(I.Progress(1, 2)).attack.ball.radius == 8 / 255


def test_a_negative_lambda_is_refused() -> None:
    with pytest.raises(I.UserError, match="alignment"):
        I.grad_align(alignment=-0.2)
