"""``instar doctor [TARGET] [--recipe RECIPE]``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from instar.cli.arguments import parse, parser, pointed, radius, width_of
from instar.cli.configuration import configured, recipe_named
from instar.doctor import Report, examine, examine_machine, predict
from instar.errors import UserError, unknown
from instar.evaluate import SUITES
from instar.evaluate.conditions import BATCH_SIZE
from instar.evaluate.targets import ONLINE
from instar.runs import check_checkpoint

DESCRIPTION = """Look before the work begins; exit status 1 if anything would make a number wrong.

`instar doctor` looks at the machine. `instar doctor TARGET` looks at a model as `instar evaluate` would see it (input
range, normalisation, logits, mode, determinism, classes, gradients, eps, precision) and says what each suite would
cost. `instar doctor --recipe RECIPE` with the flags of `instar train` says how long training would take."""


def run(words: Sequence[str]) -> int:
    """Examine and print.

    Raises:
        UserError: A mistake in the arguments, or a target that does not exist.
    """
    words = list(words)
    if any(word.partition("=")[0] in ("--recipe", "--config") for word in words):
        report, as_json = _recipe(words)
    else:
        report, as_json = _target(words)
    if as_json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join([report.target, *(f"  {line}" for line in report.lines())]))
    return 0 if report.ok else 1


def _target(words: list[str]) -> tuple[Report, bool]:
    made = parser("doctor", DESCRIPTION)
    made.add_argument("--target", type=str, default=None, help="run, weights, ONNX model or TorchScript program")
    made.add_argument("--recipe", type=str, default=None, help="predict the time of a training run; see instar train")
    made.add_argument("--data", type=str, default=None, help="data set; a run and a card know their own")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in")
    made.add_argument("--size", type=int, default=None, help="height and width of decoded pictures")
    made.add_argument("--model", type=str, default=None, help="network of a foreign state dict")
    made.add_argument("--width", type=int, default=None, help="channels of that network's first stage")
    made.add_argument("--normalize", type=str, default="identity", help="identity, dataset, auto or mean/std")
    made.add_argument("--checkpoint", type=str, default="best", help="of a run: best, last, online or epoch_NNN")
    made.add_argument("--norm", type=str, default=None, help="Linf, L2 or L1")
    made.add_argument("--eps", type=radius, default=None, help="radius, as 8/255")
    made.add_argument("--n", type=int, default=None, help="test images that suites would be run on; default: all")
    made.add_argument("--suite", type=str, default=None, help=f"estimate this one only: one of {', '.join(SUITES)}")
    made.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="images that are attacked at a time")
    made.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    made.add_argument("--trust", action="store_true", help="run a TorchScript program, which can run code")
    made.add_argument("--json", action="store_true", help="print figures for a machine")
    given = parse(made, pointed(made, words))
    if given.target is None:
        return examine_machine(given.device), given.json
    if given.suite is not None and given.suite not in SUITES:
        raise unknown("suite", given.suite, SUITES)
    check_checkpoint(given.checkpoint, ONLINE)
    for name, number in (("n", given.n), ("batch_size", given.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1; got {number}")
    report = examine(
        given.target,
        data=given.data,
        root=given.root,
        size=given.size,
        model=given.model,
        model_arguments=width_of(given),
        checkpoint=given.checkpoint,
        norm=given.norm,
        eps=given.eps,
        normalize=given.normalize,
        images=given.n,
        batch_size=given.batch_size,
        suites=None if given.suite is None else (given.suite,),
        device=given.device,
        trust=given.trust,
    )
    return report, given.json


def _recipe(words: list[str]) -> tuple[Report, bool]:
    name = recipe_named(words)
    if name is None:
        raise UserError("the configuration names no recipe: add recipe: pgd_at, or --recipe pgd_at")
    if not name:
        raise UserError("which recipe? instar doctor --recipe RECIPE ...; instar explain lists them")
    made = parser("doctor --recipe RECIPE", DESCRIPTION)
    made.add_argument("--json", action="store_true", help="print figures for a machine")
    made.add_argument("--seconds", type=float, default=20.0, help="time that may be spent on the probe, about")
    run = configured(name, words, made)
    training = predict(name, arguments=run.arguments, changes=run.changes, seconds=run.given.seconds, **run.fields)
    target = f"{name} on {run.fields['data']}"
    return replace(examine_machine(run.fields["device"]), target=target, training=training), run.given.json
