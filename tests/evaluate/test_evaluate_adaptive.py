"""The attacks of the adaptive suite reach known optima, and are what their names say."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import instar
from instar.attacks import PGD, MultiTargeted, OutputDiversified, Restarts, Square, Transfer, Zero, in_turn, passes
from instar.attacks.attack import Attack
from instar.attacks.transfer import fingerprint, online
from instar.errors import UserError
from instar.evaluate import Suite, evaluate
from instar.evaluate.adaptive import (
    MULTIPLES,
    SCALES,
    adaptive,
    diagnoses,
    sweep,
    transfers,
    with_surrogates,
    with_twin,
)
from instar.evaluate.diagnosis import FallingLoss, VanishingGradient
from instar.evaluate.entries import Entry, descent, pgd
from instar.evaluate.targets import online_of
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import parse
from instar.models import create, load, save
from instar.signals import CrossEntropy, Margin, Scaled, TargetedMargin
from instar.threat import L1, L2, Ball, Linf
from instar.threat import ball as ball_of
from instar.train import train


def linear(classes: int, *, seed: int = 1, n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """Images so far from 0 and 1 that the box never matters, with their predictions as labels."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    x = 0.4 + 0.2 * torch.rand(n, 1, 6, 6)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
        return net, x, net(x).argmax(1)


@torch.no_grad()
def distance(net: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """To the nearest boundary: the least of lead over dual norm, over the wrong classes."""
    logits, weight = net(x), net[1].weight
    lead = logits.gather(1, y[:, None]) - logits
    dual = {"Linf": 1, "L2": 2, "L1": float("inf")}[norm]
    slope = torch.linalg.vector_norm(weight[y][:, None] - weight[None], dual, dim=2)
    found = torch.where(slope > 0, lead / slope.clamp_min(1e-12), torch.full_like(lead, float("inf")))
    return found.amin(1)


def halfway(found: Tensor) -> float:
    ranked = found.sort().values
    middle = len(found) // 2
    return float(ranked[middle - 1 : middle + 1].mean())


def breaks(attack: Attack, net: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
    """Which points an attack breaks (n,)."""
    found = attack(net, Batch(x, y), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return (net(found.x).argmax(1) != y) | (found.kappa < found.inspected)


ATTACKS: dict[str, Callable[[Ball], Attack]] = {
    "scaled up": lambda ball: descent(ball, Scaled(CrossEntropy(), 100.0), 60),
    "margin": lambda ball: descent(ball, Margin(), 60),
    "multi-targeted": lambda ball: MultiTargeted(descent(ball, Margin(), 60)),
    "diversified": lambda ball: OutputDiversified(descent(ball, Margin(), 60)),
    "restarts": lambda ball: Restarts(descent(ball, Margin(), 60), 2),
}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("name", "classes"), [*((name, 2) for name in ATTACKS), ("multi-targeted", 5)])
def test_on_a_linear_model_every_attack_breaks_what_can_be_broken(name: str, classes: int, norm: str) -> None:
    """With more classes than two, only aiming at each of them in turn is sure to find the nearest."""
    net, x, y = linear(classes)
    found = distance(net, x, y, norm)
    eps = halfway(found)
    clear = (found - eps).abs() > 0.02 * eps  # descents approach the optimum geometrically
    assert clear.sum() > 30
    broken = breaks(ATTACKS[name](ball_of(norm, eps)), net, x, y)
    assert broken[clear].tolist() == (found < eps)[clear].tolist()


@pytest.mark.parametrize("name", ATTACKS)
def test_on_a_linear_model_of_five_classes_no_attack_breaks_what_cannot_be_broken(name: str) -> None:
    net, x, y = linear(5)
    found = distance(net, x, y, "Linf")
    eps = halfway(found)
    broken = breaks(ATTACKS[name](Linf(eps)), net, x, y)
    assert not (broken & (found > 1.001 * eps)).any()
    assert broken[found < 0.8 * eps].all()
    assert (found < 0.8 * eps).sum() > 10


def test_square_reaches_the_optimum_of_a_linear_model_pixel_by_pixel() -> None:
    net, x, _ = linear(2, n=24)
    with torch.no_grad():
        # The reference never puts its smallest squares on the last row and column.
        net[1].weight *= torch.nn.functional.pad(torch.ones(5, 5), (0, 1, 0, 1)).flatten()
        net[1].bias -= net(x).mean(0)
        y = net(x).argmax(1)
    found = distance(net, x, y, "Linf")
    eps = halfway(found)
    clear = (found - eps).abs() > 0.01 * eps
    broken = breaks(Square(Linf(eps), queries=900), net, x, y)
    assert broken[clear].tolist() == (found < eps)[clear].tolist()


@pytest.mark.parametrize("ball", [Linf(0.05), L2(0.3), L1(1.0)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda ball: Restarts(descent(ball, Margin(), 4), 3),
        lambda ball: MultiTargeted(descent(ball, Margin(), 4), targets=2),
        lambda ball: OutputDiversified(descent(ball, CrossEntropy(), 4)),
        lambda ball: Square(ball, queries=20, restarts=2),
    ],
    ids=["restarts", "multi-targeted", "diversified", "square"],
)
def test_results_lie_in_the_ball_and_the_box_and_leave_the_model_alone(
    make: Callable[[Ball], Attack], ball: Ball, make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]]
) -> None:
    net, x, y = make_task(4, n=9)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    attack = make(ball)
    found = attack(net, Batch(x, y), generator=torch.Generator().manual_seed(0))
    assert bool((ball.size(found.x - x) <= ball.radius * (1 + 1e-5) + 1e-6).all())
    assert bool(((found.x >= 0) & (found.x <= 1)).all())
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    again = attack(net, Batch(x, y), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.x, again.x)
    assert parse(repr(attack)) == attack


