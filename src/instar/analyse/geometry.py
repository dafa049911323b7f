"""How far instances lie from the decision boundary, in attack steps, and how flat the loss is there: GAIRAT's view.

κ of an instance is the number of iterates of PGD, out of K, that are still classified correctly. Here it is measured at
a checkpoint with the model in eval mode and images as they are; what training itself saw through its epochs is in
`instar.analyse.reweighting`.

Source: Zhang et al. 2021 (GAIRAT), Figures 3 and 4. Their measure of flatness is in an appendix that we could not read:
slopes and curves of the loss around friendly and most adversarial points are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.analyse.analysis import Analysis, Found, Table, register
from instar.analyse.compared import extremes, images_of, members_of, protocol_of, stacked
from instar.analyse.draw_geometry import draw, draw_compared
from instar.analyse.perform import renamed
from instar.analyse.sources import in_words
from instar.analyse.spread import spearman
from instar.analyse.target import Portion, Target
from instar.attacks import PGD, Uniform
from instar.errors import UserError
from instar.evaluate.subject import Subject
from instar.evidence import Batch
from instar.expression import parse
from instar.method import Method
from instar.modes import captured_features
from instar.report.stored import UnavailableError
from instar.report.wording import percent
from instar.schedules import Progress
from instar.signals import CrossEntropy, Patience
from instar.threat import Ball

NAME, TITLE = "geometry", "Geometry of the instances"
CENTRES = ("friendly", "adversarial")
"""Points that flatness is looked at: the first misclassified iterate (the last one, if none is), and the last one."""
DIRECTIONS = ("random", "uphill")


def measure(
    target: Target,
    *,
    steps: int | None = None,
    step_size: float | None = None,
    points: int = 8,
    classes: tuple[int, int] | None = None,
) -> Found:
    """κ of every image, a projection of what the network makes of them, and the loss around attacked points.

    Args:
        target: The model and its images.
        steps: K; None takes what the model was trained with, or 10.
        step_size: Of the attack; None takes what the model was trained with, or eps / 4.
        points: Points of a curve of the loss on either side of its centre.
        classes: Two classes for a projection of their own; None takes the pair that the network tells apart worst
            under attack.

    Returns:
        Tables ``instances`` (``index``, ``label``, ``kappa``, ``correct``, losses, ``prediction`` and
        ``attacked_prediction``, slopes ``‖∇ CE‖₂`` at three points, and places ``x``, ``y`` (all classes, features),
        ``pair_x``, ``pair_y`` (two classes, logits; NaN for others)), ``kappa`` (``kappa``, ``count``), ``flatness``
        (``centre``, ``direction``, ``distance`` in units of eps, ``mean``, ``low``, ``high`` of the change of the loss:
        quartiles over instances) and ``loading`` (explained shares of variance).

    Raises:
        UserError: A setting is out of range, or the model does not fit the images.

    Example:
        >>> from instar.analyse.target import open_targets
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> (target,) = open_targets(net, data=(torch.rand(20, 1, 2, 2), torch.arange(20) % 2), eps=0.1)
        >>> found = measure(target)
        >>> int(found.tables["kappa"]["count"].sum()), sorted(found.tables)
        (20, ['flatness', 'instances', 'kappa', 'loading'])
    """
    if points < 1:
        raise UserError(f"points must be at least 1; got {points}")
    known = budget_of(target)
    attack = attack_on(target.ball, steps=known[0] if steps is None else steps, step_size=step_size or known[1])
    reach = np.linspace(-1.0, 1.0, 2 * points + 1)
    with target.examined() as subject:
        count = subject.classes
        if classes is not None and (len(set(classes)) != 2 or not all(0 <= k < count for k in classes)):
            raise UserError(f"classes must be two different ones of 0..{count - 1}; got {classes}")

        def compute(portion: Portion) -> dict[str, Tensor]:
            return look(subject, portion, attack=attack, reach=reach)

        rows, seconds = target.piecewise(NAME, subject, {"attack": repr(attack), "points": points}, compute)
    logits, features = rows.pop("logits"), rows.pop("features")
    curves = {(c, d): rows.pop(f"{c}_{d}") for c in CENTRES for d in DIRECTIONS}
    pair = worst_pair(rows["label"], rows["attacked_prediction"]) if classes is None else classes
    places, shares = principal(features)
    rows |= {"x": places[:, 0], "y": places[:, 1]}
    chosen = np.isin(rows["label"], pair)
    rows |= {name: np.full(len(chosen), np.nan, np.float32) for name in ("pair_x", "pair_y")}
    pair_shares = np.full(2, np.nan)
    if chosen.sum() >= 3:
        inside, pair_shares = principal(logits[chosen])
        rows["pair_x"][chosen], rows["pair_y"][chosen] = inside[:, 0], inside[:, 1]
    most = attack.numbers()[0]
    tables: dict[str, Table] = {
        "instances": rows,
        "kappa": {"kappa": np.arange(most + 1), "count": np.bincount(rows["kappa"], minlength=most + 1)},
        "flatness": _flatness(curves, reach),
        "loading": {"features": shares, "pair": pair_shares},
    }
    figures = _figures(rows, curves, reach, most)
    kind = "training" if target.which == "train" else "test"
    names = [target.split.classes[k] for k in pair]
    summary = (
        f"Of {len(chosen):,} {kind} images {percent(figures['guarded'])} withstand all {most} steps and "
        f"{percent(figures['attackable'])} none (median κ {figures['median_kappa']:.0f}). Along the gradient's sign, "
        f"half of eps away, the loss of a typical image has changed by {figures['rise_friendly']:.2f} nats at its "
        f"friendly point and by {figures['rise_adversarial']:.2f} at its most adversarial one."
    )
    protocol = target.protocol(
        attack=in_words(attack), steps=most, points=points,
        pair=[int(k) for k in pair], pair_names=names, pair_is_worst=classes is None,
        seconds=round(seconds, 2),
    )  # fmt: skip
    return Found(NAME, TITLE, summary, figures, tables, protocol)


def attack_on(ball: Ball, *, steps: int = 10, step_size: float | None = None) -> PGD:
    """The attack that counts κ: PGD on cross-entropy from a random start, as GAIRAT's code has it.

    Args:
        ball: Radius and norm.
        steps: K, at least 1.
        step_size: None is eps / 4.

    Raises:
        UserError: Fewer than 1 step.
    """
    if steps < 1:
        raise UserError(f"κ counts the steps of an attack: steps must be at least 1; got {steps}")
    return PGD(
        ball,
        CrossEntropy(),
        steps=steps,
        step_size=ball.radius / 4 if step_size is None else step_size,
        start=Uniform(),
    )


def budget_of(target: Target) -> tuple[int, float | None]:
    """Steps and step size that a model was trained with; 10 and None where that is unknown, or was for another ball."""
    try:
        method = parse(str(target.model_case.training.get("method")))
        if not isinstance(method, Method):
            return 10, None
        attack = method.at(Progress(epoch=1, epochs=1)).attack
        if isinstance(attack, PGD) and attack.ball == target.ball and attack.numbers()[0] > 1:
            return attack.numbers()
    except UserError:  # a method of the user's own, or with numbers that are not known here
        pass
    return 10, None


@torch.no_grad()
def look(subject: Subject, portion: Portion, *, attack: PGD, reach: np.ndarray) -> dict[str, Tensor]:
    """κ, outputs, and the loss around two points, of a batch.

    Args:
        subject: The model.
        portion: The images.
        attack: Which counts κ and finds the points.
        reach: Distances (T,) from the points, in units of eps.

    Returns:
        Columns (B,) as in `measure`; ``logits`` (B, K), ``features`` (B, D) (the logits where the model has no
        `head`), and for each centre and direction the loss (B, T) minus that at the centre.
    """
    x, y, ball = portion.x, portion.y, attack.ball
    state = portion.generator.get_state()
    worst = attack(subject.stand_in, Batch(x, y), generator=portion.generator)
    portion.generator.set_state(state)  # the friendly point lies on the same trajectory
    friend = replace(attack, stop=Patience(0))(subject.stand_in, Batch(x, y), generator=portion.generator)
    has_head = isinstance(getattr(subject.model, "head", None), nn.Module)
    with captured_features(subject.model, wanted=has_head) as captured:
        clean = subject.model(x).float()
    moved = subject.model(worst.x).float()
    if not bool(torch.isfinite(clean).all() and torch.isfinite(moved).all()):
        raise UserError("the model returns NaN or infinity: its weights or its gradients are broken")
    found = {
        "kappa": worst.kappa.to(torch.int16),
        "correct": (clean.argmax(1) == y).to(torch.uint8),
        "prediction": clean.argmax(1),
        "attacked_prediction": moved.argmax(1),
        "loss": F.cross_entropy(clean, y, reduction="none"),
        "adversarial_loss": F.cross_entropy(moved, y, reduction="none"),
        "slope": _gradient(subject.stand_in, x, y).flatten(1).norm(dim=1),
        "logits": clean,
        "features": captured[-1].flatten(1) if captured else clean,
    }
    signs = torch.randint(0, 2, x.shape, generator=portion.generator, device=x.device).to(x.dtype) * 2 - 1
    for name, at in zip(CENTRES, (friend.x, worst.x), strict=True):
        gradient = _gradient(subject.stand_in, at, y)
        found[f"slope_{name}"] = gradient.flatten(1).norm(dim=1)
        for way, direction in (("random", signs), ("uphill", gradient)):
            along = ball.steepest(direction, at)
            found[f"{name}_{way}"] = profile(subject.stand_in, at, y, along=along, distances=reach * ball.radius)
    return found


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return gradient


@torch.no_grad()
def profile(model: nn.Module, x: Tensor, y: Tensor, *, along: Tensor, distances: np.ndarray) -> Tensor:
    """How the cross-entropy of each instance changes along a line, CE(x + t d) − CE(x).

    Args:
        model: Images (B, C, H, W) → logits (B, K).
        x: Centres (B, C, H, W).
        y: Labels (B,).
        along: Directions d (B, C, H, W).
        distances: t (T,), in the unit of the inputs where d has length 1. The box [0, 1] is not respected: it would
            bend the line.

    Returns:
        (B, T).
    """
    here = F.cross_entropy(model(x), y, reduction="none")
    there = [F.cross_entropy(model(x + float(t) * along), y, reduction="none") - here for t in distances]
    return torch.stack(there, dim=1)


def principal(values: np.ndarray, *, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the directions of largest variance (PCA).

    Args:
        values: (n, D), n at least 1.
        count: How many directions.

    Returns:
        Coordinates (n, count), float32, of mean 0, with zeros where D or n has no further direction; and the share of
        the variance (count,) that each carries. The sign of a direction is such that its largest entry is positive.

    Example:
        >>> places, shares = principal(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
        >>> places[:, 0].tolist(), shares.round(6).tolist()
        ([-5.0, 0.0, 5.0], [1.0, 0.0])
    """
    centred = values.astype(np.float64) - values.astype(np.float64).mean(0)
    # Through the covariance: (D, D) is small, n may be large.
    variances, directions = np.linalg.eigh(centred.T @ centred)
    variances, directions = np.maximum(variances[::-1], 0.0), directions[:, ::-1]
    kept = directions[:, :count]
    kept = kept * np.where(kept[np.abs(kept).argmax(0), np.arange(kept.shape[1])] < 0, -1.0, 1.0)
    missing = count - kept.shape[1]
    total = variances.sum()
    shares = np.pad(variances[:count], (0, missing)) / total if total > 0 else np.zeros(count)
    return np.pad(centred @ kept, ((0, 0), (0, missing))).astype(np.float32), shares


