"""What makes a robust number wrong before any attack is run: each check takes one look at the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from instar.data.catalogue import CATALOGUE, DatasetInfo
from instar.doctor.report import ERROR, OK, WARNING, Check
from instar.errors import UserError, one_line
from instar.evaluate.intervals import mcnemar, wilson
from instar.evaluate.normalization import Statistics, candidates, compare
from instar.evaluate.subject import check_logits, is_black_box
from instar.expression import number
from instar.modes import forward_mode, full
from instar.threat import Ball

SAME = 1e-3
"""Relative difference of logits from which two computations disagree."""
ROUNDING = 1e-5
"""Relative difference of logits that float32 explains."""


def model_checks(model: nn.Module, x: Tensor, y: Tensor, *, info: DatasetInfo, classes: int, ball: Ball) -> list[Check]:
    """All checks of a model, in the order in which they are understood.

    The model is left as it was found: modes, buffers, ``requires_grad``. A check that fails in itself is an error of
    that check; where the model cannot even process the images, the rest is left out.

    Args:
        model: Images (B, C, H, W) in [0, 1] → logits (B, K).
        x: Some images (n, C, H, W), float32, on the model's device.
        y: Their labels (n,).
        info: What is known about the data set.
        classes: Number of its classes.
        ball: The threat model.

    Returns:
        The checks.
    """
    given = "train" if model.training else "eval"
    with forward_mode(model, "eval"):
        output = _output(model, x)
        if output.level == ERROR and output.value is None:
            return [_range(x), output]
        looks: list[Callable[[], Check]] = [
            lambda: _range(x),
            lambda: output,
            lambda: _classes(int(output.value or 0), classes, info),
            lambda: _accuracy(model, x, y),
            lambda: _normalization(model, x, y, info),
            lambda: _mode(model, x, y, given),
            lambda: _determinism(model, x),
            lambda: _independence(model, x),
            lambda: _gradients(model, x, y),
            lambda: _float64(model, x, y),
            lambda: _half(model, x),
            lambda: radius_check(ball, info),
        ]
        return [check for look in looks if (check := _taken(look)) is not None]


def _taken(look: Callable[[], Check]) -> Check | None:
    try:
        return look()
    except torch.OutOfMemoryError:
        return Check("memory", ERROR, "there is not enough of it for the probe", "Give fewer images with --n")
    except Exception as error:  # foreign models fail in any way; the other checks still tell something
        return Check("probe", ERROR, f"the model failed: {type(error).__name__}: {one_line(error)}", "Mend the model")


def _range(x: Tensor) -> Check:
    low, high = float(x.min()), float(x.max())
    text = f"images lie in {low:.3g}..{high:.3g}, mean {float(x.mean()):.3g}"
    if high <= 0.1:
        return Check("input range", WARNING, text, "Were they divided by 255 twice?", high)
    return Check("input range", OK, text, value=high)


@torch.no_grad()
def _output(model: nn.Module, x: Tensor) -> Check:
    """Whether the outputs are logits; its value is the number of classes."""
    try:
        classes = check_logits(model, x[:8])
    except UserError as error:
        probabilities = "probabilities" in str(error)
        count = float(model(x[:1]).shape[1]) if probabilities else None
        return Check("output", ERROR, str(error).rstrip("."), value=count)
    logits = full(model(x))
    if bool((logits.logsumexp(1).abs() < 1e-4).all()):
        return Check("output", OK, "log-probabilities, which serve as logits", value=float(classes))
    return Check("output", OK, f"logits of {classes} classes, largest {float(logits.abs().max()):.3g}", value=classes)


def _classes(found: int, wanted: int, info: DatasetInfo) -> Check:
    text = f"the model has {found} outputs, {info.title} {wanted} classes"
    if found < wanted or (found != wanted and info.name in CATALOGUE):
        return Check("classes", ERROR, text, "The model is for another data set, or has another head", found)
    return Check("classes", OK, text, value=found)


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    right = int((_logits(model, x).argmax(1) == y).sum())
    low, high = wilson(right, len(y))
    chance = float(torch.bincount(y).max()) / len(y)
    text = f"{right / len(y):.1%} of {len(y)} images ({low:.0%} to {high:.0%})"
    if high < chance or right == 0 or low <= chance:
        advice = "No better than always the same class: wrong weights, labels, normalisation or order of channels?"
        return Check("clean accuracy", ERROR if len(y) >= 32 else WARNING, text, advice, right / len(y))
    return Check("clean accuracy", OK, text, value=right / len(y))


def _normalization(model: nn.Module, x: Tensor, y: Tensor, info: DatasetInfo) -> Check:
    """Whether the model does clearly better with another normalisation in front, or with one taken away."""
    known = candidates(info)
    tried = {name: pair for name, pair in known.items() if name != "dataset twice"}
    undone = {f"{name}, undone": _inverse(pair) for name, pair in tried.items() if name not in ("identity", "0..255")}
    found = compare(model, x, y, tried | undone)
    as_given = next(tried for tried in found.tried if tried.name == "identity")
    best = found.tried[0]
    pair = mcnemar(best.correct, as_given.correct)
    layers = [name or type(part).__name__ for name, part in model.named_modules() if _normalises(part)]
    inside = f"; normalised inside by {', '.join(layers[:3])}" if layers else "; no normalisation layer inside"
    figures = f"{as_given.accuracy:.1%} as it is, {best.accuracy:.1%} with {best.name}"
    if best is not as_given and pair.difference > max(2 * pair.error, 0.05):
        if best.name.endswith(", undone"):
            advice = "It is normalised twice: take one of the two away"
        else:
            shown = (
                best.name
                if best.name == "dataset"
                else "/".join(",".join(f"{entry:.4g}" for entry in part) for part in (best.mean, best.std))
            )
            advice = f"The network was trained on other inputs: give --normalize {shown}"
        return Check("normalisation", ERROR, figures + inside, advice, pair.difference)
    if len(layers) > 1:
        return Check("normalisation", WARNING, f"{as_given.accuracy:.1%} as it is{inside}", "Are both meant?")
    text = f"{as_given.accuracy:.1%} as it is, no other does better{inside}"
    return Check("normalisation", OK, text, value=max(pair.difference, 0.0))


def _inverse(pair: Statistics) -> Statistics:
    """(x − m') / s' that takes back (x − m) / s: x·s + m."""
    mean, std = pair
    return tuple(-m / s for m, s in zip(mean, std, strict=True)), tuple(1 / s for s in std)


def _normalises(module: nn.Module) -> bool:
    """Whether a module looks like a layer that normalises images: it has a mean and a std, and no parts."""
    named = {name for name, _ in module.named_buffers(recurse=False)} | set(vars(module))
    return (
        {"mean", "std"} <= named
        and not any(module.children())
        and any(
            bool((torch.as_tensor(getattr(module, name)) != neutral).any())
            for name, neutral in (("mean", 0), ("std", 1))
        )
    )


@torch.no_grad()
def _mode(model: nn.Module, x: Tensor, y: Tensor, given: str) -> Check:
    if is_black_box(model):
        return Check("mode", OK, "a fixed program: it has no modes")
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    layers = [part for part in model.modules() if isinstance(part, kinds)]
    names = ", ".join(sorted({type(part).__name__ for part in layers})) or "none that matter"
    evaluated = _logits(model, x).argmax(1)
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []), forward_mode(model, "batch"):
        trained = torch.cat([full(model(part)) for part in x.split(64)]).argmax(1)
    differ = float((evaluated != trained).float().mean())
    text = f"given in {given} mode, examined in eval mode; {differ:.0%} of predictions differ in train mode ({names})"
    pair = mcnemar((trained == y).cpu().numpy(), (evaluated == y).cpu().numpy())
    if pair.difference > max(2 * pair.error, 0.05):
        advice = "Running statistics of BatchNorm do not fit the weights: estimate them anew"
        return Check("mode", WARNING, f"{text}; train mode is {pair.difference:.1%} more accurate", advice, differ)
    return Check("mode", OK, text, value=differ)


@torch.no_grad()
def _determinism(model: nn.Module, x: Tensor) -> Check:
    differ = _relative(_logits(model, x), _logits(model, x))
    text = f"logits of two calls differ by {differ:.1g} of the largest" if differ else "two calls give equal logits"
    if differ > SAME:
        advice = "It is random in eval mode: average over draws (AutoAttack rand); other numbers mean nothing"
        return Check("determinism", ERROR, text, advice, differ)
    return Check("determinism", WARNING if differ > ROUNDING else OK, text, value=differ)


@torch.no_grad()
def _independence(model: nn.Module, x: Tensor) -> Check:
    few = x[:8]
    together = full(model(few))
    alone = torch.cat([full(model(image)) for image in few.split(1)])
    differ = max(_relative(together, alone), _relative(together, full(model(few.flip(0))).flip(0)))
    text = f"logits alone and in a batch differ by {differ:.1g} of the largest"
    if differ > SAME:
        advice = "An image's verdict depends on its neighbours: is BatchNorm without running statistics?"
        return Check("batch independence", ERROR, text, advice, differ)
    return Check("batch independence", OK, text, value=differ)


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    if is_black_box(model):
        return Check("gradients", WARNING, "the model gives none", "Take --suite black_box: a weaker attack finds less")
    gradient = _gradient(model, x, y)
    if not bool(torch.isfinite(gradient).all()):
        return Check("gradients", ERROR, "NaN or infinity in input gradients", "Gradient attacks cannot judge it")
    vanished = gradient.flatten(1).abs().amax(1) == 0
    with torch.no_grad():
        saturated = torch.nn.functional.cross_entropy(_logits(model, x), y, reduction="none") == 0
    zero = float(vanished.float().mean())
    text = f"{zero:.0%} of images have an input gradient of exactly zero"
    text += f", {float(saturated.float().mean()):.0%} a loss of exactly zero"
    if float((vanished & ~saturated).float().mean()) > 0.1:
        advice = "Something cuts the gradient (rounding, argmax, detach): only black-box and adaptive attacks judge it"
        return Check("gradients", ERROR, text, advice, zero)
    if zero > 0:
        advice = "Cross-entropy is saturated there: trust margin attacks and AutoAttack, not PGD"
        return Check("gradients", WARNING, text, advice, zero)
    return Check("gradients", OK, text, value=zero)


def _float64(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    """Whether the gradient of float32 is that of float64."""
    if is_black_box(model) or not any(t.is_floating_point() for t in (*model.parameters(), *model.buffers())):
        return Check("float64", OK, "not compared: there is no gradient or nothing to convert")
    few, labels = x[:16], y[:16]
    try:
        exact = _gradient(copy.deepcopy(model).double(), few.double(), labels).flatten(1)
    except Exception as error:  # a model that insists on float32 is no mistake
        return Check("float64", OK, f"not compared: the model does not run in float64 ({one_line(error)[:80]})")
    found = _gradient(model, few, labels).flatten(1).double()
    there = exact.abs().amax(1) > 0
    if not bool(there.any()):
        return Check("float64", OK, "not compared: the gradient is zero in float64 too")
    lost = float(((found.abs().amax(1) == 0) & there).float().mean())
    agree = float(torch.nn.functional.cosine_similarity(found, exact)[there].median())
    text = f"gradients of float32 and float64 agree to a cosine of {agree:.4f}, {lost:.0%} vanish in float32 only"
    if lost > 0 or agree < 0.99:
        advice = "Logits are too large or too flat for float32: scale them (adaptive suite), or attack in float64"
        return Check("float64", WARNING, text, advice, agree)
    return Check("float64", OK, text, value=agree)


@torch.no_grad()
def _half(model: nn.Module, x: Tensor) -> Check:
    """Whether NHWC layout and bfloat16 give the same predictions: neither is used unless asked for."""
    few = x[:32]
    plain = full(model(few))
    nhwc = full(model(few.contiguous(memory_format=torch.channels_last)))
    if is_black_box(model):
        return Check("precision", OK, "bfloat16 not compared: it is no module of torch", value=1.0)
    with torch.autocast(few.device.type, dtype=torch.bfloat16):
        half = full(model(few))
    same = float((half.argmax(1) == plain.argmax(1)).float().mean())
    layout, differ = _relative(plain, nhwc), _relative(plain, half)
    text = f"{same:.0%} equal predictions in bfloat16 (logits differ by {differ:.1g}), by {layout:.1g} in channels_last"
    if layout > SAME:
        return Check("precision", ERROR, text, "The model depends on the memory layout: mend its reshape", same)
    if same < 0.95:
        return Check("precision", WARNING, text, "Evaluate in float32, which is the default", same)
    return Check("precision", OK, text, value=same)


def radius_check(ball: Ball, info: DatasetInfo) -> Check:
    """Whether eps is likely meant in the unit of inputs in [0, 1]."""
    usual, radius = info.eps, ball.radius
    size = info.shape[0] * info.shape[1] * info.shape[2]
    text = f"{ball.norm} {number(radius)}"
    if radius == 0:
        return Check("eps", WARNING, text, "Nothing can move: robust accuracy is clean accuracy", radius)
    whole = {"Linf": 1.0, "L2": size**0.5, "L1": float(size)}[ball.norm]
    if radius >= 0.5 * whole:
        advice = "It covers half of the image space, where no model is robust: did you mean " + (
            f"{number(radius / 255)}?" if ball.norm != "Linf" else f"{number(usual)}?"
        )
        return Check("eps", ERROR, text, advice, radius)
    if ball.norm == info.norm and not usual / 4 <= radius <= 4 * usual:
        times = radius / usual
        return Check(
            "eps",
            WARNING,
            f"{text} is {times:.3g} times the usual {number(usual)} of {info.title}",
            "Inputs lie in [0, 1]: 8 of 255 grey levels are 8/255",
            radius,
        )
    return Check("eps", OK, f"{text}, in the unit of inputs in [0, 1]", value=radius)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([full(model(part)) for part in x.split(64)])


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients (n, C, H, W) of each image's cross-entropy; zero where the loss does not depend on the image."""
    parts = []
    with forward_mode(model, "eval"), torch.enable_grad():
        for images, labels in zip(x.split(32), y.split(32), strict=True):
            at = images.detach().requires_grad_()
            loss: Any = torch.nn.functional.cross_entropy(model(at), labels, reduction="sum")
            if not loss.requires_grad:
                parts.append(torch.zeros_like(images))
                continue
            (gradient,) = torch.autograd.grad(loss, at, allow_unused=True)
            parts.append(torch.zeros_like(images) if gradient is None else gradient)
    return torch.cat(parts)