def test_scaling_the_signal_is_scaling_the_logits() -> None:
    net, x, y = linear(5)
    seen: list[Tensor] = []

    class Times(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 30.0 * net(images)

    for model, objective in ((net, Scaled(CrossEntropy(), 30.0)), (Times(), CrossEntropy())):
        attack = PGD(Linf(0.02), objective, steps=5, step_size=0.005)
        seen.append(attack(model, Batch(x, y), generator=torch.Generator().manual_seed(0)).x)
    assert torch.equal(*seen)
    one = PGD(Linf(0.02), Scaled(CrossEntropy(), 1.0), steps=5, step_size=0.005)
    plain = PGD(Linf(0.02), CrossEntropy(), steps=5, step_size=0.005)
    a, b = (each(net, Batch(x, y), generator=torch.Generator().manual_seed(0)).x for each in (one, plain))
    assert torch.equal(a, b)


def test_a_large_scale_makes_cross_entropy_the_margin() -> None:
    z = torch.tensor([[0.10, 0.05, 0.0, -0.1]], requires_grad=True)
    e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), adv=z)
    shares = []
    for alpha in (1.0, 10.0, 100.0):
        (gradient,) = torch.autograd.grad(Scaled(CrossEntropy(), alpha)(e).sum(), z)
        shares.append(float(gradient[0, 1] / gradient[0, 1:].sum()))
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.36, abs=0.01)
    assert shares[-1] > 0.99


def test_targets_are_the_wrong_classes_by_their_clean_logits() -> None:
    clean = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 1.0, 1.0, 4.0]])
    moved = torch.tensor([[0.0, 1.0, 10.0, 100.0], [5.0, 1.0, 2.0, 3.0]])
    e = Evidence(x=torch.zeros(2, 1, 1, 1), y=torch.tensor([1, 0]), clean=clean, adv=moved)
    assert [TargetedMargin(rank)(e).tolist() for rank in (1, 2, 3)] == [[9, -2], [99, -4], [-1, -3]]
    with pytest.raises(UserError, match="rank of TargetedMargin must be at most 3 here; got 4"):
        TargetedMargin(4)(e)
    unknown = replace(e, y=torch.tensor([1, -1]))
    assert TargetedMargin(1)(unknown)[1] == float("-inf")