def worst_pair(labels: np.ndarray, attacked: np.ndarray) -> tuple[int, int]:
    """The two classes that an attack turns into each other most often; classes 0 and 1 if it turns none.

    Args:
        labels: True classes (n,).
        attacked: Predictions under attack (n,).

    Example:
        >>> worst_pair(np.array([0, 3, 3, 2]), np.array([0, 2, 2, 3]))
        (2, 3)
    """
    count = int(max(labels.max(), attacked.max(), 1)) + 1
    turned = np.zeros((count, count), dtype=np.int64)
    np.add.at(turned, (labels, attacked), 1)
    np.fill_diagonal(turned, 0)
    both = np.triu(turned + turned.T)
    if not both.any():
        return 0, 1
    a, b = np.unravel_index(int(both.argmax()), both.shape)
    return int(a), int(b)


def _flatness(curves: dict[tuple[str, str], np.ndarray], reach: np.ndarray) -> Table:
    parts = []
    for (centre, direction), values in curves.items():
        change = values.astype(np.float64)
        parts.append(
            {
                "centre": np.full(len(reach), centre),
                "direction": np.full(len(reach), direction),
                "distance": reach,
                "mean": change.mean(0),
                "low": np.quantile(change, 0.25, axis=0),
                "high": np.quantile(change, 0.75, axis=0),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _figures(rows: Table, curves: dict[tuple[str, str], np.ndarray], reach: np.ndarray, most: int) -> dict[str, float]:
    kappa = rows["kappa"]
    figures = {
        "steps": float(most),
        "mean_kappa": float(kappa.mean()),
        "median_kappa": float(np.median(kappa)),
        "guarded": float((kappa == most).mean()),
        "attackable": float((kappa == 0).mean()),
        "clean_accuracy": float(rows["correct"].mean()),
        "slope": float(rows["slope"].mean()),
        "kappa_loss": spearman(kappa, rows["loss"]),
    }
    for centre in CENTRES:
        figures[f"slope_{centre}"] = float(rows[f"slope_{centre}"].mean())
        half = [np.interp(0.5, reach, line) for line in curves[centre, "uphill"]]
        figures[f"rise_{centre}"] = float(np.median(half))
    return figures


def compare(founds: Sequence[Found]) -> Found:
    """κ and flatness of several checkpoints or runs side by side.

    Args:
        founds: Results of `measure`, at least two.

    Returns:
        Tables ``members`` (a row for each result), ``kappa`` and ``flatness`` (as of `measure`, with a column
        ``member``; κ as ``survived`` = κ / K with its ``share``).

    Raises:
        UnavailableError: Fewer than two results.
    """
    if len(founds) < 2:
        raise UnavailableError("there is nothing to compare: geometry was measured for one checkpoint only")
    named = renamed(founds)
    members = members_of(named)
    kappa = [one.tables["kappa"] for one in named]
    tables: dict[str, Table] = {
        "members": members,
        "kappa": {
            "member": np.concatenate([np.full(len(part["kappa"]), k) for k, part in enumerate(kappa)]),
            "survived": np.concatenate([part["kappa"] / part["kappa"].max() for part in kappa]),
            "share": np.concatenate([part["count"] / part["count"].sum() for part in kappa]),
        },
        "flatness": stacked([one.tables["flatness"] for one in named]),
    }
    low, high = extremes(members["guarded"])
    summary = (
        f"{members['label'][high]} guards most images ({percent(members['guarded'][high])} withstand every step), "
        f"{members['label'][low]} fewest ({percent(members['guarded'][low])})."
    )
    protocol = protocol_of(named, n=images_of(named))
    figures = {"guarded_difference": float(members["guarded"][high] - members["guarded"][low])}
    return Found(NAME, TITLE, summary, figures, tables, protocol)


ANALYSIS = register(
    Analysis(
        name=NAME,
        title=TITLE,
        measure=measure,
        draw=draw,
        needs="model",
        cost="about 0.1 s an image for a ResNet-18 of width 16 on one core: PGD twice, then 72 forward passes",
        splits=("test",),
        compare=compare,
        draw_compared=draw_compared,
    )
)
