"""What flows through a step: batches that are checked, evidence that is complete or says what it lacks."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import instar as I

X, Y = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 2, 1])


def test_a_batch_of_plain_tensors_has_no_identity_and_no_memory() -> None:
    batch = I.Batch(X, Y)
    assert len(batch) == 4
    assert (batch.index, batch.target, batch.labelled, batch.source) == (None, None, None, None)
    assert batch.memory == {}
    with pytest.raises(FrozenInstanceError):
        batch.x = X


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[0], Y, "x must be floating-point images (B, C, H, W) in [0, 1]; got (3, 5, 5) of torch.float32"),
        (X.flatten(1), Y, "x must be floating-point images (B, C, H, W)"),
        ((255 * X).to(torch.uint8), Y, "got (4, 3, 5, 5) of torch.uint8"),
        (X, Y[:3], "y must be integer labels (4,), one for each image; got (3,) of torch.int64"),
        (X, Y.view(4, 1), "y must be integer labels (4,)"),
        (X, Y.float(), "of torch.float32. Soft labels go into target"),
        (X, Y > 0, "of torch.bool"),
        (X, torch.eye(4), "got (4, 4) of torch.float32. Soft labels go into target"),
    ],
)
def test_a_batch_of_the_wrong_shape_or_type_is_one_clear_line(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(I.UserError) as caught:
        I.Batch(x, y)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_integer_type_that_a_batch_takes_can_be_trained_with(kind: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3))
    expected = I.training_loss(model, I.mart(steps=2, eps=0.0), I.Batch(X, Y)).loss
    try:
        batch = I.Batch(X, Y.to(kind))
    except I.UserError:
        return  # refused at once is as good
    loss = I.training_loss(model, I.mart(steps=2, eps=0.0), batch).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("of", ["clean", "adv", "anchor"])
def test_logits_that_nobody_declared_are_an_error_that_says_what_to_declare(of: str) -> None:
    with pytest.raises(I.UserError, match=f"carries no '{of}' logits: a Signal that reads them must list '{of}'"):
        I.Evidence(x=X, y=Y).logits(of)
    z = torch.zeros(4, 3)
    assert I.Evidence(x=X, y=Y, **{of: z}).logits(of) is z


def test_only_the_logits_that_signals_declare_are_computed() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3))
    table = {
        I.CrossEntropy(): {"adv"},
        I.CrossEntropy("clean"): {"clean"},
        I.CrossEntropy("clean") + 6 * I.KL(): {"clean", "adv"},
        I.GeometryWeight(-1.0) * I.CrossEntropy(): {"adv"},
        I.CrossEntropy() + I.RankWeight(I.LossGap()) * I.LogitShift(): {"adv", "anchor"},
        I.CrossEntropy("anchor"): {"anchor"},
    }
    for loss, names in table.items():
        evidence = I.training_loss(model, I.Method(I.PGD(steps=2), loss), I.Batch(X, Y)).evidence
        assert {n for n in ("clean", "adv", "anchor") if getattr(evidence, n) is not None} == names


def test_a_signal_that_queries_the_model_needs_evidence_that_has_one() -> None:
    with pytest.raises(I.UserError, match="no model to query"):
        I.Evidence(x=X, y=Y).forward(X)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3))
    evidence = I.training_loss(model, I.pgd_at(steps=1), I.Batch(X, Y)).evidence
    torch.testing.assert_close(evidence.forward(X), model(X))


def test_evidence_carries_what_the_batch_knows_of_its_instances() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3))
    batch = I.Batch(
        X, Y, index=torch.tensor([7, 1, 5, 2]), memory={"gap": torch.rand(4)}, target=torch.eye(3)[Y],
        labelled=torch.ones(4).bool(), source=torch.zeros(4).int(),
    )  # fmt: skip
    evidence = I.training_loss(model, I.pgd_at(steps=2), batch).evidence
    for name in ("x", "y", "index", "target", "labelled", "source"):
        assert getattr(evidence, name) is getattr(batch, name)
    assert evidence.memory["gap"] is batch.memory["gap"]
    assert evidence.budget == 2
    assert evidence.kappa.shape == evidence.inspected.shape == (4,)


def test_an_adversary_of_another_shape_than_its_batch_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3))
    none = torch.zeros(4).int()
    with pytest.raises(I.UserError, match=r"must have the shape of its batch \(4, 3, 5, 5\); got \(3, 3, 5, 5\)"):
        I.training_loss(model, I.pgd_at(), I.Batch(X, Y), adversary=I.Adversary(X[:3], none, none, none, 10))


def test_soft_labels_take_the_place_of_labels_in_attack_and_loss() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 3)).double()
    hard, x = I.Batch(X.double(), Y), X.double()
    soft = replace(hard, y=torch.full((4,), -1), target=torch.eye(3).double()[Y])
    method = replace(I.pgd_at(steps=3), attack=I.PGD(steps=3, start=I.Zero()))
    ours, theirs = I.training_loss(model, method, soft), I.training_loss(model, method, hard)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.adversary.x, theirs.adversary.x)
    assert not torch.equal(ours.adversary.x, x)
