"""Adversarial examples that are made for a report: which images give way, to what, and by how little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import instar.runs
from instar.attacks import PGD
from instar.data import Images
from instar.data.indexed import as_float
from instar.devices import choose_device
from instar.errors import UserError
from instar.evaluate.subject import examined
from instar.evaluate.suites import pgd
from instar.evaluate.targets import radius
from instar.evidence import Batch
from instar.randomness import generator
from instar.report.stored import StoredRun, UnavailableError
from instar.threat import Ball, ball

STEPS = 20
_BATCH = 100


@dataclass(frozen=True, eq=False)
class Examples:
    """Images, what an attack makes of them, and what the model says of both.

    Attributes:
        position: Official positions (n,).
        label: Labels (n,).
        x: Clean images (n, C, H, W) in [0, 1].
        x_adv: Adversarial images, of the same shape.
        clean: Class and probability (n,), (n,) that the model gives the clean images.
        adv: The same for the adversarial images.
        vulnerability: Cross-entropy of the adversarial minus that of the clean image (n,), in nats.
        ball: The ball that the attack may move in.
        protocol: What was done, in words.
    """

    position: np.ndarray
    label: np.ndarray
    x: Tensor
    x_adv: Tensor
    clean: tuple[np.ndarray, np.ndarray]
    adv: tuple[np.ndarray, np.ndarray]
    vulnerability: np.ndarray
    ball: Ball
    protocol: str

    @property
    def order(self) -> np.ndarray:
        """Rows (n,) from the most to the least vulnerable; at ties in order."""
        return np.argsort(-self.vulnerability, kind="stable")

    def confusion(self, classes: int) -> np.ndarray:
        """How often images of a class (row) are taken for each class (column) under attack: counts (K, K)."""
        counts = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(counts, (self.label, self.adv[0]), 1)
        return counts


def attacked(
    run: StoredRun,
    images: Images,
    positions: np.ndarray,
    *,
    checkpoint: str,
    what: str,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> Examples:
    """Attack some images with PGD-20 on cross-entropy, in eval mode, without augmentation and without early stop.

    Vulnerability is ISEAT's: how much the attack can raise the loss, L(x', y) − L(x, y).

    Args:
        run: Whose model.
        images: Where the images come from.
        positions: Which ones (n,).
        checkpoint: ``"best"`` or ``"last"``.
        what: What the images are, for the protocol.
        tick: Called after every batch with the images done and all of them.

    Returns:
        The examples.

    Raises:
        UnavailableError: There are no weights, they need code that is not here, or they are not for these images.

    Source: Wang et al. 2023 (ISEAT), vulnerability of an instance.
    """
    try:
        model = instar.runs.load(run.folder, checkpoint=checkpoint)
        attack = replace(_attack(run, images), stop=None)
    except UserError as error:
        raise UnavailableError(str(error)) from None
    device = choose_device("auto")
    rows = torch.from_numpy(np.asarray(positions, dtype=np.int64))
    x, y = as_float(images.fetch(rows)), images.labels[rows]
    found: list[tuple[Tensor, ...]] = []
    try:
        with examined(model, x[:2].to(device), device=device) as subject, torch.no_grad():
            if subject.classes != len(images.classes):
                raise UserError(
                    f"the model of {run.folder} tells {subject.classes} classes apart, {images.info.title} has "
                    f"{len(images.classes)}: is it another data set?"
                )
            for part in torch.arange(len(rows)).split(_BATCH):
                batch = Batch(x[part].to(device), y[part].to(device))
                draws = generator(0, step=int(rows[part[0]]), purpose="report", device=device)
                x_adv = attack(subject.stand_in, batch, generator=draws).x
                before, after = subject.model(batch.x), subject.model(x_adv)
                gap = F.cross_entropy(after, batch.y, reduction="none") - F.cross_entropy(
                    before, batch.y, reduction="none"
                )
                found.append((x_adv.cpu(), *_said(before), *_said(after), gap.cpu()))
                tick(int(part[-1]) + 1, len(rows))
    except UserError as error:
        raise UnavailableError(str(error)) from None
    x_adv, clean, clean_sure, adv, adv_sure, gap = (torch.cat(column) for column in zip(*found, strict=True))
    protocol = (
        f"PGD-{STEPS} on cross-entropy, {attack.ball!r}, random start, seed 0, eval mode, float32, {checkpoint} "
        f"checkpoint, {what}; made for this page"
    )
    return Examples(
        position=rows.numpy(),
        label=y.numpy(),
        x=x,
        x_adv=x_adv,
        clean=(clean.numpy(), clean_sure.numpy()),
        adv=(adv.numpy(), adv_sure.numpy()),
        vulnerability=gap.double().numpy(),
        ball=attack.ball,
        protocol=protocol,
    )


def magnified(examples: Examples, row: int) -> tuple[Tensor, float]:
    """A perturbation (C, H, W) as a picture in [0, 1], grey where nothing changed, and by how much it is magnified.

    In Linf the radius becomes the whole range; in other norms the largest change of any pixel does.
    """
    delta = examples.x_adv[row] - examples.x[row]
    most = examples.ball.radius if examples.ball.norm == "Linf" else float(delta.abs().max())
    factor = 0.5 / most if most > 0 else 1.0
    return (0.5 + factor * delta).clamp(0, 1), factor


def _attack(run: StoredRun, images: Images) -> PGD:
    threat: dict[str, Any] = dict(run.config.get("threat") or {})
    around = ball(threat.get("norm", images.info.norm), radius(threat.get("eps", images.info.eps)))
    attack = pgd(around, steps=STEPS).attack
    assert isinstance(attack, PGD)
    return attack


def _said(logits: Tensor) -> tuple[Tensor, Tensor]:
    sure, which = logits.softmax(1).max(1)
    return which.cpu(), sure.cpu()
