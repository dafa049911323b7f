"""What every method must keep: one generator yields every check for every recipe and for combinations of their parts.

A recipe joins by being exported from `instar.methods`; a combination joins by a line in `COMBINED`.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import instar as I
from instar.attacks import Attack
from instar.method import FORWARDS
from instar.methods import RECIPES
from instar.methods.dynamic_at import StationarityGap
from instar.methods.gair_rst import AttackableShare
from instar.methods.mail import ProbabilityMarginWeight
from instar.methods.mart import BoostedCrossEntropy, Doubt
from instar.methods.p_sat import ClippedCrossEntropy
from instar.methods.spat import SelfPacedCrossEntropy, SelfPacedKL
from instar.models.heads import build_head
from instar.signals import Constant, Signal
from instar.weightspace import Perturbation

KL_ATTACK = I.PGD(I.Linf(8 / 255), I.KL(), start=I.Gaussian(0.001))

COMBINED = {
    "at_l2": I.pgd_at(norm="L2", eps=0.5, step_size=0.1),
    "trades_l1": I.trades(norm="L1", eps=2.0, step_size=0.4),
    "at_batch_statistics": replace(I.pgd_at(), attack=replace(I.pgd_at().attack, mode="batch")),
    "margin": I.Method(I.PGD(objective=I.Margin()), I.Margin() + I.CrossEntropy("clean", smoothing=0.1)),
    "awp": replace(I.pgd_at(), perturbation=I.AWP(5e-3)),
    "sam_trades": replace(I.trades(), perturbation=I.SAM(0.05)),
    "ema": replace(I.pgd_at(), average=I.EMA(0.99)),
    "gairat_awp_p_sat_on_trades": I.Method(
        replace(KL_ATTACK, stop=I.Exceeds(I.ProbabilityGap(), 0.1)),
        I.CrossEntropy("clean") + 6 * (I.GeometryWeight(-1.0) * I.KL()),
        perturbation=I.AWP(1e-2),
        average=I.EMA(),
    ),
    "iseat_gairat_remembering": I.Method(
        I.PGD(),
        I.GeometryWeight(0.0, "sigmoid") * I.CrossEntropy()
        + I.Ramp(0, 0.5) * (I.RankWeight(I.LossGap("clean")) * I.LogitShift("clean")),
        remember=(("gap", I.LossGap("clean")), ("survived", I.SurvivedSteps()), ("right", I.Correct("clean"))),
    ),
    "h_sat_half": I.h_sat(bound=0.5),
    "h_sat_strict": I.h_sat(bound=0.6, strict=True),
    "p_sat_strict": I.p_sat(bound=0.2, strict=True),
    "p_sat_clipped": I.p_sat(by="clipped_ce", bound=0.2),
    "p_sat_hinge": I.p_sat(by="hinge", bound=1.0),
    "dynamic_half": I.dynamic_at(bound=0.05),
    "gair_trades_both": I.gair_trades(weighted="both"),
    "spat_margin": I.spat(form="margin", scale=5.0),
    "iseat_all_at_theta": I.iseat(joint=False, distance="kl", weight="proportional"),
    "iseat_l1_reversed": I.iseat(distance="l1", weight="reversed"),
    "iseat_loss_top": I.iseat(distance="loss", weight="top", warm_start=0.1),
    "iseat_hard_class_pairs": replace(
        I.iseat(),
        loss=SelfPacedCrossEntropy(of="adv") + 0.1 * (I.RankWeight(I.LossGap()) * I.LogitShift()),
        requires=I.CosineHead(),
    ),
    "trades_minus": I.Method(KL_ATTACK, I.CrossEntropy("clean") - 0.1 * I.LogitShift("clean") + 2.5),
}  # fmt: skip

# KD+SWA has no default: its teachers know a fixed number of classes. tests/methods/test_kd_swa.py has its checks.
ALONE = {"kd_swa"}


def _random_method(draw: random.Random) -> I.Method:
    """Any weight on any loss, under any stop rule, attack and weight perturbation."""
    weight = draw.choice(
        [
            I.GeometryWeight(-1.0),
            I.GeometryWeight(0.0, "discrete"),
            I.RankWeight(I.LossGap()),
            ProbabilityMarginWeight(2.0, bias=0.0),
            AttackableShare(0.0),
        ]
    )
    fine = draw.choice([I.CrossEntropy("adv"), I.CrossEntropy("clean", smoothing=0.1), BoostedCrossEntropy()])
    robust = draw.choice([I.KL(), I.LogitShift(), I.LogitShift("clean"), SelfPacedKL(), Doubt() * I.KL()])
    objective = draw.choice([I.CrossEntropy(), I.KL(), I.Margin(), SelfPacedKL(0.1), ClippedCrossEntropy(0.1)])
    stop = draw.choice(
        [
            None,
            I.Patience(1),
            I.Exceeds(I.ProbabilityGap(), 0.1),
            I.Exceeds(I.LastLayerCurvature(), 0.7),
            I.Below(StationarityGap(), 0.05),
        ]
    )
    attack = I.PGD(
        draw.choice([I.Linf(8 / 255), I.L2(0.5), I.L1(2.0)]),
        objective,
        step_size=draw.choice([2 / 255, 0.1]),
        start=draw.choice([I.Uniform(), I.Gaussian(0.001)]),
        mode=draw.choice(["eval", "train", "batch"]),
        stop=stop,
        overshoot=stop is None or isinstance(stop, I.Patience) or draw.random() < 0.5,
    )
    return I.Method(
        attack,
        draw.choice([weight * fine + 3 * robust, fine + 6 * (weight * robust), weight * (fine + robust)]),
        perturbation=draw.choice([None, I.AWP(5e-3), I.AWP(5e-3, ascend=I.CrossEntropy()), I.SAM(0.02)]),
        average=draw.choice([None, I.EMA(0.9), I.SWA(0.0)]),
        remember=draw.choice([(), (("gap", I.LossGap("clean")),)]),
    )


RANDOM = {f"random_{i}": _random_method(random.Random(i)) for i in range(20)}
METHODS: dict[str, I.Method] = (
    {name: recipe() for name, recipe in RECIPES.items() if name not in ALONE} | COMBINED | RANDOM
)
CLASSES, SIZE, STEPS = 3, 6, 4


class Network(nn.Module):
    """Convolution, BatchNorm, softplus, head: smooth, so that gradients are not zero by accident."""

    def __init__(self, classes: int, head: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = build_head(head, 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 3).flatten(1))


class Scaled(nn.Module):
    """A network whose logits are multiplied."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor, self.head = network, factor, network.head

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.network(x)


