"""CutMix and MixUp: labels are shared exactly as pixels are, and what has no label neither gives nor takes any."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from instar.data.mix import CutMix, MixUp
from instar.errors import UserError
from instar.evidence import Batch

Mixer = Callable[[Batch, int, torch.Generator], Batch]
CLASSES = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int = 12, height: int = 8, width: int = 10) -> Batch:
    """Image i is i / count everywhere, so that each pixel says where it came from; all has its own identity."""
    x = (torch.arange(count) / count).reshape(-1, 1, 1, 1).expand(-1, 3, height, width).clone()
    return Batch(
        x,
        torch.arange(count) % CLASSES,
        index=torch.arange(count) + 100,
        memory={"weight": torch.rand(count)},
        source=torch.arange(count) % 2,
    )


def blocks(mixed: Batch, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From the pixels of a CutMix of `numbered`: the share of each instance's own pixels, and its partner."""
    origin = (mixed.x * count).round().long()
    assert bool((origin == origin[:, :1]).all())
    own = torch.arange(count)[:, None, None]
    foreign = origin[:, 0] != own
    partner = torch.where(foreign, origin[:, 0], -1).flatten(1).max(1).values
    partner = torch.where(partner < 0, torch.arange(count), partner)
    assert bool(((origin[:, 0] == own) | (origin[:, 0] == partner[:, None, None])).all())
    return 1 - foreign.double().mean((1, 2)), partner


@pytest.mark.parametrize("seed", range(30))
def test_cutmix_shares_labels_exactly_as_pixels(seed: int) -> None:
    batch = numbered()
    mixed = CutMix(1.0)(batch, CLASSES, generator(seed))
    share, partner = blocks(mixed, 12)
    assert mixed.target is not None
    for row in range(12):
        expected = torch.zeros(CLASSES, dtype=torch.float64)
        expected[batch.y[row]] += share[row]
        expected[batch.y[partner[row]]] += 1 - share[row]
        assert torch.allclose(mixed.target[row].double(), expected, atol=1e-7)
        larger = batch.y[row] if share[row] >= 0.5 else batch.y[partner[row]]
        assert mixed.y[row] == larger
    assert torch.allclose(mixed.target.sum(1), torch.ones(12), atol=1e-6)


def test_cutmix_replaces_one_rectangle_which_is_the_same_in_every_image() -> None:
    cut = 0
    for seed in range(50):
        mixed = CutMix(1.0)(numbered(), CLASSES, generator(seed))
        origin = (mixed.x[:, 0] * 12).round().long()
        foreign = origin != torch.arange(12)[:, None, None]
        where = foreign.any(0)
        rows, columns = where.any(1), where.any(0)
        assert torch.equal(where, rows[:, None] & columns)
        assert bool(((foreign == where).flatten(1).all(1) | ~foreign.flatten(1).any(1)).all())
        cut += int(where.any())
    assert cut > 30


def test_cutmix_rectangles_have_the_papers_size_and_place() -> None:
    """By the paper's own steps, from the same λ: with α → ∞, λ = ½, and the rectangle is as large as it can be."""
    side, seen = 16, set()
    half = int(side * math.sqrt(0.5)) // 2
    batch = Batch(torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, side, side) / 2, torch.tensor([0, 1]))
    for seed in range(600):
        mixed = CutMix(1e9)(batch, 2, generator(seed))
        changed = mixed.x[0, 0] != 0
        if not changed.any():  # the instance is its own partner
            continue
        rows, columns = changed.any(1).nonzero().flatten().tolist(), changed.any(0).nonzero().flatten().tolist()
        for line in (rows, columns):
            clipped = line[0] == 0 or line[-1] == side - 1
            assert len(line) == 2 * half or (clipped and half <= len(line) < 2 * half)
        seen.add((rows[0], rows[-1]))
    expected = {(max(c - half, 0), min(c + half, side) - 1) for c in range(side)}
    assert seen == expected  # every centre occurs, those at the borders too


