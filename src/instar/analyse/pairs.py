"""Where an untargeted attack sends each class: hard class pairs, the diagnosis of SPAT.

An untargeted attack is free to go anywhere, but classes are similar to a very uneven degree, and the most similar one
becomes its target. Shown by the confusion under attack

    M[y, k] = share of the images of class y that are predicted as k under the attack,

and held against the similarity of the classes in the head's weights, cos(W_y, W_k), and in the features, the mean of
cos(h(x), W_k) over the clean images x of class y.

Source: Li et al. 2023 (SPAT), Fig. 1 and abstract; attack and rank correlation are our reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.analyse.analysis import Analysis, Found, Table, register
from instar.analyse.compared import attacks_of, images_of, members_of, protocol_of
from instar.analyse.draw_pairs import draw, draw_compared
from instar.analyse.perform import renamed
from instar.analyse.sources import in_words
from instar.analyse.spread import entropy, kendall, spearman
from instar.analyse.target import Portion, Target
from instar.attacks import PGD, Attack, Uniform
from instar.errors import UserError
from instar.evaluate.intervals import wilson
from instar.evidence import Batch
from instar.report.stored import UnavailableError
from instar.report.wording import percent
from instar.signals import CrossEntropy
from instar.threat import Ball

NAME, TITLE = "pairs", "Hard class pairs"
SIMILARITIES = ("weights", "features")


def untargeted(ball: Ball) -> PGD:
    """The attack that pairs are found by: PGD-20 on cross-entropy, step eps / 10, from a random point of the ball.

    Example:
        >>> from instar.threat import Linf
        >>> untargeted(Linf(8 / 255)).steps
        20
    """
    return PGD(ball, CrossEntropy(), steps=20, step_size=ball.radius / 10, start=Uniform())


def measure(target: Target, *, attack: Attack | None = None) -> Found:
    """What each class is taken for under attack, and whether similar classes are the ones it is taken for.

    Args:
        target: The model and its images.
        attack: Any attack; None is `untargeted`.

    Returns:
        Tables ``pairs`` (a row for each ordered pair: ``true``, ``predicted``, ``attacked`` and ``clean`` shares M,
        ``errors`` (of the wrong predictions under attack), similarity in ``weights`` and ``features``), ``classes`` (a
        row for each class: its accuracies, its ``top_wrong`` class and that one's share with Wilson's 95 % interval,
        the ``entropy`` of its row, and rank correlations of similarity with confusion) and ``instances`` (predictions,
        and the ``runner_up`` of the clean logits). Similarities are NaN for networks without a final linear layer.

    Raises:
        UserError: The model does not fit the images, or returns NaN or infinity.

    Example:
        >>> from instar.analyse.target import open_targets
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> (target,) = open_targets(net, data=(torch.rand(30, 1, 2, 2), torch.arange(30) % 3), eps=0.1)
        >>> found = measure(target)
        >>> shares = found.tables["pairs"]["attacked"].reshape(3, 3)
        >>> shares.sum(1).round(6).tolist()
        [1.0, 1.0, 1.0]
    """
    used = untargeted(target.ball) if attack is None else attack
    with target.examined() as subject:
        head = final_layer(subject.model, subject.classes)

        def compute(portion: Portion) -> dict[str, Tensor]:
            return _look(subject.stand_in, subject.model, head, used, portion)

        rows, seconds = target.piecewise(NAME, subject, {"attack": repr(used)}, compute)
        classes = subject.classes
        weights = None if head is None else _cosines(head.weight.detach()).cpu().numpy()
    named = list(target.split.classes) + [f"class {k}" for k in range(len(target.split.classes), classes)]
    cosines = rows.pop("cosines")
    features = _class_means(cosines, rows["label"], classes) if cosines.shape[1] else None
    pairs = confusion(rows["label"], rows["prediction"], rows["attacked_prediction"], classes)
    pairs |= {
        name: np.full(classes * classes, np.nan) if matrix is None else matrix.ravel().astype(np.float64)
        for name, matrix in zip(SIMILARITIES, (weights, features), strict=True)
    }
    by_class = summarise(pairs, rows["label"], rows["prediction"], rows["attacked_prediction"], named)
    wrong = rows["attacked_prediction"] != rows["label"]
    followed = rows["attacked_prediction"][wrong] == rows["runner_up"][wrong]
    figures = _figures(pairs, by_class, wrong, followed)
    tables: dict[str, Table] = {"pairs": pairs, "classes": by_class, "instances": rows}
    protocol = target.protocol(
        attack=in_words(used), expression=repr(used), class_names=named, seconds=round(seconds, 2)
    )
    return Found(NAME, TITLE, _told(figures, pairs, named), figures, tables, protocol)


def final_layer(model: nn.Module, classes: int) -> nn.Linear | None:
    """The last linear layer that gives logits: its rows are the directions of the classes; None if there is none.

    Example:
        >>> final_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3)
        Linear(in_features=4, out_features=3, bias=True)
    """
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    return layers[-1] if layers else None


@contextmanager
def _inputs_of(layer: nn.Linear | None) -> Iterator[list[Tensor]]:
    """What goes into a layer (B, D), a forward each; nothing if there is no layer."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def _look(
    attacked: nn.Module, model: nn.Module, head: nn.Linear | None, attack: Attack, portion: Portion
) -> dict[str, Tensor]:
    """Predictions before and after the attack, and the cosines of clean features with the directions of the classes."""
    adversary = attack(attacked, Batch(portion.x, portion.y), generator=portion.generator)
    with _inputs_of(head) as features:
        clean = model(portion.x).float()
    moved = model(adversary.x).float()
    if not bool(torch.isfinite(clean).all() and torch.isfinite(moved).all()):
        raise UserError("the model returns NaN or infinity: its weights or its gradients are broken")
    cosines = clean.new_zeros(len(clean), 0)
    if head is not None and len(features) == 1 and features[0].ndim == 2:
        cosines = F.normalize(features[0], dim=1) @ F.normalize(head.weight.float(), dim=1).T
    others = clean.scatter(1, portion.y[:, None], float("-inf"))
    return {
        "prediction": clean.argmax(1),
        "attacked_prediction": moved.argmax(1),
        "runner_up": others.argmax(1),
        "cosines": cosines,
    }


