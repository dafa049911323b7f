"""Whether a network has the capacity for its threat model: training errors by size and by radius, GAIRAT's motivation.

Making a network constant around every image takes far more capacity than fitting the images does: the adversarial
*training* error stays high where networks are small or balls are large (over-smoothing), long after the natural one
would be nothing. A run knows its adversarial training error by epoch, as training met it (augmented images, weights of
that step, its own training attack), and natural and adversarial errors of its held-out images (attacked by margin PGD,
so that the two adversarial errors differ by more than what does not generalise).

Source: Zhang et al. 2021 (GAIRAT), Figures 2 and 5.
Deviations: they attack the training images anew with PGD-10 and give the natural training error too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instar.analyse.analysis import Analysis, Found, Table, register
from instar.analyse.compared import protocol_of, stacked
from instar.analyse.draw_capacity import draw, draw_compared
from instar.analyse.perform import renamed
from instar.analyse.target import Target
from instar.errors import UserError
from instar.evaluate.targets import radius
from instar.report.stored import UnavailableError
from instar.report.wording import percent

NAME, TITLE = "capacity", "Capacity for the threat model"


def measure(target: Target) -> Found:
    """Errors of a run by epoch, with the size of its network and the radius of its ball.

    Args:
        target: A run with at least one finished epoch.

    Returns:
        Table ``epochs``: ``epoch``, ``train_adversarial``, ``held_out_natural`` and ``held_out_adversarial`` errors,
        and ``lr``.

    Raises:
        UnavailableError: There is no run, or no finished epoch.
    """
    run = target.require_run()
    if not run.log:
        raise UnavailableError(f"{run.folder} has no finished epoch yet")
    columns = {
        "train_adversarial": "train_robust",
        "held_out_natural": "selection_clean",
        "held_out_adversarial": "selection_robust",
    }
    table: Table = {"epoch": np.array([int(line["epoch"]) for line in run.log])}
    table |= {name: np.array([1.0 - float(line[of]) for line in run.log]) for name, of in columns.items()}
    table["lr"] = np.array([float(line["lr"]) for line in run.log])
    known = run.config.get("threat") or {}
    try:
        eps = radius(known["eps"]) if known else 0.0
    except UserError:  # a schedule: no one radius
        eps = float("nan")
    parameters = run.config["model"].get("parameters")
    figures = {
        "parameters": float(parameters) if isinstance(parameters, (int, float)) else float("nan"),
        "eps": eps,
        **{name: float(table[name][-1]) for name in columns},
        "gap": float(table["held_out_adversarial"][-1] - table["train_adversarial"][-1]),
    }
    summary = (
        f"After {len(run.log)} epochs {run.title} ({run.model}, {run.threat or 'no attack'}) still gets "
        f"{percent(figures['train_adversarial'])} of the training images wrong under its training attack, and "
        f"{percent(figures['held_out_adversarial'])} of the held-out ones under margin PGD."
    )
    protocol = target.protocol(
        model={"name": run.model, "parameters": parameters},
        threat=run.threat,
        data={"title": run.data},
        finished=len(run.log),
        held_out=run.held_out,
        seconds=0.0,
        source="log of the run: training attack on augmented images with the weights of each step",
    )
    return Found(NAME, TITLE, summary, figures, {"epochs": table}, protocol)


def compare(founds: Sequence[Found]) -> Found:
    """Runs of several sizes and radii side by side.

    Args:
        founds: Results of `measure`, at least two.

    Returns:
        Tables ``members`` (``label``, ``model``, ``threat``, ``parameters``, ``eps`` and the last errors) in the order
        of radius, then size, and ``epochs`` (as of `measure`, with a column ``member``).

    Raises:
        UnavailableError: Fewer than two results.
    """
    if len(founds) < 2:
        raise UnavailableError("there is nothing to compare: the errors of one run only are known")
    named = sorted(renamed(founds), key=lambda one: (one.figures["eps"], one.figures["parameters"]))
    members: Table = {
        "label": np.array([one.label for one in named]),
        "model": np.array([str((one.protocol.get("model") or {}).get("name")) for one in named]),
        "threat": np.array([str(one.protocol.get("threat")) for one in named]),
        "data": np.array([str((one.protocol.get("data") or {}).get("title")) for one in named]),
        **{name: np.array([one.figures[name] for one in named]) for name in named[0].figures},
    }
    tables = {"members": members, "epochs": stacked([one.tables["epochs"] for one in named])}
    low, high = int(np.argmin(members["train_adversarial"])), int(np.argmax(members["train_adversarial"]))
    summary = (
        f"The error under the training attack is highest for {members['label'][high]} ({members['model'][high]}, "
        f"{members['threat'][high]}: {percent(members['train_adversarial'][high])}) and lowest for "
        f"{members['label'][low]} ({members['model'][low]}, {members['threat'][low]}: "
        f"{percent(members['train_adversarial'][low])})."
    )
    protocol = protocol_of(named)
    figures = {"difference": float(members["train_adversarial"][high] - members["train_adversarial"][low])}
    return Found(NAME, TITLE, summary, figures, tables, protocol)


ANALYSIS = register(
    Analysis(
        name=NAME,
        title=TITLE,
        measure=measure,
        draw=draw,
        needs="records",
        cost="reads the log: no time",
        compare=compare,
        draw_compared=draw_compared,
    )
)