def _model(method: I.Method, *, classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = Network(classes, "cosine" if method.requires else "linear")
    model.norm.running_mean.uniform_(-0.2, 0.2)
    model.norm.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        model.head.weight.mul_(6)
        model.norm.weight.uniform_(0.5, 1.5)
    return model.to(dtype).train()


def _batch(size: int = SIZE, *, classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> I.Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size, 2, 6, 6, generator=generator, dtype=torch.float64)
    x[x < 0.1], x[x > 0.9] = 0.0, 1.0
    y = torch.randint(classes, (size,), generator=generator)
    return I.Batch(x.to(dtype), y, index=torch.arange(size))


def _short(method: I.Method) -> I.Method:
    """The method at the end of a run, with fewer attack steps where it has steps."""
    method = method.at(I.Progress(epoch=1, epochs=1))
    more = getattr(method.attack, "steps", STEPS) > 1
    return _changed(method, steps=STEPS) if more else method


def _changed(method: I.Method, **attack: object) -> I.Method:
    """The method with fields of its attacks replaced, those that they have."""
    return replace(method, attack=_changed_attack(method.attack, attack), step=None)


def _changed_attack(attack: Attack, new: dict[str, object]) -> Attack:
    if isinstance(attack, I.Several):
        others = tuple(_changed_attack(other, new) for other in attack.others)
        return replace(attack, first=_changed_attack(attack.first, new), others=others)
    known = {entry.name for entry in fields(attack)}
    return replace(attack, **{k: v for k, v in new.items() if k in known})


def _draws(method: I.Method) -> bool:
    """Whether the loss itself asks for random numbers."""
    return "generator" in method.loss.needs


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss.mean(), list(model.parameters()), retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


def _forwards(model: nn.Module) -> list[int]:
    """A list that grows by one with every forward of the model."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def _inside(method: I.Method, batch: I.Batch, x: Tensor) -> None:
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    where = method.attack.limit
    if where is not None:
        assert float(where.size((x - batch.x).double()).max()) <= where.radius * (1 + 1e-6) + 1e-7
    assert bool(x.isfinite().all())


def ball_and_box_hold(method: I.Method) -> None:
    for dtype in (torch.float64, torch.float32):
        batch = _batch(16, dtype=dtype)
        for steps in (0, 1, STEPS):
            short = _changed(method, steps=steps)
            found = short.attack(_model(method, dtype=dtype), batch, generator=_seed())
            assert found.x.dtype == dtype
            _inside(short, batch, found.x)


def order_is_kept(method: I.Method) -> None:
    if _draws(method):
        return  # instances trade their noise
    batch, order = _batch(), torch.tensor([3, 0, 5, 1, 4, 2])
    noise = 0.02 * torch.rand(batch.x.shape, generator=_seed(), dtype=torch.float64)
    there = I.training_loss(_model(method), _changed(method, start=I.Given(noise)), batch)
    shuffled = I.Batch(batch.x[order], batch.y[order], index=batch.index[order])
    here = I.training_loss(_model(method), _changed(method, start=I.Given(noise[order])), shuffled)
    torch.testing.assert_close(here.loss, there.loss[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(here.adversary.x, there.adversary.x[order], rtol=0, atol=1e-9)
    for name in ("kappa", "inspected", "moves"):
        assert torch.equal(getattr(here.adversary, name), getattr(there.adversary, name)[order])


def an_instance_does_not_see_its_neighbours_in_eval_mode(method: I.Method) -> None:
    batch = _batch()
    noise = 0.02 * torch.rand(batch.x.shape, generator=_seed(), dtype=torch.float64)
    together = _changed(method, mode="eval", start=I.Given(noise)).attack(_model(method), batch)
    for i in range(SIZE):
        one = _changed(method, mode="eval", start=I.Given(noise[i : i + 1]))
        alone = one.attack(_model(method), I.Batch(batch.x[i : i + 1], batch.y[i : i + 1]))
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=0, atol=1e-12)
        assert (alone.kappa.item(), alone.moves.item()) == (together.kappa[i].item(), together.moves[i].item())


def everything_is_left_as_found_in_modes_eval_and_batch(method: I.Method) -> None:
    for mode in ("eval", "batch"):
        model, batch = _model(method), _batch()
        model.head.eval()
        model.conv.bias.requires_grad_(False)
        model.conv.weight.grad = torch.full_like(model.conv.weight, 3.0)
        images, state = batch.x.clone(), copy.deepcopy(model.state_dict())
        found = _changed(method, mode=mode).attack(model, batch, generator=_seed())
        assert [m.training for m in (model, model.conv, model.norm, model.head)] == [True, True, True, False]
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert torch.equal(model.conv.weight.grad, torch.full_like(model.conv.weight, 3.0))
        assert all(p.grad is None for name, p in model.named_parameters() if name != "conv.weight")
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert torch.equal(batch.x, images)
        assert not found.x.requires_grad


def every_forward_of_an_attack_in_mode_train_updates_the_statistics_once(method: I.Method) -> None:
    model = _model(method)
    forwards, before = _forwards(model), model.norm.running_mean.clone()
    _changed(method, mode="train").attack(model, _batch(), generator=_seed())
    assert int(model.norm.num_batches_tracked) == len(forwards)
    assert torch.equal(model.norm.running_mean, before) == (not forwards)


def the_declared_training_forwards_and_no_others_update_the_statistics(method: I.Method) -> None:
    batch = _batch()
    found = method.attack(_model(method), batch, generator=_seed())
    for names in itertools.chain.from_iterable(itertools.combinations(FORWARDS, r) for r in range(5)):
        model = _model(method)
        reference = copy.deepcopy(model)
        declared = replace(method, updates_bn=names, step=None)
        evidence = I.training_loss(model, declared, batch, adversary=found).evidence
        weights = {name: p.detach() for name, p in reference.named_parameters()}
        moved = {name: p + evidence.offsets.get(name, 0) for name, p in weights.items()}
        for name in FORWARDS:
            if name in names and name in method.loss.needs:
                images = found.x if name.endswith("adv") else batch.x
                functional_call(reference, weights if name.startswith("anchor") else moved, (images,))
        assert int(model.norm.num_batches_tracked) == len(set(names) & method.loss.needs)
        torch.testing.assert_close(model.norm.running_mean, reference.norm.running_mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(model.norm.running_var, reference.norm.running_var, rtol=0, atol=1e-14)


def the_loss_leaves_modes_gradients_and_weights_as_found(method: I.Method) -> None:
    for training in (True, False):
        model = _model(method).train(training)
        model.norm.train()
        weights = [p.detach().clone() for p in model.parameters()]
        I.training_loss(model, method, _batch(), generator=_seed())
        assert (model.training, model.conv.training, model.norm.training) == (training, training, True)
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def logits_of_any_size_give_finite_losses_and_gradients(method: I.Method) -> None:
    for factor in (1e4, 1e-4):
        model = Scaled(_model(method, dtype=torch.float32), factor)
        batch = _batch(dtype=torch.float32)
        loss, found, _ = I.training_loss(model, method, batch, generator=_seed())
        assert bool(loss.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in _gradients(model, loss))
        _inside(method, batch, found.x)


def half_precision_inside_keeps_images_and_losses_in_float32(method: I.Method) -> None:
    model, batch = _model(method, dtype=torch.float32), _batch(dtype=torch.float32)
    whole = I.training_loss(copy.deepcopy(model), method, batch, generator=_seed())
    with torch.autocast("cpu", torch.bfloat16):
        attacked = method.attack(copy.deepcopy(model), batch, generator=_seed())
        loss, found, evidence = I.training_loss(model, method, batch, adversary=whole.adversary)
    assert loss.dtype == found.x.dtype == attacked.x.dtype == torch.float32
    assert all(z.dtype == torch.float32 for z in (evidence.clean, evidence.adv, evidence.anchor) if z is not None)
    assert all(bool(g.isfinite().all()) for g in _gradients(model, loss))
    _inside(method, batch, attacked.x)
    of = "adv" if evidence.adv is not None else "clean"
    torch.testing.assert_close(evidence.logits(of), whole.evidence.logits(of), rtol=0.05, atol=0.3)


def a_batch_of_one_works(method: I.Method) -> None:
    model = _model(method)
    loss, found, _ = I.training_loss(model, method, _batch(1), generator=_seed())
    assert loss.shape == found.kappa.shape == (1,)
    assert all(bool(g.isfinite().all()) for g in _gradients(model, loss))


def a_batch_of_one_class_works(method: I.Method) -> None:
    model, batch = _model(method), replace(_batch(), y=torch.ones(SIZE, dtype=torch.int64))
    loss, _, _ = I.training_loss(model, method, batch, generator=_seed())
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in _gradients(model, loss)[:1])


def two_to_a_thousand_classes_work(method: I.Method) -> None:
    for classes in (2, 10, 1000):
        model = _model(method, classes=classes)
        loss, _, _ = I.training_loss(model, method, _batch(classes=classes), generator=_seed())
        assert loss.shape == (SIZE,)
        assert bool(loss.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in _gradients(model, loss))


def _without_cross_entropy(signal: Signal) -> Signal:
    """The signal with every cross-entropy that it adds up taken away."""
    if isinstance(signal, I.CrossEntropy):
        return 0.0 * signal
    parts = {
        e.name: _without_cross_entropy(p) for e in fields(signal) if isinstance(p := getattr(signal, e.name), Signal)
    }
    return replace(signal, **parts) if parts else signal


def _without(signal: Signal, need: str) -> Signal:
    """The signal with every term taken away that needs something."""
    if need in signal.needs and not signal.parts:
        return Constant(0.0)
    parts = {e.name: _without(p, need) for e in fields(signal) if isinstance(p := getattr(signal, e.name), Signal)}
    return replace(signal, **parts) if parts else signal


def unlabelled_rows_contribute_no_cross_entropy(method: I.Method) -> None:
    model, batch = _model(method), _batch()
    y = batch.y.clone()
    y[[1, 4]] = -1
    loss, found, evidence = I.training_loss(model, method, replace(batch, y=y), generator=_seed())
    rest = _without_cross_entropy(method.loss)(evidence)
    for row in (1, 4):
        if bool(loss[row].isfinite()):  # a margin of an image without a label is −inf: it has no worst class
            torch.testing.assert_close(loss[row], rest[row], rtol=0, atol=1e-12)
        else:
            assert loss[row].item() == -math.inf
            assert any(isinstance(s, I.Margin) for s in _signals(method.loss))
    assert bool(loss[y >= 0].isfinite().all())
    assert found.kappa[[1, 4]].tolist() == [0, 0]
    none = I.CrossEntropy()(replace(evidence, adv=torch.randn(SIZE, CLASSES, requires_grad=True), clean=None))
    assert none[[1, 4]].tolist() == [0, 0]


def _signals(item: Any) -> Iterator[Signal]:
    if isinstance(item, Signal):
        yield item
    if is_dataclass(item):
        for entry in fields(item):
            yield from _signals(getattr(item, entry.name))


def what_it_prints_reads_back_as_an_equal_method(method: I.Method) -> None:
    read = I.parse(repr(method))
    assert read == method
    assert repr(read) == repr(method)


def counts_of_the_attack_fit_together(method: I.Method) -> None:
    batch = _batch(40)
    found = method.attack(_model(method), batch, generator=_seed())
    for count in (found.kappa, found.inspected, found.moves):
        assert count.shape == (40,)
        assert not count.is_floating_point()
    assert bool(((found.kappa >= 0) & (found.kappa <= found.inspected) & (found.inspected <= found.budget)).all())
    assert bool(((found.moves >= 0) & (found.moves <= found.inspected)).all())
    # The iterate on which an instance stops is inspected, and not moved; a strict rule takes one more step back.
    taken_back = 0 if getattr(method.attack, "overshoot", True) else 1
    assert set((found.inspected - found.moves).tolist()) <= set(range(2 + taken_back))


class Refuses(Attack):
    """An attack that must not be run."""

    adversaries = 2

    def __call__(self, model: nn.Module, batch: I.Batch, *, generator: torch.Generator | None = None) -> I.Adversary:
        raise AssertionError("the adversary was given")


def a_given_adversary_is_not_attacked_again(method: I.Method) -> None:
    model, batch = _model(method), _batch()
    adversary = method.attack(model, batch, generator=_seed())
    forwards = _forwards(model)
    refusing = replace(method, attack=Refuses(), step=None)
    if _draws(method):
        refusing = replace(refusing, loss=_without(refusing.loss, "generator"))
    found = I.training_loss(model, refusing, batch, adversary=adversary)
    assert found.adversary is adversary
    needed = len(method.needs & set(FORWARDS)) + (len(adversary.others) if "others" in method.needs else 0)
    if method.perturbation is not None and method.perturbation.active:
        needed += len((method.perturbation.objective or method.loss).needs & set(FORWARDS))
    assert len(forwards) == needed


def the_same_generator_gives_the_same_loss_and_the_global_one_is_not_touched(method: I.Method) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    losses = []
    for _ in range(2):
        model = _model(method)
        torch.set_rng_state(before)
        losses.append(I.training_loss(model, method, _batch(), generator=_seed()).loss)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(losses[0], losses[1])
    torch.set_rng_state(state)


def the_loss_is_the_same_where_gradients_are_switched_off(method: I.Method) -> None:
    batch = _batch()
    usual = I.training_loss(_model(method), method, batch, generator=_seed())
    with torch.no_grad():
        quiet = I.training_loss(_model(method), method, batch, generator=_seed())
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, usual.loss.detach(), rtol=0, atol=1e-12)
    assert torch.equal(quiet.adversary.x, usual.adversary.x)


@dataclass(frozen=True, eq=False)
class Held(Signal):
    """Numbers that no longer follow the weights."""

    values: Tensor

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return self.values


@dataclass(frozen=True, eq=False)
class Offsets(Perturbation):
    """A weight perturbation that is known beforehand."""

    offsets: dict[str, Tensor]
    active = True
    objective = None

    def __call__(self, parameters: Any, loss_of: Any) -> dict[str, Tensor]:
        return self.offsets


def _held(signal: Signal, evidence: I.Evidence) -> Signal:
    """The signal with its coefficients, whatever in it carries no gradient, held at their present values."""
    if isinstance(signal, Constant):
        return signal
    present = signal(evidence)
    if not present.requires_grad:
        return Held(present)
    parts = {e.name: _held(p, evidence) for e in fields(signal) if isinstance(p := getattr(signal, e.name), Signal)}
    return replace(signal, **parts) if parts else signal


def the_gradient_is_that_of_the_loss_with_coefficients_and_offsets_held(method: I.Method) -> None:
    if _draws(method):
        return  # one of its two gradients is held constant by definition; see tests/methods/test_single_step.py
    model, batch = _model(method), _batch()
    loss, adversary, evidence = I.training_loss(model, method, batch, generator=_seed())
    (gradient,) = torch.autograd.grad(loss.mean(), model.head.weight)
    perturbation = Offsets(dict(evidence.offsets))
    held = replace(method, loss=_held(method.loss, evidence), perturbation=perturbation, step=None)

    def at(shift: Tensor) -> float:
        with torch.no_grad():
            model.head.weight.add_(shift)
            found = I.training_loss(model, held, batch, adversary=adversary).loss.mean().item()
            model.head.weight.sub_(shift)
        return found

    direction = torch.randn(model.head.weight.shape, generator=_seed(), dtype=torch.float64)
    slope = (at(1e-6 * direction) - at(-1e-6 * direction)) / 2e-6
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


def no_step_of_a_run_leaves_a_schedule_unresolved(method: I.Method) -> None:
    for epoch in range(11):
        progress = I.Progress(epoch, 10)
        resolved = method.at(progress)
        assert resolved.at(I.Progress(0, 10)) is resolved
        assert I.parse(repr(resolved)) == resolved


def three_steps_change_the_weights_and_keep_them_finite(method: I.Method) -> None:
    model, batch = _model(method, dtype=torch.float32), _batch(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        _, remembered = I.training_step(model, method, batch, optimizer, generator=torch.Generator().manual_seed(step))
        assert remembered.keys() == {name for name, _ in method.remember}
        assert all(v.shape == (SIZE,) and not v.requires_grad for v in remembered.values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


CHECKS: list[Callable[[I.Method], None]] = [
    ball_and_box_hold,
    order_is_kept,
    an_instance_does_not_see_its_neighbours_in_eval_mode,
    everything_is_left_as_found_in_modes_eval_and_batch,
    every_forward_of_an_attack_in_mode_train_updates_the_statistics_once,
    the_declared_training_forwards_and_no_others_update_the_statistics,
    the_loss_leaves_modes_gradients_and_weights_as_found,
    logits_of_any_size_give_finite_losses_and_gradients,
    half_precision_inside_keeps_images_and_losses_in_float32,
    a_batch_of_one_works,
    a_batch_of_one_class_works,
    two_to_a_thousand_classes_work,
    unlabelled_rows_contribute_no_cross_entropy,
    counts_of_the_attack_fit_together,
    a_given_adversary_is_not_attacked_again,
    the_same_generator_gives_the_same_loss_and_the_global_one_is_not_touched,
    the_loss_is_the_same_where_gradients_are_switched_off,
    the_gradient_is_that_of_the_loss_with_coefficients_and_offsets_held,
    three_steps_change_the_weights_and_keep_them_finite,
]
UNRESOLVED = [what_it_prints_reads_back_as_an_equal_method, no_step_of_a_run_leaves_a_schedule_unresolved]


def every_check() -> Iterator[Any]:
    """Every method times every check; the two that are about schedules see the method before it is resolved."""
    for name, method in METHODS.items():
        for check in CHECKS:
            yield pytest.param(check, _short(method), id=f"{name}-{check.__name__}")
        for check in UNRESOLVED:
            yield pytest.param(check, method, id=f"{name}-{check.__name__}")


@pytest.mark.parametrize(("check", "method"), list(every_check()))
def test_every_method_keeps_what_all_must_keep(check: Callable[[I.Method], None], method: I.Method) -> None:
    check(method)


def test_every_recipe_and_every_check_of_this_file_is_among_them() -> None:
    assert set(RECIPES) - ALONE <= set(METHODS)
    assert len({repr(method) for method in RANDOM.values()}) == 20
    own = {
        f for n, f in globals().items() if callable(f) and f.__module__ == __name__ and not n.startswith(("_", "test_"))
    }
    assert own - {Network, Scaled, Refuses, Held, Offsets, every_check} == {*CHECKS, *UNRESOLVED}