def _cosines(weight: Tensor) -> Tensor:
    directions = F.normalize(weight.float(), dim=1)
    return directions @ directions.T


def _class_means(cosines: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Mean row of the images of each class (K, K); NaN for a class without images."""
    found = np.full((classes, classes), np.nan)
    for k in range(classes):
        if (label == k).any():
            found[k] = cosines[label == k].mean(0)
    return found


def confusion(label: np.ndarray, prediction: np.ndarray, attacked: np.ndarray, classes: int) -> Table:
    """Shares of predictions by true class, as a row for each ordered pair of classes.

    Args:
        label: True classes (n,).
        prediction: Predictions for the clean images (n,).
        attacked: Predictions under attack (n,).
        classes: K.

    Returns:
        Columns (K²,), the true class changing slowest: ``true``, ``predicted``, ``attacked``, ``clean``, and
        ``errors``: M without its diagonal, each row divided by its sum. NaN where a class has no image, or no error.

    Example:
        >>> found = confusion(np.array([0, 0, 1]), np.array([0, 0, 1]), np.array([1, 0, 1]), 2)
        >>> found["attacked"].tolist(), found["errors"].tolist()
        ([0.5, 0.5, 0.0, 1.0], [0.0, 1.0, nan, nan])
    """
    columns: Table = {
        "true": np.repeat(np.arange(classes), classes),
        "predicted": np.tile(np.arange(classes), classes),
    }
    for name, said in (("attacked", attacked), ("clean", prediction)):
        counts = np.bincount(label * classes + said, minlength=classes * classes).reshape(classes, classes)
        columns[name] = _shares(counts).ravel()
        if name == "attacked":
            np.fill_diagonal(counts, 0)
            columns["errors"] = _shares(counts).ravel()
    return columns


def _shares(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(1, keepdims=True).astype(np.float64)
    totals[totals == 0] = np.nan
    return counts / totals


def summarise(
    pairs: Table, label: np.ndarray, prediction: np.ndarray, attacked: np.ndarray, named: Sequence[str]
) -> Table:
    """A row for each class: what it is taken for under attack, how concentrated that is, and whether similarity tells.

    Args:
        pairs: As `confusion` gives them, with the similarities ``weights`` and ``features``.
        label: True classes (n,).
        prediction: Predictions for the clean images (n,).
        attacked: Predictions under attack (n,).
        named: Names of the K classes.

    Returns:
        Columns (K,).
    """
    classes = len(named)
    attacked_shares, errors = (pairs[name].reshape(classes, classes) for name in ("attacked", "errors"))
    rows: list[dict[str, Any]] = []
    for k in range(classes):
        of_class = label == k
        count = int(of_class.sum())
        others = np.arange(classes) != k
        wrong = np.where(others, attacked_shares[k], -1.0)
        known = count > 0
        top = int(np.nanargmax(wrong)) if known else -1
        hits = int((attacked[of_class] == top).sum()) if known else 0
        low, high = wilson(hits, count) if known else (np.nan, np.nan)
        row: dict[str, Any] = {
            "name": named[k],
            "n": count,
            "clean_accuracy": float((prediction[of_class] == k).mean()) if known else np.nan,
            "robust_accuracy": float(attacked_shares[k, k]),
            "top_wrong": top,
            "top_wrong_share": hits / count if known else np.nan,
            "top_wrong_low": low,
            "top_wrong_high": high,
            "top_wrong_of_errors": float(errors[k, top]) if known else np.nan,
            "entropy": entropy(attacked_shares[k]) if known else np.nan,
            "error_entropy": entropy(errors[k][others]) if np.isfinite(errors[k][others]).all() else np.nan,
        }
        for name in SIMILARITIES:
            similar = pairs[name].reshape(classes, classes)[k][others]
            fit = known and bool(np.isfinite(similar).all())
            row[f"spearman_{name}"] = spearman(similar, attacked_shares[k][others]) if fit else np.nan
            row[f"kendall_{name}"] = kendall(similar, attacked_shares[k][others]) if fit else np.nan
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _figures(pairs: Table, by_class: Table, wrong: np.ndarray, followed: np.ndarray) -> dict[str, float]:
    hardest = int(np.nanargmax(by_class["top_wrong_share"]))
    apart = pairs["true"] != pairs["predicted"]
    classes = len(by_class["n"])
    return {
        "n": float(len(wrong)),
        "robust_accuracy": float(1 - wrong.mean()),
        "hardest_true": float(hardest),
        "hardest_predicted": float(by_class["top_wrong"][hardest]),
        "hardest_share": float(by_class["top_wrong_share"][hardest]),
        "hardest_low": float(by_class["top_wrong_low"][hardest]),
        "hardest_high": float(by_class["top_wrong_high"][hardest]),
        "mean_top_wrong_share": float(np.nanmean(by_class["top_wrong_share"])),
        "mean_top_wrong_of_errors": _mean(by_class["top_wrong_of_errors"]),
        "mean_entropy": _mean(by_class["entropy"]),
        "largest_entropy": float(np.log(classes)),
        "mean_error_entropy": _mean(by_class["error_entropy"]),
        "largest_error_entropy": float(np.log(max(classes - 1, 1))),
        "runner_up_share": float(followed.mean()) if len(followed) else float("nan"),
        **{
            f"{kind}_{name}": _mean(by_class[f"{kind}_{name}"])
            for kind in ("spearman", "kendall")
            for name in SIMILARITIES
        },
        **{f"spearman_{name}_overall": _overall(pairs[name][apart], pairs["attacked"][apart]) for name in SIMILARITIES},
    }


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _overall(similar: np.ndarray, shares: np.ndarray) -> float:
    known = np.isfinite(similar) & np.isfinite(shares)
    return spearman(similar[known], shares[known])


def _told(figures: dict[str, float], pairs: Table, named: Sequence[str]) -> str:
    true, predicted = int(figures["hardest_true"]), int(figures["hardest_predicted"])
    told = (
        f"Under attack, {percent(figures['hardest_share'])} of the images of {named[true]} are taken for "
        f"{named[predicted]}, the hardest pair ({percent(pairs['clean'].reshape(len(named), -1)[true, predicted])} "
        f"without attack); the commonest error of a class is {percent(figures['mean_top_wrong_of_errors'])} of its "
        "errors "
        "on average."
    )
    if np.isfinite(figures["spearman_features"]):
        told += (
            f" Similarity of features predicts where errors go: mean rank correlation "
            f"{figures['spearman_features']:.2f} ({figures['spearman_weights']:.2f} for the weights)."
        )
    return told


def compare(founds: Sequence[Found]) -> Found:
    """The same pairs for several checkpoints or runs: before and after.

    Args:
        founds: Results of `measure` with the same classes, at least two.

    Returns:
        Tables ``members`` (the figures of each result) and ``pairs`` (``true``, ``predicted``, and a column
        ``attacked_k`` for each member k).

    Raises:
        UnavailableError: Fewer than two results.
        UserError: They have other classes.
    """
    if len({tuple(one.protocol.get("class_names", ())) for one in founds}) > 1:
        raise UserError("pairs can be compared between models of the same classes only")
    named = renamed(founds)
    if len(named) < 2:
        raise UnavailableError("there is nothing to compare: pairs were found for one checkpoint only")
    members = members_of(named)
    first = named[0].tables["pairs"]
    pairs: Table = {"true": first["true"], "predicted": first["predicted"]}
    for number, one in enumerate(named):
        pairs[f"attacked_{number}"] = one.tables["pairs"]["attacked"]
    classes = list(named[0].protocol["class_names"])
    shares = np.stack([pairs[f"attacked_{number}"] for number in range(len(named))])
    largest = np.where(pairs["true"] == pairs["predicted"], -1.0, np.nan_to_num(shares).max(0))
    hardest = int(np.argmax(largest))
    pair = f"{classes[int(pairs['true'][hardest])]} → {classes[int(pairs['predicted'][hardest])]}"
    told = ", ".join(f"{percent(share)} ({one.label})" for share, one in zip(shares[:, hardest], named, strict=True))
    protocol = protocol_of(named, n=images_of(named), class_names=classes, attack=attacks_of(named))
    figures = {"hardest_pair": float(hardest), "largest_share": float(largest[hardest])}
    summary = f"Taken for another class under attack, {pair}: {told}."
    return Found(NAME, TITLE, summary, figures, {"members": members, "pairs": pairs}, protocol)


ANALYSIS = register(
    Analysis(
        name=NAME,
        title=TITLE,
        measure=measure,
        draw=draw,
        needs="model",
        cost="PGD-20 on every image (about 22 forward and 20 backward passes)",
        splits=("test",),
        compare=compare,
        draw_compared=draw_compared,
    )
)