@pytest.mark.parametrize("seed", range(20))
def test_mixup_blends_images_and_labels_with_one_share(seed: int) -> None:
    x = torch.rand(12, 3, 4, 4, dtype=torch.float64)
    batch = replace(numbered(), x=x)
    mixed = MixUp(1.0)(batch, CLASSES, generator(seed))
    assert mixed.target is not None
    shares = []
    for row in range(12):
        # the partner and the share by which this image, and no other pair, is explained
        direction = x - x[row]
        amount = ((mixed.x[row] - x[row]) * direction).sum((1, 2, 3)) / (direction**2).sum((1, 2, 3)).clamp(min=1e-12)
        error = (x[row] + amount[:, None, None, None] * direction - mixed.x[row]).abs().amax((1, 2, 3))
        partner = int(error.argmin())
        assert float(error[partner]) < 1e-12
        if torch.equal(mixed.x[row], x[row]):
            assert mixed.target[row, batch.y[row]] == 1
            continue
        share = 1 - float(amount[partner])
        shares.append(share)
        expected = torch.zeros(CLASSES, dtype=torch.float64)
        expected[batch.y[row]] += share
        expected[batch.y[partner]] += 1 - share
        assert torch.allclose(mixed.target[row], expected, atol=1e-9)
        assert mixed.y[row] == (batch.y[row] if share >= 0.5 else batch.y[partner])
    assert max(shares) - min(shares) < 1e-9


def test_mixup_stays_between_its_two_images() -> None:
    """λ·1 + (1 − λ)·1 may exceed 1 by a rounding, and an image outside [0, 1] is refused further on."""
    batch = Batch(torch.ones(64, 3, 8, 8), torch.arange(64) % CLASSES)
    for seed in range(50):
        mixed = MixUp(1.0)(batch, CLASSES, generator(seed))
        assert torch.equal(mixed.x, batch.x)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_share_has_a_beta_distribution(alpha: float) -> None:
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    source, draws, shares = generator(5), 6000, []
    while len(shares) < draws:
        mixed = MixUp(alpha)(Batch(x, torch.tensor([0, 1])), 2, source)
        if float(mixed.x.sum()) and not torch.equal(mixed.x, x):
            shares.append(1 - float(mixed.x[0]))
    drawn = torch.tensor(shares, dtype=torch.float64).sort().values
    expected = torch.distributions.Beta(alpha, alpha).sample((200_000,)).double().sort().values
    # Kolmogorov and Smirnov's distance; 1.95 / √n is exceeded once in a thousand
    rank = torch.searchsorted(expected, drawn) / len(expected)
    distance = float((rank - torch.arange(draws) / draws).abs().max())
    assert distance < 1.95 / math.sqrt(draws) + 0.005


@pytest.mark.parametrize("mixer", [CutMix(1.0), MixUp(1.0)], ids=str)
def test_partners_are_a_random_permutation(mixer: Mixer) -> None:
    count = 4
    batch = Batch(torch.eye(count).reshape(count, count, 1, 1).expand(-1, -1, 8, 8), torch.arange(count))
    seen, source, draws = torch.zeros(count, count), generator(), 0
    while draws < 3000:
        target = mixer(batch, count, source).target
        assert target is not None
        assert torch.allclose(target.sum(0), torch.ones(count), atol=1e-6)  # each is a partner exactly once
        others = (target > 0) & ~torch.eye(count, dtype=torch.bool)
        if not others.any():  # nothing was cut, or everyone is their own partner
            continue
        seen += others
        draws += 1
    share = seen[~torch.eye(count, dtype=torch.bool)] / draws
    assert float(share.max() - share.min()) < 0.06


@pytest.mark.parametrize("mixer", [CutMix(1.0), MixUp(1.0)], ids=str)
def test_unlabelled_instances_mix_only_among_themselves(mixer: Mixer) -> None:
    labelled = torch.tensor([True, False, True, True, False, False, True, False])
    y = torch.where(labelled, torch.arange(8) % 3, -1)
    x = labelled.float().reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    noisy = Batch(torch.rand(8, 3, 8, 8), y, labelled=labelled)
    changed = 0
    for seed in range(40):
        mixed = mixer(Batch(x, y), 3, generator(seed))
        assert torch.equal(mixed.x, x)  # white with white and black with black
        assert mixed.target is not None
        assert not mixed.target[~labelled].any()
        assert torch.allclose(mixed.target[labelled].sum(1), torch.ones(4), atol=1e-6)
        assert bool(((mixed.y == -1) == ~labelled).all())
        other = mixer(noisy, 3, generator(seed))
        assert other.labelled is labelled
        changed += int((other.x != noisy.x)[~labelled].any())
    assert changed > 20  # they do mix


