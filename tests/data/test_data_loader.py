"""The loader: identities and values are right, and any step of any epoch can be repeated."""

from __future__ import annotations

import threading
from itertools import islice, pairwise

import official_files as files
import pytest
import torch
from torch.utils.data import TensorDataset

from instar.data.augment import Augmentation, Flip, PadCrop
from instar.data.catalogue import CATALOGUE
from instar.data.indexed import FolderImages, Images, ResidentImages, from_dataset, generic_info
from instar.data.resident import batches, epoch_order, steps_per_epoch
from instar.data.splits import TestSplit, TrainSplit, hold_out
from instar.errors import UserError
from instar.evidence import Batch
from instar.parallel import Group

COUNT = 103
PIXELS = torch.from_numpy(files.random_images(COUNT, shape=(3, 8, 8)))
LABELS = torch.arange(COUNT) % 5
INFO = generic_info("mine", classes=tuple("abcde"), shape=(3, 8, 8), train_size=COUNT)
USUAL = Augmentation((PadCrop(2), Flip()))


class Counted:
    """Lazy images that remember what was fetched, and fail where they are told to."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.labels, self.info, self.classes, self.shape = LABELS, INFO, INFO.classes, INFO.shape
        self.fetched: list[list[int]] = []
        self.fail_at = fail_at

    def __len__(self) -> int:
        return COUNT

    def fetch(self, positions: torch.Tensor) -> torch.Tensor:
        self.fetched.append(positions.tolist())
        if self.fail_at is not None and self.fail_at in positions:
            raise UserError(f"picture {self.fail_at}: expected a complete picture")
        return PIXELS[positions]


def every_kind() -> dict[str, Images]:
    return {
        "resident uint8": ResidentImages(PIXELS, LABELS, INFO),
        "resident float": ResidentImages(PIXELS.float() / 255, LABELS, INFO),
        "lazy": Counted(),
        "torch dataset": from_dataset(TensorDataset(PIXELS, LABELS), classes=list("abcde")),
    }


def same(first: Batch, second: Batch) -> bool:
    assert first.index is not None
    assert second.index is not None
    return torch.equal(first.x, second.x) and torch.equal(first.y, second.y) and torch.equal(first.index, second.index)


@pytest.mark.parametrize("kind", list(every_kind()))
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_arrives_once_with_its_own_label_index_and_values(kind: str, shuffle: bool) -> None:
    split, _ = hold_out(every_kind()[kind], selection=20, seed=1)
    seen = []
    for batch in batches(split, batch_size=16, epoch=0, seed=0, shuffle=shuffle, drop_last=False):
        assert batch.index is not None
        assert batch.x.dtype == torch.float32
        assert torch.equal(batch.x, PIXELS[batch.index].float() / 255)
        assert torch.equal(batch.y, LABELS[batch.index])
        assert batch.y.dtype == batch.index.dtype == torch.int64
        seen += batch.index.tolist()
    assert sorted(seen) == split.indices.tolist()
    assert (seen == split.indices.tolist()) is not shuffle


@pytest.mark.parametrize("kind", list(every_kind()))
@pytest.mark.parametrize("first_step", [0, 1, 4, 6])
def test_starting_at_a_later_step_gives_exactly_the_remaining_batches(kind: str, first_step: int) -> None:
    split = TrainSplit(every_kind()[kind])
    options = {"batch_size": 16, "epoch": 2, "seed": 7, "shuffle": True, "drop_last": True, "augment": USUAL}
    whole = list(batches(split, **options))  # type: ignore[arg-type]
    rest = list(batches(split, **options, first_step=first_step))  # type: ignore[arg-type]
    assert len(whole) == 6
    assert len(rest) == 6 - first_step
    assert all(same(one, other) for one, other in zip(whole[first_step:], rest, strict=True))


def test_nothing_depends_on_the_global_random_state_or_on_earlier_epochs() -> None:
    split = TrainSplit(ResidentImages(PIXELS, LABELS, INFO))
    options = {"batch_size": 16, "epoch": 3, "seed": 0, "shuffle": True, "drop_last": True, "augment": USUAL}
    first = list(batches(split, **options))  # type: ignore[arg-type]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = list(batches(split, **options))  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


def test_epochs_seeds_and_steps_differ() -> None:
    split = TrainSplit(ResidentImages(PIXELS, LABELS, INFO))
    orders = [epoch_order(split, epoch=epoch, seed=seed, shuffle=True) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert all(not torch.equal(one, other) for one, other in pairwise([*orders, orders[0]]))
    # the same image twice in one epoch would be augmented differently at another step
    still = TrainSplit(ResidentImages(PIXELS[:1].expand(64, -1, -1, -1).contiguous(), LABELS[:1].expand(64), INFO))
    one, two = batches(still, batch_size=32, epoch=0, seed=0, shuffle=False, drop_last=True, augment=USUAL)
    assert not torch.equal(one.x, two.x)


def test_the_order_of_an_epoch_does_not_depend_on_the_batch_size() -> None:
    split = TrainSplit(ResidentImages(PIXELS, LABELS, INFO))
    orders = []
    for size in (1, 10, 103, 200):
        parts = batches(split, batch_size=size, epoch=1, seed=2, shuffle=True, drop_last=False)
        orders.append(torch.cat([batch.index for batch in parts if batch.index is not None]))
    assert all(torch.equal(orders[0], other) for other in orders[1:])


def test_shuffling_visits_every_order_equally_often() -> None:
    split = TrainSplit(ResidentImages(PIXELS[:3], LABELS[:3], INFO))
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(3000):
        order = tuple(epoch_order(split, epoch=epoch, seed=0, shuffle=True).tolist())
        counts[order] = counts.get(order, 0) + 1
    # chi-square with 5 degrees of freedom: 20.5 is exceeded by chance once in a thousand
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5


@pytest.mark.parametrize(("drop_last", "expected"), [(True, [40, 40]), (False, [40, 40, 23])])
def test_the_last_small_batch_is_dropped_or_kept(drop_last: bool, expected: list[int]) -> None:
    split = TestSplit(ResidentImages(PIXELS, LABELS, INFO))
    sizes = [len(batch) for batch in batches(split, batch_size=40, epoch=0, seed=0, shuffle=False, drop_last=drop_last)]
    assert sizes == expected
    assert steps_per_epoch(split, 40, drop_last) == len(expected)


@pytest.mark.parametrize(
    ("first_step", "limit", "expected"), [(0, 3, 3), (2, 3, 1), (3, 3, 0), (4, 3, 0), (0, 0, 0), (0, 99, 7)]
)
def test_limit_counts_from_the_beginning_of_the_epoch(first_step: int, limit: int, expected: int) -> None:
    split = TrainSplit(ResidentImages(PIXELS, LABELS, INFO))
    options = {"batch_size": 16, "epoch": 0, "seed": 0, "shuffle": True, "drop_last": False}
    found = list(batches(split, **options, first_step=first_step, limit=limit))  # type: ignore[arg-type]
    assert len(found) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"first_step": 8}, r"first_step must be in 0\.\.7 for an epoch of 7 steps; got 8"),
        ({"first_step": -1}, "got -1"),
        ({"limit": -1}, "limit must be 0 or more steps"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(change: dict[str, int], expected: str) -> None:
    split = TrainSplit(ResidentImages(PIXELS, LABELS, INFO))
    options = {"batch_size": 16, "epoch": 0, "seed": 0, "shuffle": True, "drop_last": False} | change
    with pytest.raises(UserError, match=expected):
        batches(split, **options)  # type: ignore[arg-type]


def test_lazy_images_are_fetched_one_batch_ahead_and_no_further() -> None:
    images = Counted()
    iterator = batches(TrainSplit(images), batch_size=16, epoch=0, seed=0, shuffle=False, drop_last=True)
    next(iterator)
    deadline = threading.Event()
    for _ in range(200):
        if len(images.fetched) == 2:
            break
        deadline.wait(0.01)
    deadline.wait(0.05)
    assert images.fetched == [list(range(16)), list(range(16, 32))]
    rest = list(iterator)
    assert len(rest) == 5
    assert len(images.fetched) == 6


def test_a_consumer_that_stops_early_leaves_no_thread_behind() -> None:
    def prefetching() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("instar-prefetch")]

    iterator = batches(TrainSplit(Counted()), batch_size=4, epoch=0, seed=0, shuffle=True, drop_last=True)
    assert len(list(islice(iterator, 3))) == 3
    assert prefetching()
    iterator.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("instar-prefetch"):
            thread.join(5)
    assert not prefetching()


def test_a_picture_that_cannot_be_read_stops_the_epoch_with_its_own_message() -> None:
    iterator = batches(TrainSplit(Counted(fail_at=40)), batch_size=16, epoch=0, seed=0, shuffle=False, drop_last=True)
    assert len(list(islice(iterator, 2))) == 2
    with pytest.raises(UserError, match="picture 40: expected a complete picture"):
        next(iterator)


def test_lazy_values_outside_the_unit_interval_are_refused() -> None:
    images = Counted()
    images.fetch = lambda positions: PIXELS[positions].float()  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"mine: images must lie in \[0, 1\]"):
        next(batches(TrainSplit(images), batch_size=4, epoch=0, seed=0, shuffle=False, drop_last=True))


def test_a_batch_never_shares_memory_with_the_images() -> None:
    pixels = PIXELS.float() / 255
    split = TrainSplit(ResidentImages(pixels.clone(), LABELS, INFO))
    batch = next(batches(split, batch_size=COUNT, epoch=0, seed=0, shuffle=False, drop_last=True))
    batch.x.zero_()
    again = next(batches(split, batch_size=COUNT, epoch=0, seed=0, shuffle=False, drop_last=True))
    assert torch.equal(again.x, pixels)


def test_pictures_in_a_folder_give_the_same_batches_whatever_the_number_of_threads(tmp_path: files.Path) -> None:
    paths = tuple(files.picture(tmp_path / f"{number}.png", (number, 0, 0), size=(8, 8)) for number in range(40))
    options = {"batch_size": 8, "epoch": 0, "seed": 0, "shuffle": True, "drop_last": True, "augment": USUAL}
    runs = []
    for workers in (1, 4):
        images = FolderImages(paths, LABELS[:40], INFO, workers=workers)
        runs.append(list(batches(TrainSplit(images), **options)))  # type: ignore[arg-type]
    assert all(same(one, other) for one, other in zip(*runs, strict=True))


def test_an_epoch_of_the_catalogues_shape_is_the_same_from_memory_and_from_floats() -> None:
    info = CATALOGUE["cifar10"]
    pixels, labels = torch.from_numpy(files.random_images(64)), torch.arange(64) % 10
    options = {"batch_size": 32, "epoch": 0, "seed": 0, "shuffle": True, "drop_last": True, "augment": USUAL}
    as_bytes = batches(TrainSplit(ResidentImages(pixels, labels, info)), **options)  # type: ignore[arg-type]
    as_floats = batches(TrainSplit(ResidentImages(pixels.float() / 255, labels, info)), **options)  # type: ignore[arg-type]
    assert all(same(one, other) for one, other in zip(as_bytes, as_floats, strict=True))


def test_the_batches_of_an_epoch_are_cut_when_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = []
    part = Group.part
    monkeypatch.setattr(Group, "part", lambda self, total: cut.append(total) or part(self, total))
    split = TrainSplit(ResidentImages(PIXELS, LABELS, INFO))
    stream = batches(split, batch_size=2, epoch=0, seed=0, shuffle=True, drop_last=True)
    next(stream)
    next(stream)
    assert cut == [2, 2]  # of fifty
