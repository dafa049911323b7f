"""Three splits as types: disjoint, stratified, repeatable, and the test set cannot be selected by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instar.data.indexed import ResidentImages, from_dataset, generic_info
from instar.data.sources import load
from instar.data.splits import SelectionSplit, TestSplit, TrainSplit, hold_out, require_selection, stratified
from instar.errors import UserError


def images_of(labels: list[int], *, split: str | None = "train") -> ResidentImages:
    info = generic_info("mine", classes=tuple("abcde"), shape=(1, 1, 1), train_size=len(labels))
    return ResidentImages(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), torch.tensor(labels), info, split)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), seed=st.integers(0, 9), data=st.data())
def test_hold_out_is_disjoint_complete_exact_and_stratified(labels: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(labels) - 1))
    train, selection = hold_out(images_of(labels), selection=count, seed=seed)
    assert len(selection) == count
    assert sorted(train.indices.tolist() + selection.indices.tolist()) == list(range(len(labels)))
    share = torch.bincount(torch.tensor(labels), minlength=5) * count / len(labels)
    held = torch.bincount(selection.labels, minlength=5)
    assert bool(((held - share).abs() < 1).all())
    assert train.indices.tolist() == sorted(train.indices.tolist())


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), data=st.data())
def test_a_stratified_choice_takes_no_more_than_there_is(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(labels)))
    shares = stratified(torch.tensor(labels), count)
    assert sum(share for _, share in shares) == count
    assert all(0 <= share <= len(members) for members, share in shares)


def test_equal_seeds_hold_out_equal_images_and_other_seeds_others() -> None:
    images = load("digits")
    first, again, other = (hold_out(images, selection=200, seed=seed)[1].indices for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # the choice is part of every published result: a change of these numbers is a change of the split
    assert first[:6].tolist() == [10, 25, 36, 38, 48, 57]


def test_a_fraction_holds_out_that_share() -> None:
    train, selection = hold_out(load("digits"), selection=0.1, seed=0)
    assert (len(train), len(selection)) == (1437 - 144, 144)
    nothing = hold_out(load("digits"), selection=0, seed=0)
    assert (len(nothing[0]), len(nothing[1])) == (1437, 0)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (-1, r"must hold out 0\.\.9 of the 10 training images; got -1"),
        (10, "got 10"),
        (1.0, "must be a fraction in .* or a whole number of images; got 1.0"),
        (5.0, r"got 5.0\. Did you mean 5\?"),
        (-0.1, "fraction"),
        (float("nan"), "fraction"),
        (True, "got True"),
    ],
)
def test_an_impossible_selection_is_refused(selection: float, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        hold_out(images_of([0, 1] * 5), selection=selection, seed=0)


def test_a_test_split_cannot_be_handed_to_checkpoint_selection() -> None:
    test = TestSplit(load("digits", split="test"))
    train, selection = hold_out(load("digits"), selection=100, seed=0)
    assert require_selection(selection) is selection
    for other in (test, train, load("digits"), None):
        with pytest.raises(UserError, match=rf"held out of the training set by hold_out\); got {type(other).__name__}"):
            require_selection(other)
    with pytest.raises(UserError, match="this SelectionSplit is empty"):
        require_selection(hold_out(load("digits"), selection=0, seed=0)[1])


def test_test_images_cannot_be_dressed_up_as_another_split() -> None:
    test_images = load("digits", split="test")
    for kind in (TrainSplit, SelectionSplit):
        with pytest.raises(UserError, match=rf"{kind.__name__} got test images of digits"):
            kind(test_images)
    with pytest.raises(UserError, match="TrainSplit got test images"):
        hold_out(test_images, selection=10, seed=0)
    with pytest.raises(UserError, match="TestSplit got train images"):
        TestSplit(load("digits"))
    unknown = images_of([0, 1], split=None)  # data of the user's own: nobody knows which split it is
    assert len(TestSplit(unknown)) == len(TrainSplit(unknown)) == 2


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([0, 0], "must be distinct"),
        ([-1, 0], r"positions in 0\.\.3; got -1\.\.0"),
        ([0, 4], r"got 0\.\.4"),
        ([[0], [1]], "must be integer positions"),
        ([0.0, 1.0], "must be integer positions"),
        ([True, False, True, False], "must be integer positions"),
    ],
)
def test_indices_are_distinct_positions(indices: list[int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        TrainSplit(images_of([0, 1, 2, 3]), torch.tensor(indices))


def test_labels_follow_the_indices_and_first_keeps_the_order() -> None:
    split = TrainSplit(images_of([4, 3, 2, 1, 0]), torch.tensor([3, 0, 4]))
    assert split.labels.tolist() == [1, 4, 0]
    assert split.first(2).indices.tolist() == [3, 0]
    assert isinstance(split.first(2), TrainSplit)
    assert len(split.first(100)) == 3
    assert len(TrainSplit(images_of([0, 1]), torch.tensor([]))) == 0
    with pytest.raises(UserError, match="at least 1"):
        split.first(0)


def test_instances_at_even_distances_reach_every_class_of_a_sorted_data_set() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    images = from_dataset([(torch.full((1, 4, 4), i / 100), label) for i, label in enumerate(labels)])
    split = TestSplit(images)
    some = split.spread(10)
    assert some.indices.tolist() == list(range(0, 100, 10))
    assert torch.bincount(some.labels).tolist() == [5, 3, 2]
    assert split.spread(1000).indices.tolist() == list(range(100))
    with pytest.raises(UserError, match="must be at least 1"):
        split.spread(0)
