"""The one training step, and the traps that a step of many methods falls into."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I
from instar.modes import forward_mode
from instar.weightspace.average import averaged_copy


class Network(nn.Module):
    """Convolution, BatchNorm, head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(12, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 2).flatten(1))


@pytest.fixture
def model() -> Network:
    return Network().train()


@pytest.fixture
def batch() -> I.Batch:
    return I.Batch(torch.rand(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3)


@pytest.fixture
def adversary(batch: I.Batch) -> I.Adversary:
    x = (batch.x + 0.1 * torch.randn_like(batch.x)).clamp(0, 1)
    kappa = torch.tensor([0, 3, 10, 7, 1, 10, 2, 5])
    return I.Adversary(x, kappa, torch.full((8,), 10), torch.full((8,), 10), 10)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(model.parameters())))


@pytest.mark.parametrize(
    "statistic",
    [I.LossGap("clean"), I.LossGap("anchor"), I.KL(), I.Correct("anchor"), I.LogitShift("clean")],
    ids=repr,
)
@pytest.mark.parametrize("loss", [I.CrossEntropy(), I.CrossEntropy("clean") + 6 * I.KL()], ids=repr)
def test_a_remembered_statistic_neither_changes_the_gradient_nor_adds_an_update_of_statistics(
    model: Network, batch: I.Batch, adversary: I.Adversary, statistic: I.Signal, loss: I.Signal
) -> None:
    plain, watched = copy.deepcopy(model), copy.deepcopy(model)
    method = I.Method(I.PGD(), loss, perturbation=I.AWP(0.01))
    ours = I.training_loss(watched, replace(method, remember=(("seen", statistic),)), batch, adversary=adversary)
    theirs = I.training_loss(plain, method, batch, adversary=adversary)
    assert torch.equal(ours.loss, theirs.loss)
    assert statistic(ours.evidence).shape == (8,)
    for found, expected in zip(_gradients(watched, ours.loss), _gradients(plain, theirs.loss), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(watched.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected)


@dataclass(frozen=True)
class Nosy(I.Signal):
    """The cross-entropy, by a signal that queries the model elsewhere and looks without gradient first."""

    needs = frozenset({"adv", "clean"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        with torch.no_grad():
            evidence.forward(evidence.x)
            evidence.logits("clean").softmax(1)
            evidence.logits("adv").softmax(1)
        return I.KL()(evidence)


def test_a_signal_that_looks_first_without_gradient_costs_nobody_a_gradient_or_an_update(
    model: Network, batch: I.Batch, adversary: I.Adversary
) -> None:
    plain, watched = copy.deepcopy(model), copy.deepcopy(model)
    ours = I.training_loss(watched, I.Method(I.PGD(), Nosy() + I.CrossEntropy()), batch, adversary=adversary)
    theirs = I.training_loss(plain, I.Method(I.PGD(), I.KL() + I.CrossEntropy()), batch, adversary=adversary)
    for found, expected in zip(_gradients(watched, ours.loss), _gradients(plain, theirs.loss), strict=True):
        assert torch.equal(found, expected)
    assert int(watched.norm.num_batches_tracked) == int(plain.norm.num_batches_tracked) == 2
    assert torch.equal(watched.norm.running_mean, plain.norm.running_mean)


def test_the_anchor_is_the_clean_image_at_the_unperturbed_weights_and_its_gradient_differs_from_clean(
    model: Network, batch: I.Batch, adversary: I.Adversary
) -> None:
    def smooth(reference: str) -> I.Signal:
        return I.CrossEntropy() + 0.5 * (I.RankWeight(I.LossGap(reference)) * I.LogitShift(reference))

    expected = copy.deepcopy(model)(batch.x)
    gradients = {}
    for reference in ("anchor", "clean"):
        method = I.Method(I.PGD(), smooth(reference), perturbation=I.AWP(0.02, ascend=I.CrossEntropy()), updates_bn=())
        loss, _, evidence = I.training_loss(model, method, batch, adversary=adversary)
        gradients[reference] = torch.cat([g.flatten() for g in _gradients(model, loss)])
        difference = (evidence.logits(reference) - expected).abs().max().item()
        assert difference < 1e-12 if reference == "anchor" else difference > 1e-4
    apart = (gradients["anchor"] - gradients["clean"]).norm() / gradients["anchor"].norm()
    assert 1e-4 < apart.item() < 1
    for reference in ("anchor", "clean"):
        method = I.Method(I.PGD(), smooth(reference), updates_bn=())
        loss, _, _ = I.training_loss(model, method, batch, adversary=adversary)
        gradients[reference] = torch.cat([g.flatten() for g in _gradients(model, loss)])
    torch.testing.assert_close(gradients["anchor"], gradients["clean"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weight_decay_of_sgd_sees_the_perturbed_weights_exactly(
    model: Network, batch: I.Batch, momentum: float
) -> None:
    method = I.Method(I.NoAttack(), I.CrossEntropy(), perturbation=I.AWP(0.05))
    by_hand, lr, decay = copy.deepcopy(model), 0.1, 0.2
    rest = [p for name, p in model.named_parameters() if name != "conv.weight"]
    groups = [{"params": [model.conv.weight], "weight_decay": 2 * decay}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay)
    velocity = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    for _ in range(3):
        loss, _, evidence = I.training_loss(by_hand, method, batch)
        gradients = dict(zip(velocity, _gradients(by_hand, loss), strict=True))
        I.training_step(model, method, batch, optimizer)
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                strength = 2 * decay if name == "conv.weight" else decay
                at = p + evidence.offsets.get(name, torch.zeros_like(p))
                velocity[name] = momentum * velocity[name] + gradients[name] + strength * at
                p.sub_(lr * velocity[name])
        for (name, found), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_weight_perturbation_weight_decay_is_that_of_the_optimiser(model: Network, batch: I.Batch) -> None:
    by_hand = copy.deepcopy(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2)
    theirs = torch.optim.SGD(by_hand.parameters(), lr=0.1, weight_decay=0.2)
    I.training_step(model, I.natural(), batch, ours)
    F.cross_entropy(by_hand(batch.x), batch.y, reduction="none").mean().backward()
    theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_decoupled_weight_decay_shrinks_the_weights_themselves(model: Network, batch: I.Batch) -> None:
    frozen = [p.detach().clone() for p in model.parameters()]
    # A learning rate so small that only decoupled decay, lr · decay · w, can be seen.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=1e6, eps=1e9)
    I.training_step(model, I.Method(I.NoAttack(), I.CrossEntropy(), perturbation=I.AWP(0.5)), batch, optimizer)
    for found, before in zip(model.parameters(), frozen, strict=True):
        torch.testing.assert_close(found.detach(), (1 - 1e-3) * before, rtol=1e-9, atol=1e-12)


def test_frozen_weights_are_neither_perturbed_nor_trained(model: Network, batch: I.Batch) -> None:
    model.conv.weight.requires_grad_(False)
    before = model.conv.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    method = I.Method(I.PGD(steps=2), I.CrossEntropy(), perturbation=I.AWP(0.05))
    computed, _ = I.training_step(model, method, batch, optimizer)
    assert set(computed.evidence.offsets) == {"head.weight"}
    assert torch.equal(model.conv.weight, before)
    assert model.conv.weight.grad is None


def test_old_gradients_do_not_leak_into_a_step(model: Network, batch: I.Batch) -> None:
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = torch.full_like(p, 100.0)
    for net in (model, twin):
        I.training_step(net, I.natural(), batch, torch.optim.SGD(net.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_remembered_values_are_those_before_the_update_and_carry_no_graph(model: Network, batch: I.Batch) -> None:
    before = copy.deepcopy(model)
    method = replace(
        I.natural(), remember=(("loss", I.CrossEntropy("clean")), ("twice", I.Ramp(0, 2) * I.Correct("clean")))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, seen = I.training_step(model, method, batch, optimizer, progress=I.Progress(0, 2))
    expected = F.cross_entropy(before(batch.x), batch.y, reduction="none").detach()
    torch.testing.assert_close(seen["loss"], expected, rtol=0, atol=1e-12)
    assert set(seen["twice"].tolist()) <= {0.0, 1.0}
    assert not seen["loss"].requires_grad


@dataclass(frozen=True)
class OfFeatures(I.Signal):
    """Mean square of the penultimate features of the adversarial images."""

    needs = frozenset({"adv", "features"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return evidence.features.square().mean(1)


def test_features_are_what_goes_into_the_head_for_the_adversarial_images_and_carry_gradient(
    model: Network, batch: I.Batch, adversary: I.Adversary
) -> None:
    loss = I.CrossEntropy("clean") + I.CrossEntropy("adv") + OfFeatures()
    computed = I.training_loss(model, I.Method(I.PGD(), loss, updates_bn=()), batch, adversary=adversary)
    expected = F.avg_pool2d(F.softplus(model.norm(model.conv(adversary.x))), 2).flatten(1)
    torch.testing.assert_close(computed.evidence.features, expected, rtol=0, atol=1e-12)
    assert computed.evidence.features.requires_grad
    assert not model.head._forward_pre_hooks
    headless = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with pytest.raises(I.UserError, match="must have a sub-module `head`"):
        I.training_loss(headless, I.Method(I.PGD(), loss), batch, adversary=adversary)


@dataclass(frozen=True)
class OneNumber(I.Signal):
    """A mean over the batch, which is not a value for each instance."""

    needs = frozenset({"adv"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return I.CrossEntropy()(evidence).mean()


def test_a_loss_that_is_not_one_number_an_instance_is_refused(model: Network, batch: I.Batch) -> None:
    with pytest.raises(I.UserError, match=r"one number an instance \(8,\); got \(\)"):
        I.training_loss(model, I.Method(I.PGD(steps=1), OneNumber()), batch)


class Fails(nn.Module):
    """Raises in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        raise RuntimeError("in the middle of a forward")


@pytest.mark.parametrize("mode", ["eval", "train", "batch"])
def test_modes_are_left_as_found_after_an_error_too(mode: str) -> None:
    model = Fails()
    model.norm.eval()
    with pytest.raises(RuntimeError, match="in the middle"):
        I.PGD(mode=mode)(model, I.Batch(torch.rand(3, 1, 2, 2), torch.zeros(3).long()))
    assert (model.training, model.norm.training) == (True, False)
    assert (int(model.norm.num_batches_tracked) == 1) == (mode == "train")


@pytest.mark.parametrize(("mode", "batchwise", "updates"), [("eval", False, 0), ("train", True, 1), ("batch", True, 0)])
def test_the_three_modes_choose_statistics_and_updates(mode: str, batchwise: bool, updates: int) -> None:
    norm, x = nn.BatchNorm2d(2), 3 + torch.randn(9, 2, 2, 2)
    before = norm.running_mean.clone()
    with forward_mode(norm, mode):
        found = norm(x)
    assert (abs(found.mean().item()) < 1e-5) == batchwise
    assert int(norm.num_batches_tracked) == updates
    assert torch.equal(norm.running_mean, before) == (updates == 0)


@pytest.mark.parametrize("mode", ["eval", "train", "batch"])
def test_an_attack_between_a_loss_and_its_backward_does_not_spoil_the_gradient(
    model: Network, batch: I.Batch, mode: str
) -> None:
    loss, _, _ = I.training_loss(model, I.natural(), batch)
    expected = torch.autograd.grad(loss.mean(), list(model.parameters()), retain_graph=True)
    I.PGD(mode=mode, steps=2)(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, loss), expected, strict=True))


def test_attacks_in_batch_mode_see_the_statistics_of_their_own_batch() -> None:
    model = Network()
    batch = I.Batch(torch.rand(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3)
    attack = I.PGD(I.Linf(0.2), start=I.Zero(), steps=3)
    running, own, updating = (
        replace(attack, mode=m)(copy.deepcopy(model), batch).x for m in ("eval", "batch", "train")
    )
    assert torch.equal(own, updating)
    assert not torch.equal(own, running)


def test_an_averaged_copy_shares_nothing_with_its_model_and_follows_statistics() -> None:
    model = Network().train()
    average = averaged_copy(model)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    assert not {t.data_ptr() for t in average.state_dict().values()} & {
        t.data_ptr() for t in model.state_dict().values()
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = I.Batch(torch.rand(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3)
    before = {name: t.clone() for name, t in average.state_dict().items()}
    I.training_step(model, I.natural(), batch, optimizer)
    assert all(torch.equal(t, before[name]) for name, t in average.state_dict().items())
    I.EMA(0.5).update(average, model, I.Progress(0, 1, step=1000))
    for name, now in model.state_dict().items():
        expected = (before[name] + now) / 2 if now.is_floating_point() else now
        torch.testing.assert_close(average.state_dict()[name], expected, rtol=0, atol=1e-12)


def test_a_given_perturbation_of_one_tensor_is_the_closed_form() -> None:
    weights = {"w": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([1.0, 1.0])}
    offsets = I.AWP(0.1)(weights, lambda p: (p["w"] * torch.tensor([[0.0, 2.0]])).sum() + p["b"].sum())
    assert offsets.keys() == {"w"}
    assert offsets["w"].tolist() == [[0.0, 0.5]]
    assert not offsets["w"].requires_grad
    assert not I.AWP(0.1)(weights, lambda p: 0 * p["w"].sum())["w"].any()
    together = I.SAM(1.0)(weights, lambda p: (p["w"] * torch.tensor([[0.0, 3.0]])).sum() + (4 * p["b"][0]))
    torch.testing.assert_close(together["w"], torch.tensor([[0.0, 0.6]]))
    torch.testing.assert_close(together["b"], torch.tensor([0.8, 0.0]))