def test_targets_in_turn_reach_a_class_that_the_best_wrong_one_hides() -> None:
    """Two wrong classes whose gradients cancel each other: the margin of the better one oscillates between them."""

    class Valley(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = 10 * (x.flatten(1).mean(1) - 0.5)
            return torch.stack([torch.full_like(value, 0.6), value, -value], 1)

    x, y = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    stuck = PGD(Linf(0.1), Margin(), steps=9, step_size=0.05, start=Zero())
    class_two = MultiTargeted(stuck, targets=2)
    assert breaks(class_two, Valley(), x, y).all()
    assert not breaks(PGD(Linf(0.05), Margin(), steps=9, step_size=0.05, start=Zero()), Valley(), x, y).any()


class Counting(nn.Module):
    """How many images a model is asked about, in each call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.net(x)


def test_restarts_are_the_worst_case_of_their_runs_and_spare_what_is_broken() -> None:
    net, x, y = linear(3)
    weak = PGD(Linf(halfway(distance(net, x, y, "Linf"))), Margin(), steps=0, step_size=0.0)  # noise
    counting = Counting(net)
    together = breaks(Restarts(weak, 6), counting, x, y)
    source = torch.Generator().manual_seed(0)
    standing = torch.arange(len(y))
    expected = torch.zeros(len(y), dtype=torch.bool)
    for _ in range(6):
        found = weak(net, Batch(x[standing], y[standing]), generator=source)
        wrong = net(found.x).argmax(1) != y[standing]
        expected[standing[wrong]] = True
        standing = standing[~wrong]
    assert together.tolist() == expected.tolist()
    assert 0 < int(expected.sum()) < len(y)
    assert int(expected.sum()) > int(breaks(weak, net, x, y).sum())
    asked = counting.seen[:-1]  # the last one is the test's own
    assert asked == sorted(asked, reverse=True)


def test_attacks_in_turn_keep_order_and_say_which_points_an_iterate_broke() -> None:
    net, x, y = linear(3)

    def nothing(model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        zero = torch.zeros_like(batch.y, dtype=torch.int32)
        return Adversary(batch.x, zero, zero + 1, zero, 1)  # one inspected iterate, misclassified everywhere

    class Nothing(Attack):
        def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
            return nothing(model, batch, generator=generator)

    index = torch.arange(len(y)) + 7
    found = in_turn([Nothing(), Restarts(PGD())], net, Batch(x, y, index=index, memory={"m": index}))
    assert torch.equal(found.x, x)
    assert (found.kappa.tolist(), found.inspected.tolist()) == ([0] * len(y), [1] * len(y))


def test_diversified_starts_move_logits_further_than_noise(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    net, x, y = make_task(5, n=32)
    net.eval()
    still = PGD(Linf(0.03), Margin(), steps=0, step_size=0.0)
    with torch.no_grad():
        clean = net(x)
        noise, led = (
            (net(attack(net, Batch(x, y), generator=torch.Generator().manual_seed(0)).x) - clean).norm(dim=1).mean()
            for attack in (still, OutputDiversified(still))
        )
    assert led > 2 * noise


def test_the_sweep_crosses_where_the_known_distances_say() -> None:
    net, x, y = linear(2)
    found = distance(net, x, y, "Linf")
    eps = halfway(found)
    suite = Suite("sweep", sweep(Linf(eps), steps=20))
    (record,) = evaluate(net, data=(x, y), suite=lambda ball: suite, eps=eps)
    radii = []
    for entry in suite.entries:
        assert isinstance(entry.attack, PGD)
        radius = entry.attack.ball.radius
        radii.append(radius)
        expected = int((found > radius).sum())
        assert record.scores[entry.name].correct == expected, entry.title
        assert entry.counts == (radius <= eps)
    assert radii == sorted(radii)
    assert (radii[0], radii[-1], len(radii)) == (0.0, 1.0, 1 + len(MULTIPLES))
    assert record.scores["worst_case"].correct == int((found > eps).sum())
    assert [finding.verdict for finding in record.findings if finding.check == "monotone_in_eps"] == ["normal"]


@pytest.mark.parametrize("ball", [Linf(8 / 255), Linf(0.3), Linf(1.0), Linf(0.0), L2(0.5), L1(12)], ids=str)
def test_radii_of_the_sweep_rise_are_named_and_stay_in_the_box(ball: Ball) -> None:
    entries = sweep(ball)
    radii = [entry.attack.ball.radius for entry in entries if isinstance(entry.attack, PGD)]
    assert len(radii) == len(entries) == len({entry.name for entry in entries})
    assert radii[:-1] == sorted(set(radii[:-1]))
    assert 0.0 in radii
    assert ball.radius in radii
    assert all("0000000" not in entry.name for entry in entries)
    if ball == Linf(8 / 255):
        assert [entry.name for entry in entries[:3]] == ["eps_0", "eps_2_255", "eps_4_255"]
        assert entries[-2].name == "eps_64_255"


def test_gradients_that_vanish_are_seen_where_they_do() -> None:
    class Half(nn.Module):
        """No gradient where the mean is below one half."""

        def forward(self, x: Tensor) -> Tensor:
            value = x.flatten(1).mean(1).sub(0.5).clamp_min(0)
            return torch.stack([value, -value], 1)

    x = torch.cat([torch.full((3, 1, 2, 2), 0.3), torch.full((2, 1, 2, 2), 0.7)])
    y = torch.zeros(5, dtype=torch.int64)
    found = VanishingGradient(Linf(0.05), Margin())(Half(), Batch(x, y))
    assert (found.inspected - found.kappa).tolist() == [1, 1, 1, 0, 0]
    cut = VanishingGradient(Linf(0.05))(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False), Batch(x, y))
    assert cut.kappa.tolist() == [1] * 5

    class Cut(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.detach().flatten(1).mean(1)] * 2, 1)

    assert VanishingGradient(Linf(0.05))(Cut(), Batch(x, y)).kappa.tolist() == [0] * 5


def test_a_loss_that_falls_along_an_attack_is_seen_where_it_does() -> None:
    net, x, y = linear(3)
    attack = PGD(Linf(0.02), steps=5, step_size=0.005)
    assert FallingLoss(attack)(net, Batch(x, y)).kappa.tolist() == [1] * len(y)

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: Tensor) -> Tensor:
            return images.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return -gradient

    class Misled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = net(Backwards.apply(images))
            return result

    assert FallingLoss(attack)(Misled(), Batch(x, y)).kappa.tolist() == [0] * len(y)


def test_diagnoses_are_columns_that_tables_and_worst_case_leave_out() -> None:
    net, x, y = linear(3)
    entries = (pgd(Linf(0.02), steps=3), *diagnoses(Linf(0.02), steps=3))
    assert [entry.diagnosis for entry in entries] == [False, True, True, True, True]

    class NoGradient(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = net(torch.round(images * 255) / 255)
            return result

    y = NoGradient()(x).argmax(1)
    (record,) = evaluate(NoGradient(), data=(x, y), suite=lambda ball: Suite("d", entries), eps=0.001)
    assert record.scores["zero_gradient_ce"].correct == 0
    assert record.scores["worst_case"].correct == record.scores["pgd_3"].correct > 0
    titles = [title for title, _ in instar.evaluate.table.rows([record])]
    assert titles == ["clean", "PGD-3", "worst case"]
    assert record.protocol["attacks"]["zero_gradient_ce"]["diagnosis"] is True
    assert "diagnosis" not in record.protocol["attacks"]["pgd_3"]


@pytest.fixture
def surrogate(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    net = create("small_cnn", classes=3, channels=1, image_size=6, width=4)
    save(net, tmp_path / "surrogate" / "best.safetensors", {"dataset": "custom"})
    return tmp_path / "surrogate" / "best.safetensors"


def test_transfer_shows_the_model_the_examples_of_the_surrogate(surrogate: Path) -> None:
    _, x, y = linear(3)
    (entry,) = transfers(Linf(0.1), [surrogate], steps=5)
    assert isinstance(entry.attack, Transfer)
    assert entry.title == "transfer from surrogate/best"
    own = load(surrogate)
    draws = torch.Generator().manual_seed(0)
    expected = entry.attack.attack(own, Batch(x, y), generator=draws).x
    other, *_ = linear(3, seed=5)
    found = entry.attack(other, Batch(x, y), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.x, expected)
    assert found.kappa.tolist() == found.inspected.tolist()  # nothing that the surrogate saw counts
    assert passes(entry.attack, 3) == 12
    assert entry.attack.weights == fingerprint(surrogate)[:16]


def test_a_surrogate_that_changed_or_does_not_fit_is_one_line(surrogate: Path) -> None:
    net, x, y = linear(3)
    (entry,) = transfers(Linf(0.1), [surrogate], steps=2)
    four, _, _ = linear(4)
    with pytest.raises(UserError, match="has 3 classes, the model 4"):
        entry.attack(four, Batch(x, y))
    save(create("small_cnn", classes=3, channels=1, image_size=6, width=8), surrogate, {})
    with pytest.raises(UserError, match="has other weights than when this attack was written down"):
        entry.attack(net, Batch(x, y))
    with pytest.raises(UserError, match="there is no surrogate"):
        transfers(Linf(0.1), [surrogate.with_name("absent.safetensors")])
    with pytest.raises(UserError, match="must be a list"):
        transfers(Linf(0.1), str(surrogate))
    with pytest.raises(UserError, match="surrogates are for the suite adaptive; the suite is quick"):
        with_surrogates("quick", surrogates=[surrogate])


def test_without_a_surrogate_there_is_no_such_column_and_the_verdict_says_so(surrogate: Path) -> None:
    net, x, y = linear(3)
    small = partial(adaptive, steps=5, short=3, restarts=1, queries=5, searches=1)
    (without,) = evaluate(net, data=(x, y), suite=small, eps=0.02, n=6)
    (with_one,) = evaluate(net, data=(x, y), suite=partial(small, surrogates=[surrogate]), eps=0.02, n=6)
    assert "transfer_1" not in without.scores
    assert "gradients against transfer" in without.verdict.missing
    assert with_one.scores["transfer_1"].title == "transfer from surrogate/best"
    assert "gradients against transfer" not in with_one.verdict.missing
    shared = [name for name in without.scores if name != "worst_case"]
    assert all(without.instances[name].tolist() == with_one.instances[name].tolist() for name in shared)


def test_the_online_weights_of_a_run_with_an_average_are_a_surrogate_by_themselves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    data = torch.utils.data.TensorDataset(x, y)
    run = tmp_path / "averaged"
    train("natural", data=data, model="small_cnn", width=4, epochs=1, batch_size=16, out=run, ema=0.9)
    state = run / "checkpoints" / "state.safetensors"
    assert online_of(run) == state
    assert online_of(tmp_path) is None
    chosen = with_twin(adaptive(Linf(0.1)), state, Linf(0.1))
    (entry,) = [entry for entry in chosen.entries if entry.kind == "transfer"]
    assert entry.title == "transfer from averaged (online weights)"
    averaged, followed = load(run / "checkpoints" / "last.safetensors"), online(state)
    pairs = list(zip(averaged.parameters(), followed.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    found = entry.attack(averaged, Batch(x[:5], y[:5]), generator=torch.Generator().manual_seed(0))
    again = entry.attack.attack(followed, Batch(x[:5], y[:5]), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.x, again.x)


def test_impossible_settings_are_one_line() -> None:
    for make, words in (
        (lambda: Restarts(PGD(), 0), "times of Restarts"),
        (lambda: MultiTargeted(PGD(), 0), "targets of MultiTargeted"),
        (lambda: OutputDiversified(PGD(), 0), "lead of OutputDiversified"),
        (lambda: Square(Linf(0.1), queries=0), "at least 1 query"),
        (lambda: Scaled(CrossEntropy(), 0.0), "alpha of Scaled must be a positive number"),
        (lambda: TargetedMargin(0), "rank of TargetedMargin must be at least 1"),
        (lambda: Entry("mine", "mine", PGD(), role="hero"), "role of mine must be one of"),
        (lambda: Suite("mine", (), images=0), "at least one image"),
    ):
        with pytest.raises(UserError, match=words):
            make()
    with pytest.raises(UserError, match="needs at least 5×5 pixels; got 4×4"):
        Square(L2(0.5))(nn.Flatten(), Batch(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])))


def test_the_scales_reach_both_ways() -> None:
    assert min(SCALES) == 0.1
    assert max(SCALES) == 1000
    assert 1.0 in SCALES