@pytest.mark.parametrize("mixer", [CutMix(1.0), MixUp(1.0)], ids=str)
def test_soft_labels_are_mixed_in_place_of_hard_ones(mixer: Mixer) -> None:
    soft = torch.softmax(torch.randn(12, CLASSES), 1)
    batch = replace(numbered(), y=torch.cat([torch.arange(11) % CLASSES, torch.tensor([-1])]), target=soft)
    plain = mixer(replace(numbered(), y=torch.arange(12), target=None), 12, generator(3))
    mixed = mixer(batch, CLASSES, generator(3))
    assert plain.target is not None
    assert mixed.target is not None
    assert torch.allclose(mixed.target[:11].sum(1), torch.ones(11), atol=1e-6)
    assert not mixed.target[11].any()  # the last has no label, whatever its soft label says
    every = mixer(replace(batch, y=torch.arange(12) % CLASSES), CLASSES, generator(3))
    assert every.target is not None
    assert torch.allclose(every.target, plain.target @ soft, atol=1e-6)
    assert batch.target is soft


@pytest.mark.parametrize("mixer", [CutMix(1.0), MixUp(1.0)], ids=str)
def test_identity_is_kept_and_the_generator_alone_decides(mixer: Mixer) -> None:
    batch = numbered()
    before, state = batch.x.clone(), torch.random.get_rng_state()
    first = mixer(batch, CLASSES, generator(8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(batch.x, before)
    assert batch.target is None
    for name in ("index", "memory", "source"):
        assert getattr(first, name) is getattr(batch, name)
    torch.manual_seed(99)
    second, other = mixer(batch, CLASSES, generator(8)), mixer(batch, CLASSES, generator(9))
    for name in ("x", "y", "target"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("mixer", [CutMix(1.0), MixUp(1.0)], ids=str)
def test_single_and_empty_batches_are_left_as_they_are(mixer: Mixer) -> None:
    one = Batch(torch.rand(1, 1, 8, 8), torch.tensor([2]))
    mixed = mixer(one, 3, generator())
    assert torch.equal(mixed.x, one.x)
    assert mixed.target is not None
    assert mixed.target.tolist() == [[0.0, 0.0, 1.0]]
    none = mixer(Batch(torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)), 3, generator())
    assert none.target is not None
    assert none.target.shape == (0, 3)


@pytest.mark.parametrize(("share", "kept"), [(0.5, True), (0.5 - 1e-9, False), (0.0, False), (1.0, True)])
def test_the_label_is_that_of_the_larger_share_and_at_equal_shares_its_own(
    share: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instar.data.mix._share", lambda alpha, source: share)
    batch, seen = Batch(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])), set()
    for seed in range(20):
        seen.add(tuple(MixUp()(batch, 2, generator(seed)).y.tolist()))
    assert seen == ({(0, 1)} if kept else {(0, 1), (1, 0)})  # (0, 1) also where all are their own partners


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 1e3, 1e12])
def test_any_alpha_gives_shares_in_the_unit_interval(alpha: float) -> None:
    batch = Batch(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), torch.tensor([0, 1]))
    for seed in range(50):
        mixed = MixUp(alpha)(batch, 2, generator(seed))
        assert mixed.target is not None
        assert bool(((mixed.target >= 0) & (mixed.target <= 1)).all())
        assert torch.allclose(mixed.target.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: CutMix(0.0), "alpha of CutMix must be positive and finite; got 0.0"),
        (lambda: MixUp(-1.0), "alpha of MixUp must be positive"),
        (lambda: MixUp(math.nan), "got nan"),
        (lambda: MixUp()(numbered(), 3, generator()), r"labels must be in 0\.\.2 for 3 classes"),
        (
            lambda: CutMix()(replace(numbered(), target=torch.rand(12, 4)), CLASSES, generator()),
            r"soft labels must be \(12, 5\).*got \(12, 4\)",
        ),
    ],
)
def test_impossible_mixtures_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make()
