"""Where the robustness went: what an attack does to every image, and accuracy by how a method weighs images.

A method that reweights instances moves robustness from some of them to others. `Mechanism` measures each image before
and after an attack; `quintiles` sorts the images by difficulty, as the training's own criterion orders them, and counts
what is left of each fifth; `histograms` show the margins. All of it follows from the columns ``mechanism_*`` that a
record keeps for every image.

Source: Hitaj et al. 2021 and SOVR (down-weighted instances end with margins in one peak near zero); Wang et al. 2019
(stationarity).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.arrays import Arrays
from instar.attacks import PGD, Attack
from instar.errors import UserError
from instar.evaluate.intervals import wilson
from instar.evidence import Adversary, Batch
from instar.expression import parse, value
from instar.method import Method
from instar.modes import forward_mode
from instar.signals import Signal
from instar.signals.losses import lead
from instar.threat import Ball

PREFIX = "mechanism_"
FIFTHS = 5
BINS = 40
QUANTITIES = {
    "logit_margin": "z_y − max z_j",
    "probability_margin": "p_y − max p_j",
    "logit_norm": "‖z‖₂",
    "gradient_norm": "‖∇ₓCE‖₂",
    "stationarity": "ε‖∇ₓCE‖* − ⟨x′ − x, ∇ₓCE⟩",
}
"""What is measured on the clean image and on the attacked one, and its formula."""


@dataclass(frozen=True)
class Criterion:
    """An order of difficulty.

    Attributes:
        name: Its name in records.
        column: The column that it reads.
        sign: 1 where large values are difficult, −1 where small ones are.
        text: What it is, in words.
    """

    name: str
    column: str
    sign: int
    text: str


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("initial_margin", f"{PREFIX}probability_margin_clean", -1, "probability margin of the clean image"),
        Criterion("attacked_margin", f"{PREFIX}probability_margin_adv", -1, "probability margin of the attacked image"),
        Criterion("kappa", f"{PREFIX}kappa", -1, "iterates of the attack that are classified correctly (κ)"),
        Criterion("vulnerability", f"{PREFIX}loss_gap", 1, "loss that the attack adds"),
    )
}
"""The criteria by which published methods tell instances apart, measured on the images of an evaluation."""
_OF_SIGNAL = {
    "GeometryWeight": "kappa",
    "SurvivedSteps": "kappa",
    "Patience": "kappa",
    "LossGap": "vulnerability",
    "ProbabilityMarginWeight": "attacked_margin",
    "ProbabilityGap": "attacked_margin",
    "SelfPacedCrossEntropy": "initial_margin",
    "SelfPacedKL": "initial_margin",
    "BoostedCrossEntropy": "initial_margin",
    "Doubt": "initial_margin",
}
"""Which criterion a signal of a loss or of a stop rule goes by."""


@value
class Mechanism(Attack):
    """What an attack that does not stop does to every image, wrong ones included.

    Attributes:
        attack: The attack; PGD on cross-entropy with the budget of training is what κ and vulnerability are about.

    Example:
        >>> from instar.threat import Linf
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> made, batch = Mechanism(PGD(Linf(0.1))), Batch(torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))
        >>> sorted(made.measure(net, batch, made(net, batch)))[:3]
        ['gradient_norm_adv', 'gradient_norm_clean', 'kappa']
    """

    attack: PGD

    @property
    def ball(self) -> Ball:
        """The attack's."""
        return self.attack.ball

    @property
    def limit(self) -> Ball:
        """The attack's."""
        return self.attack.limit

    def budget(self, classes: int) -> dict[str, Any]:
        """Those of the attack, and of both ends with their gradients."""
        steps = self.attack.steps
        return {"forwards": 2 * steps + 4} if isinstance(steps, int) else {}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """The attack itself."""
        return self.attack(model, batch, generator=generator)

    def measure(self, model: nn.Module, batch: Batch, found: Adversary) -> dict[str, Tensor]:
        """Each of `QUANTITIES` on the clean and on the attacked image, κ, and the loss that the attack adds.

        Args:
            model: The model.
            batch: The images.
            found: What the attack made of them.

        Returns:
            Columns (B,), float32, by ``<quantity>_clean``, ``<quantity>_adv``, ``kappa`` and ``loss_gap``.
        """
        columns: dict[str, Tensor] = {}
        losses = {}
        with forward_mode(model, "eval"):
            for word, images in (("clean", batch.x), ("adv", found.x)):
                logits, losses[word], gradient = _looked(model, images, batch.y)
                moved = ((images - batch.x) * gradient).flatten(1).sum(1)
                columns |= {
                    f"logit_margin_{word}": -lead(logits, batch.y),
                    f"probability_margin_{word}": -lead(F.softmax(logits, 1), batch.y),
                    f"logit_norm_{word}": torch.linalg.vector_norm(logits, dim=1),
                    f"gradient_norm_{word}": torch.linalg.vector_norm(gradient.flatten(1), dim=1),
                    f"stationarity_{word}": (self.ball.support(gradient) - moved).clamp_min(0),
                }
        columns |= {"kappa": found.kappa, "loss_gap": losses["adv"] - losses["clean"]}
        return {name: column.float() for name, column in columns.items()}


