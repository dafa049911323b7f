"""Held against plain loops written from the papers' equations: one instance, one class, one copy at a time."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I

EPS, STEP, STEPS = 0.1, 0.03, 6


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same_gradients(model: nn.Module, loss: Tensor, expected: dict[str, Tensor]) -> None:
    model.zero_grad()
    loss.mean().backward()
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        _near(found[name], expected[name])


def _reference_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return _gradients(model)


def _walk(
    model: nn.Module, x: Tensor, label: int, noise: Tensor, *, stops: Callable[[Tensor, int, int], bool]
) -> tuple[Tensor, int, int]:
    """PGD on the cross-entropy of one instance; `stops(logits, wrong so far, k)` may end it before a step."""
    model.eval()
    x = x.unsqueeze(0)
    moved = (x + noise).clamp(0, 1)
    kappa = moves = wrong = 0
    for k in range(STEPS):
        leaf = moved.clone().requires_grad_()
        logits = model(leaf)[0]
        (gradient,) = torch.autograd.grad(-torch.log_softmax(logits, 0)[label], leaf)
        if int(logits.argmax()) == label:
            kappa += 1
        else:
            wrong += 1
        if stops(logits.detach(), wrong, k):
            break
        moved = moved + STEP * gradient.sign()
        moved = torch.max(torch.min(moved, x + EPS), x - EPS).clamp(0, 1)
        moves += 1
    return moved[0], kappa, moves


def _walk_all(
    model: nn.Module, batch: I.Batch, noise: Tensor, *, stops: Callable[[Tensor, int, int, int], bool]
) -> tuple[Tensor, list[int], list[int]]:
    walked = [
        _walk(model, batch.x[i], int(batch.y[i]), noise[i], stops=lambda z, w, k, i=i: stops(z, w, k, int(batch.y[i])))
        for i in range(len(batch))
    ]
    return torch.stack([x for x, _, _ in walked]), [k for _, k, _ in walked], [m for _, _, m in walked]


@pytest.fixture
def noise(batch: I.Batch) -> Tensor:
    """A start inside the ball, so that cutting it to the box is all a start does."""
    offset = (2 * torch.rand_like(batch.x) - 1) * EPS
    return (batch.x + offset).clamp(0, 1) - batch.x


def _pgd(noise: Tensor, **fields: object) -> I.PGD:
    return I.PGD(I.Linf(EPS), steps=STEPS, step_size=STEP, start=I.Given(noise), **fields)


def test_pgd_and_kappa_are_those_of_a_loop_over_single_instances(
    network: nn.Module, batch: I.Batch, noise: Tensor
) -> None:
    expected, kappa, moves = _walk_all(network, batch, noise, stops=lambda *_: False)
    found = _pgd(noise)(network, batch)
    _near(found.x, expected)
    assert found.kappa.tolist() == kappa
    assert found.moves.tolist() == moves == [STEPS] * len(batch)
    assert len(set(kappa)) > 2, "a batch in which every kappa is equal would show nothing"


@pytest.mark.parametrize("tau", [0, 1, 2, 5])
def test_patience_stops_each_instance_after_tau_further_steps_as_in_the_algorithm_of_fat(
    network: nn.Module, batch: I.Batch, noise: Tensor, tau: int
) -> None:
    expected, kappa, moves = _walk_all(network, batch, noise, stops=lambda z, wrong, k, y: wrong > tau)
    # FAT's algorithm stops on a misclassified iterate only; a correct one goes on whatever its count.
    found = _pgd(noise, stop=I.Patience(tau))(network, batch)
    _near(found.x, expected)
    assert found.kappa.tolist() == kappa
    assert found.moves.tolist() == moves


@pytest.mark.parametrize("bound", [-0.6, -0.2, 0.0, 0.3, 0.9])
def test_exceeds_keeps_the_step_that_crosses_the_bound_as_in_the_code_of_sat(
    network: nn.Module, batch: I.Batch, noise: Tensor, bound: float
) -> None:
    def gap(z: Tensor, _wrong: int, _k: int, y: int) -> bool:
        p = [math.exp(float(v - z.max())) for v in z]
        p = [v / sum(p) for v in p]
        return max(v for j, v in enumerate(p) if j != y) - p[y] > bound

    expected, kappa, moves = _walk_all(network, batch, noise, stops=gap)
    found = _pgd(noise, stop=I.Exceeds(I.ProbabilityGap(), bound))(network, batch)
    _near(found.x, expected)
    assert found.kappa.tolist() == kappa
    assert found.moves.tolist() == moves


@pytest.mark.parametrize("function", ["tanh", "sigmoid", "discrete"])
@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0, 2.5])
def test_gairat_loss_and_gradients_are_those_of_a_loop_over_single_instances(
    network: nn.Module, batch: I.Batch, noise: Tensor, shift: float, function: str
) -> None:
    x_adv, kappa, _ = _walk_all(network, batch, noise, stops=lambda *_: False)
    omega = []
    for k in kappa:
        u = shift + 5 * (1 - 2 * k / STEPS)
        omega.append(
            {
                "tanh": (1 + math.tanh(u)) / 2,
                "sigmoid": 1 / (1 + math.exp(-u)),
                "discrete": (STEPS + 1 - k) / (STEPS + 1),
            }[function]
        )
    separate = copy.deepcopy(network).train()  # its forward must not move the statistics that our attack will use
    logits = separate(x_adv)
    terms = [w * -torch.log_softmax(z, 0)[y] for w, z, y in zip(omega, logits, batch.y, strict=True)]
    reference = sum(terms[1:], terms[0]) / sum(omega)
    expected = _reference_gradients(separate, reference)

    method = I.Method(_pgd(noise), I.GeometryWeight(shift, function) * I.CrossEntropy())
    loss, _, _ = I.training_loss(network, method, batch)
    _near(loss.mean(), reference)
    _same_gradients(network, loss, expected)


def test_trades_loss_and_gradients_are_sums_over_instances_and_classes(
    network: nn.Module, batch: I.Batch, noise: Tensor
) -> None:
    beta, x_adv = 6.0, (batch.x + 0.5 * noise).clamp(0, 1)
    clean, adv = network.train()(batch.x), network(x_adv)
    reference = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        p = clean[i].exp() / clean[i].exp().sum()
        q = adv[i].exp() / adv[i].exp().sum()
        reference = reference - torch.log(p[batch.y[i]])
        for k in range(3):
            reference = reference + beta * p[k] * (torch.log(p[k]) - torch.log(q[k]))
    reference = reference / len(batch)
    expected = _reference_gradients(network, reference)
    none = torch.zeros(len(batch), dtype=torch.int32)
    loss, _, _ = I.training_loss(network, I.trades(), batch, adversary=I.Adversary(x_adv, none, none, none, STEPS))
    _near(loss.mean(), reference)
    _same_gradients(network, loss, expected)


def test_trades_attack_climbs_the_divergence_from_a_fixed_clean_prediction(
    network: nn.Module, batch: I.Batch, noise: Tensor
) -> None:
    network.eval()
    p = network(batch.x).softmax(1).detach()
    moved = batch.x + noise
    for _ in range(STEPS):
        leaf = moved.clone().requires_grad_()
        divergence = F.kl_div(F.log_softmax(network(leaf), 1), p, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, leaf)
        moved = moved + STEP * gradient.sign()
        moved = torch.max(torch.min(moved, batch.x + EPS), batch.x - EPS).clamp(0, 1)
    _near(_pgd(noise, objective=I.KL())(network, batch).x, moved)


def _perturbed_copy(model: nn.Module, objective: Callable[[nn.Module], Tensor], gamma: float) -> nn.Module:
    """The published way of AWP: a proxy whose weights are moved in place, tensor by tensor."""
    proxy = copy.deepcopy(model)
    proxy.zero_grad()
    objective(proxy).backward()
    with torch.no_grad():
        for p in proxy.parameters():
            if p.ndim > 1:
                p.add_(gamma * p.norm() * p.grad / p.grad.norm())
    proxy.zero_grad()
    return proxy


def _mean_cross_entropy(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.cross_entropy(model.train()(x), y)


def test_awp_loss_and_gradients_are_those_of_an_explicitly_perturbed_copy(
    network: nn.Module, batch: I.Batch, noise: Tensor
) -> None:
    x_adv, gamma = batch.x + noise, 0.02
    proxy = _perturbed_copy(network, _mean_cross_entropy(x_adv, batch.y), gamma)
    reference = _mean_cross_entropy(x_adv, batch.y)(proxy)
    expected = _reference_gradients(proxy, reference)
    method = I.Method(I.PGD(), I.CrossEntropy(), perturbation=I.AWP(gamma))
    none = torch.zeros(len(batch), dtype=torch.int32)
    loss, _, evidence = I.training_loss(network, method, batch, adversary=I.Adversary(x_adv, none, none, none, STEPS))
    _near(loss.mean(), reference)
    _same_gradients(network, loss, expected)
    moved, still = dict(proxy.named_parameters()), dict(network.named_parameters())
    for name, parameter in still.items():
        offset = evidence.offsets.get(name, torch.zeros_like(parameter))
        _near(parameter + offset, moved[name])
        length = gamma * parameter.norm() if parameter.ndim > 1 else torch.zeros((), dtype=torch.float64)
        _near(offset.norm(), length)
    assert loss.mean().item() > _mean_cross_entropy(x_adv, batch.y)(network).item()


def test_awp_on_trades_climbs_the_whole_loss_unless_told_otherwise(
    network: nn.Module, batch: I.Batch, noise: Tensor
) -> None:
    x_adv, gamma = batch.x + noise, 0.02

    def trades(model: nn.Module) -> Tensor:
        clean, adv = model.train()(batch.x), model(x_adv)
        divergence = F.kl_div(F.log_softmax(adv, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True)
        return F.cross_entropy(clean, batch.y) + 6 * divergence

    proxy = _perturbed_copy(network, trades, gamma)
    reference = trades(proxy)
    expected = _reference_gradients(proxy, reference)
    none = torch.zeros(len(batch), dtype=torch.int32)
    method = replace(I.trades(), perturbation=I.AWP(gamma))
    loss, _, _ = I.training_loss(network, method, batch, adversary=I.Adversary(x_adv, none, none, none, STEPS))
    _near(loss.mean(), reference)
    _same_gradients(network, loss, expected)


def test_sam_moves_all_parameters_together_by_rho(network: nn.Module, batch: I.Batch, noise: Tensor) -> None:
    x_adv, rho = batch.x + noise, 0.1
    proxy = copy.deepcopy(network)
    _mean_cross_entropy(x_adv, batch.y)(proxy).backward()
    length = math.sqrt(sum(float(p.grad.square().sum()) for p in proxy.parameters()))
    with torch.no_grad():
        for p in proxy.parameters():
            p.add_(rho * p.grad / length)
    reference = _mean_cross_entropy(x_adv, batch.y)(proxy)
    expected = _reference_gradients(proxy, reference)
    none = torch.zeros(len(batch), dtype=torch.int32)
    method = I.Method(I.PGD(), I.CrossEntropy(), perturbation=I.SAM(rho))
    loss, _, evidence = I.training_loss(network, method, batch, adversary=I.Adversary(x_adv, none, none, none, STEPS))
    _near(loss.mean(), reference)
    _same_gradients(network, loss, expected)
    assert math.sqrt(sum(float(v.square().sum()) for v in evidence.offsets.values())) == pytest.approx(rho, rel=1e-9)


def test_iseat_gradients_are_the_sum_of_those_of_a_perturbed_and_an_unperturbed_copy(
    network: nn.Module, batch: I.Batch, noise: Tensor
) -> None:
    x_adv, gamma, lam = batch.x + noise, 0.02, 0.7
    perturbed = _perturbed_copy(network, _mean_cross_entropy(x_adv, batch.y), gamma)
    plain = copy.deepcopy(network).train()
    adv, clean = perturbed.train()(x_adv), plain(batch.x)
    losses = [F.cross_entropy(z.detach(), batch.y, reduction="none").tolist() for z in (adv, clean)]
    gaps = [worst - best for worst, best in zip(*losses, strict=True)]
    rank = {i: r + 1 for r, i in enumerate(sorted(range(len(gaps)), key=gaps.__getitem__))}
    n = len(batch)
    penalty = sum(rank[i] / n * sum((adv[i, k] - clean[i, k]) ** 2 for k in range(3)) for i in range(n))
    reference = F.cross_entropy(adv, batch.y) + lam / n * penalty
    perturbed.zero_grad()
    plain.zero_grad()
    reference.backward()
    ours, theirs = _gradients(perturbed), _gradients(plain)
    expected = {name: ours[name] + theirs.get(name, torch.zeros_like(ours[name])) for name in ours}

    method = I.Method(
        I.PGD(),
        I.CrossEntropy() + lam * (I.RankWeight(I.LossGap()) * I.LogitShift()),
        perturbation=I.AWP(gamma, ascend=I.CrossEntropy()),
        updates_bn=("adv",),
    )
    none = torch.zeros(n, dtype=torch.int32)
    loss, _, _ = I.training_loss(network, method, batch, adversary=I.Adversary(x_adv, none, none, none, STEPS))
    _near(loss.mean(), reference)
    _same_gradients(network, loss, expected)


def test_averaged_weights_follow_the_written_recursion(network: nn.Module) -> None:
    average = copy.deepcopy(network)
    expected = {name: t.clone() for name, t in network.state_dict().items()}
    ema = I.EMA(0.9)
    for t in range(120):
        with torch.no_grad():
            for tensor in [*network.parameters(), network.norm.running_mean, network.norm.running_var]:
                tensor.add_(0.1 * torch.randn_like(tensor))
            network.norm.num_batches_tracked.add_(1)
        ema.update(average, network, I.Progress(0, 1, step=t))
        decay = min(0.9, (1 + t) / (10 + t))
        for name, now in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * now if now.is_floating_point() else now.clone()
    for name, found in average.state_dict().items():
        _near(found, expected[name], 1e-12)
        assert found.data_ptr() != network.state_dict()[name].data_ptr()