def _looked(model: nn.Module, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), cross-entropy (B,) and its gradient (B, C, H, W); a model that cuts the graph has gradient 0."""
    at = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(at).float()
        loss = F.cross_entropy(logits, y, reduction="none")
        gradient = torch.autograd.grad(loss.sum(), at, allow_unused=True)[0] if loss.requires_grad else None
    return logits.detach(), loss.detach(), torch.zeros_like(images) if gradient is None else gradient


def criterion_of(method: Any) -> tuple[str, str]:
    """By which criterion a training told instances apart.

    Args:
        method: The method as a run or card stores it, as text; None where nothing is known.

    Returns:
        A name of `CRITERIA`, and why.

    Example:
        >>> criterion_of("Method(PGD(), GeometryWeight(-1.0) * CrossEntropy())")
        ('kappa', 'GeometryWeight goes by it')
        >>> criterion_of(None)
        ('initial_margin', 'how the model was trained is not known')
    """
    if not isinstance(method, str):
        return "initial_margin", "how the model was trained is not known"
    try:
        found = parse(method)
    except UserError:
        return "initial_margin", "the method holds values that are not known here"
    if not isinstance(found, Method):
        return "initial_margin", "how the model was trained is not known"
    stop = getattr(found.attack, "stop", None)
    for signal in (found.loss, *([] if stop is None else [stop])):
        for part in _within(signal):
            name = _OF_SIGNAL.get(type(part).__name__)
            if name is not None:
                return name, f"{type(part).__name__} goes by it"
    return "initial_margin", "the method treats all instances alike"


def _within(signal: Signal) -> Iterator[Signal]:
    yield signal
    for part in signal.parts:
        yield from _within(part)


@dataclass(frozen=True)
class Fifth:
    """A fifth of the images, in the order of a criterion.

    Attributes:
        low: The criterion at its easiest image.
        high: The criterion at its hardest image.
        count: Its images.
        clean: How many of them are classified correctly.
        robust: How many of them withstand every attack of the suite.
    """

    low: float
    high: float
    count: int
    clean: int
    robust: int

    def to_json(self) -> dict[str, Any]:
        """The counts with the shares and the interval that follow from them."""
        low, high = wilson(self.robust, self.count)
        return {
            "from": self.low,
            "to": self.high,
            "count": self.count,
            "clean": self.clean / self.count,
            "robust": self.robust / self.count,
            "robust_low": low,
            "robust_high": high,
        }


def quintiles(instances: Arrays, criterion: str) -> tuple[Fifth, ...]:
    """What is left of each fifth of the images, from the easiest to the hardest.

    A reweighting method gives the first the least weight and the last the most. Images of equal difficulty (κ has few
    values) stay in the order of the evaluation.

    Args:
        instances: The rows of a record with the columns of `Mechanism`.
        criterion: A name of `CRITERIA`.

    Returns:
        Five parts whose sizes differ by one at most; fewer for fewer images.

    Example:
        >>> rows = {CRITERIA["kappa"].column: np.arange(10), "clean": np.ones(10), "worst_case": np.arange(10) > 5}
        >>> [(fifth.low, fifth.robust) for fifth in quintiles(rows, "kappa")]
        [(9.0, 2), (7.0, 2), (5.0, 0), (3.0, 0), (1.0, 0)]
    """
    chosen = CRITERIA[criterion]
    values = np.asarray(instances[chosen.column], dtype=np.float64)
    order = np.argsort(chosen.sign * values, kind="stable")
    parts = [part for part in np.array_split(order, FIFTHS) if len(part)]
    return tuple(
        Fifth(
            low=float(values[part[0]]),
            high=float(values[part[-1]]),
            count=len(part),
            clean=int(np.asarray(instances["clean"])[part].sum()),
            robust=int(np.asarray(instances["worst_case"])[part].sum()),
        )
        for part in parts
    )


def histograms(instances: Arrays, *, bins: int = BINS) -> dict[str, dict[str, list[float] | list[int]]]:
    """Distributions of `QUANTITIES` over the images, clean and attacked in the same bins.

    Args:
        instances: The rows of a record with the columns of `Mechanism`.
        bins: Number of bins.

    Returns:
        By quantity: ``edges`` (bins + 1), and counts (bins) ``clean`` and ``adversarial``. Values that are not finite
        are left out.

    Example:
        >>> ends = {f"mechanism_{name}_{word}": np.zeros(3) for name in QUANTITIES for word in ("clean", "adv")}
        >>> histograms(ends, bins=2)["logit_margin"]["clean"]
        [0, 3]
    """
    found: dict[str, dict[str, list[float] | list[int]]] = {}
    for name in QUANTITIES:
        clean, attacked = (np.asarray(instances[f"{PREFIX}{name}_{word}"], np.float64) for word in ("clean", "adv"))
        clean, attacked = clean[np.isfinite(clean)], attacked[np.isfinite(attacked)]
        both = np.concatenate([clean, attacked])
        edges = np.histogram_bin_edges(both, bins=bins) if len(both) else np.linspace(0.0, 1.0, bins + 1)
        found[name] = {
            "edges": edges.tolist(),
            "clean": np.histogram(clean, edges)[0].tolist(),
            "adversarial": np.histogram(attacked, edges)[0].tolist(),
        }
    return found


def measured(instances: Arrays) -> bool:
    """Whether the rows of a record hold what `Mechanism` measures."""
    return f"{PREFIX}kappa" in instances


def summary(instances: Arrays, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """All of it in values that JSON can hold, as records show it to readers without this package.

    Args:
        instances: The rows of a record with the columns of `Mechanism`.
        protocol: The record's protocol.

    Returns:
        ``criterion`` and ``why`` (that of the training), ``order``, ``quintiles`` by each criterion, ``histograms``.
    """
    name, why = criterion_of((protocol.get("training") or {}).get("method"))
    return {
        "criterion": name,
        "why": why,
        "order": "from the easiest fifth (least weight) to the hardest (most weight)",
        "quintiles": {
            key: {"by": known.text, "fifths": [fifth.to_json() for fifth in quintiles(instances, key)]}
            for key, known in CRITERIA.items()
        },
        "histograms": histograms(instances),
    }
