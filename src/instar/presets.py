"""The published settings by name: hyper-parameters of the papers and their codes, each with its source.

A preset holds what a paper says about method and training. Three things stay ours in all of them: part of the training
set is held out and selects the checkpoint (most published codes select on test images, which is never done here),
precision is that of the hardware, and the last batch of an epoch is left out if it is not full. Epochs count from 0
here and from 1 in many codes: a drop "from epoch 75 on" of those is one at 74. Few published codes average weights, so
that ``ema`` is 0 unless a preset says otherwise. What the sources leave open is named in `Preset.unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from instar.attacks import Uniform, Zero
from instar.errors import UserError, unknown
from instar.schedules import Ramp, Scaled, Schedule, Steps, share_of
from instar.weightspace import EMA


@dataclass(frozen=True)
class Preset:
    """One published setting of a recipe.

    Attributes:
        recipe: Name of the recipe.
        name: Name of the setting, unique within the recipe.
        arguments: Arguments of the recipe.
        settings: Fields of `instar.config.Settings`.
        source: Paper and code.
        published: The number that was published for it, with its attack; empty where none is known.
        unknown: What the sources do not say or the settings cannot express, and what stands there instead.
        changes: Dotted paths into the method and their values, as of ``--set``.
        needs: What the user must give: the name of an argument or setting, and what it is.

    Example:
        >>> found = preset("gairat", "cifar10-wrn-32-10")
        >>> found.title
        'cifar10, wide_resnet_34_10, 120 epochs of 128, sgd 0.1'
    """

    recipe: str
    name: str
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]
    source: str
    published: str = ""
    unknown: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Data, network and training in a few words."""
        s = self.settings
        size = f" at {s['size']} pixels" if "size" in s else ""
        return f"{s['data']}{size}, {s['model']}, {s['epochs']} epochs of {s['batch_size']}, sgd {s['lr']:g}"


def preset(recipe: str, name: str) -> Preset:
    """A preset by the names of its recipe and its own.

    Raises:
        UserError: No such preset, with the names that there are.

    Example:
        >>> preset("spat", "cifar10-resnet18").arguments["scale"]
        5.0
        >>> preset("natural", "cifar10")
        Traceback (most recent call last):
            ...
        instar.errors.UserError: unknown preset of natural 'cifar10'. Known: none
    """
    known = PRESETS.get(recipe, {})
    if name not in known:
        raise unknown(f"preset of {recipe}", name, known)
    return known[name]


def apply(
    preset: Preset, given_arguments: Mapping[str, Any], given_settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and settings of a preset, where what the user gives wins.

    A run of another length is the published one in small: with ``epochs`` of the user's own, the published epochs of
    drops, burn-ins and schedules become shares of the run. A ``norm`` without ``eps`` does not inherit the radius and
    step of another norm.

    Args:
        preset: The preset.
        given_arguments: The recipe's arguments that the user gave; None stands for not given.
        given_settings: The settings that the user gave, and no others.

    Returns:
        Arguments for `instar.config.build_method`, and fields of `instar.config.Settings`. `changes_of` has the rest.

    Raises:
        UserError: Something that only the user can give is missing: a teacher, a file of extra images.

    Example:
        >>> arguments, settings = apply(preset("gairat", "cifar10-wrn-32-10"), {"shift": 0.0}, {"epochs": 30})
        >>> arguments["shift"], arguments["eps"], settings["epochs"], settings["drops"][0]
        (0.0, 0.031, 30, (0.49166666666666664, 0.1))
    """
    ours = {name: item for name, item in given_arguments.items() if item is not None}
    for name, what in preset.needs.items():
        if ours.get(name) is None and given_settings.get(name) is None:
            raise UserError(f"the preset {preset.name} of {preset.recipe} needs --{name}, {what}")
    arguments, settings = dict(preset.arguments), dict(preset.settings)
    if "norm" in ours and "eps" not in ours and ours["norm"] != arguments.get("norm", "Linf"):
        arguments = {name: item for name, item in arguments.items() if name not in ("eps", "step_size")}
    epochs = settings["epochs"]
    if given_settings.get("epochs", epochs) != epochs:
        arguments = {name: _in_shares(item, epochs, name in TIMES) for name, item in arguments.items()}
        if "drops" in settings:
            settings["drops"] = tuple((share_of(when, epochs), factor) for when, factor in settings["drops"])
    return arguments | ours, settings | dict(given_settings)


def changes_of(preset: Preset, given_settings: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of a preset, for ``build_method(changes=changes_of(...) | the user's own)``.

    A user who gives ``ema`` gets that average and not the preset's.

    Example:
        >>> changes_of(preset("pgd_at", "idbh-weak-cifar10-wrn-34-10"), {"ema": 0.99})
        {'attack.mode': 'train', 'attack.start': Zero()}
    """
    left_out = {"average"} if "ema" in given_settings else set()
    return {path: item for path, item in preset.changes.items() if path not in left_out}


TIMES = ("burn_in", "begin")
"""Arguments of recipes that are a time of the run, and no schedule."""


def _in_shares(item: Any, epochs: int, is_time: bool) -> Any:
    """`item` with every epoch in it written as a share of a run of `epochs`."""
    if is_time:
        return share_of(item, epochs)
    if isinstance(item, Steps):
        return replace(item, changes=tuple((share_of(when, epochs), then) for when, then in item.changes))
    if isinstance(item, Ramp):
        return replace(item, begin=share_of(item.begin, epochs), end=share_of(item.end, epochs))
    if isinstance(item, Scaled):
        scaled: Schedule = _in_shares(item.schedule, epochs, False)
        return replace(item, schedule=scaled)
    return item


# Building blocks -----------------------------------------------------------------------------------------------------

OLD_LINF = {"eps": 0.031, "step_size": 0.007, "steps": 10}
"""The threat model of TRADES' code and those that follow it, a little below 8/255."""

LINF_8 = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10}

L2_HALF = {"norm": "L2", "eps": 128 / 255, "step_size": 15 / 255, "steps": 10}

TRAIN_MODE = {"attack.mode": "train"}
"""BatchNorm uses and updates batch statistics in the attack."""

PRN, RN, WRN, WIDE_28 = "preact_resnet18", "resnet18", "wide_resnet_34_10", "wide_resnet_28_10"
DEPTH = "The network that its authors count as WRN-32-10 has five blocks a stage, as our WRN-34-10."


def _sgd(data: str, model: str, *, epochs: int, lr: float = 0.1, weight_decay: float = 5e-4, **more: Any) -> Any:
    """Settings that most codes share: SGD with momentum 0.9 and without Nesterov, batches of 128, no average."""
    return {
        "data": data,
        "model": model,
        "epochs": epochs,
        "batch_size": 128,
        "optimizer": "sgd",
        "nesterov": False,
        "lr": lr,
        "schedule": "piecewise",
        "momentum": 0.9,
        "weight_decay": weight_decay,
        "ema": 0.0,
    } | more


HALF_AND_THREE_QUARTERS = ((100, 0.1), (150, 0.01))


def _rice(data: str, model: str, **more: Any) -> Any:
    """200 epochs with drops at 100 and 150: Rice et al., and with them AWP, ISEAT and IDBH."""
    return _sgd(data, model, epochs=200, drops=HALF_AND_THREE_QUARTERS, **more)


# GAIRAT --------------------------------------------------------------------------------------------------------------

_GAIRAT = "Zhang et al. 2021 (arXiv 2010.01736); code zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training"
_GAIRAT_RUN = _sgd("cifar10", WRN, epochs=120, weight_decay=2e-4, drops=((59, 0.1), (89, 0.01), (109, 0.005)))
_500K = {"extra": "the 500,000 pseudo-labelled TinyImages of Carmon et al. 2019"}
_RST_RUN = _sgd(
    *("cifar10", WIDE_28),
    epochs=200,
    batch_size=256,
    nesterov=True,
    schedule="cosine",
    extra_fraction=0.5,
)
_PER_EPOCH = "The code takes the cosine once an epoch, here it moves with every step."

_gairat = [
    Preset(
        "gairat",
        "cifar10-wrn-32-10",
        {"shift": -1.0, "burn_in": 59, "weight": "tanh", **OLD_LINF},
        _GAIRAT_RUN,
        f"{_GAIRAT}, Table 1",
        "clean 85.75, PGD-20 57.81, PGD+ 55.61 (best of all epochs on test images, 5 runs); AutoAttack 40 to 42 in "
        "later papers",
        DEPTH,
    ),
    Preset(
        "gairat",
        "cifar10-resnet18",
        {"shift": -1.0, "burn_in": 29, "weight": "tanh", **LINF_8},
        _sgd("cifar10", RN, epochs=100, weight_decay=2e-4, drops=((29, 0.1), (59, 0.01))),
        f"{_GAIRAT}, Figure 4",
        "",
        "The figure's two weight functions are named in an appendix that we do not have: tanh with λ = −1 is ours. The "
        "paper begins to weigh in epoch 31, the code in 30 (from 1). Weight decay is the code's default.",
    ),
    Preset(
        "gair_fat",
        "cifar10-wrn-32-10",
        {"patience": Steps(0, ((40, 3), (70, 6))), "shift": 0.0, "burn_in": 59, "weight": "tanh", **OLD_LINF},
        _GAIRAT_RUN,
        f"{_GAIRAT}, Table 1",
        "clean 88.59, PGD-20 56.21, PGD+ 53.50 (best of all epochs on test images, 5 runs)",
        f"{DEPTH} The code pairs images and labels wrongly behind the burn-in, which is not reproduced.",
    ),
    Preset(
        "gair_trades",
        "cifar10-wrn-34-10",
        {"beta": 6.0, "weighted": "ce", "shift": -1.0, "burn_in": 74, "weight": "tanh", **OLD_LINF},
        _sgd("cifar10", WRN, epochs=100, weight_decay=2e-4, drops=((74, 0.1), (89, 0.01))),
        f"{_GAIRAT}, a script that was deleted later (commit 79f5305)",
        "",
        "A reconstruction: the script as committed never computes the loss that its flags name. No number is known.",
    ),
    Preset(
        "gair_rst",
        "cifar10-wrn-28-10-500k",
        {"beta": 6.0, "shift": 3.0, "burn_in": 99, "confidence": 50.0, **OLD_LINF},
        _RST_RUN,
        f"{_GAIRAT}, GAIR-RST",
        "clean 89.36, AutoAttack 59.64",
        _PER_EPOCH,
        needs=_500K,
    ),
]

# SPAT ----------------------------------------------------------------------------------------------------------------

_SPAT = "Hou et al. 2022 (arXiv 2210.15068); code puerrrr/Self-Paced-Adversarial-Training"
_NO_TABLE = "The paper's tables were not available to us."
_SPAT_DROPS = ((74, 0.1), (89, 0.01))

_spat = [
    Preset(
        "spat",
        "cifar10-wrn-34-10",
        {"beta": 6.0, "scale": 8.0, "margin": 0.2, "offset": 0.2, "form": "plain", **OLD_LINF},
        _sgd("cifar10", WRN, epochs=100, weight_decay=2e-4, drops=_SPAT_DROPS),
        f"{_SPAT}, version of November 2022",
        "",
        f"{_NO_TABLE} Which epoch's checkpoint was evaluated is not stated.",
    ),
    Preset(
        "spat",
        "cifar10-resnet18",
        {"beta": 6.0, "scale": 5.0, "margin": 0.2, "offset": 0.2, "form": "plain", **OLD_LINF},
        _sgd("cifar10", RN, epochs=100, weight_decay=2e-4, drops=_SPAT_DROPS),
        f"{_SPAT}, version of August 2022",
        "",
        f"{_NO_TABLE} Optimiser and schedule are those of the later version.",
    ),
]

# SAT: P-SAT, H-SAT, and the baselines in its tables ------------------------------------------------------------------

_SAT = "Sitawarin et al. 2021 (arXiv 2003.09347); code chawins/adv-exp"
_SAT_DROPS = ((40, 0.1), (60, 0.01), (80, 0.001))
_SAT_NOTE = (
    "The code also rotates, scales and shears by little and changes brightness; here crop and mirror image. Its PreAct "
    "ResNet has no last BatchNorm."
)


def _sat_cifar(data: str, model: str) -> Any:
    # For the wide network a comment in the configuration has other numbers.
    rate: Any = {"lr": 0.1, "weight_decay": 2e-4} if model == WRN else {"lr": 0.05, "weight_decay": 5e-4}
    return _sgd(data, model, epochs=100, drops=_SAT_DROPS, selection=5000, **rate)


def _p_sat_cifar(data: str, model: str, name: str, published: str) -> Preset:
    wide = (
        " Learning rate and weight decay are those of a comment, which we take to be for this network: the "
        "configuration itself has 0.05 and 5e-4. Whether λ ends at 0.4 for it too is not known."
    )
    return Preset(
        "p_sat",
        name,
        {"bound": Ramp(0, 0.4, 30, 70), "by": "stop", "strict": False, **LINF_8},
        _sat_cifar(data, model),
        f"{_SAT}, configuration of CIFAR",
        published,
        _SAT_NOTE + (wide if model == WRN else ""),
    )


_RECONSTRUCTED = (
    "A reconstruction: how the authors estimate and normalise the curvature, and their schedule of λ, are not public. "
    "Estimator, normalisation and schedule here are ours."
)


def _sat_family(
    *,
    label: str,
    threat: Mapping[str, Any],
    settings: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    source: str,
    published: Mapping[str, str],
    notes: Mapping[str, str],
) -> list[Preset]:
    """A preset for each row of one of the paper's tables."""
    return [
        Preset(recipe, label, {**arguments, **threat}, settings, source, published[recipe], notes[recipe].strip())
        for recipe, arguments in methods.items()
    ]


_MNIST_SOURCE = f"{_SAT}, configuration of MNIST; numbers of the authors' AISec 2021 slides"
_MNIST_RUN = _sgd(
    *("mnist", "sat_cnn"),
    epochs=70,
    lr=0.01,
    drops=((40, 0.1), (50, 0.01), (60, 0.001)),
    augment="none",
    selection=6000,
)
_MNIST_METHODS: dict[str, dict[str, Any]] = {
    "pgd_at": {},
    "trades": {"beta": 20.0},
    # The bound at epoch 0 is the largest one, as c_max (1 − e / 30): the first decrement belongs to epoch 1.
    "dynamic_at": {"bound": Ramp(0.5, 0.0, 1 / 70, 31)},
    "h_sat": {"bound": Steps(0.2, ((30, 7 / 15), (45, 11 / 15), (60, 1.0))), "estimator": "last_layer"},
    "p_sat": {"bound": Steps(0.0, ((30, 1 / 3), (45, 2 / 3), (60, 1.0))), "by": "stop", "strict": False},
}
_TRADES_MEAN = "The code divides the KL by batch and classes, so that its β of {theirs} is {ours} here."
_MNIST_NOTES = {
    "pgd_at": "",
    "trades": f"{_TRADES_MEAN.format(theirs=200, ours=20)} The value is that of an early configuration.",
    "dynamic_at": "",
    "h_sat": _RECONSTRUCTED,
    "p_sat": "",
}
_MNIST_TABLE = {
    "0.3": {
        "pgd_at": "clean 98.07, AutoAttack 85.47",
        "trades": "clean 98.98, AutoAttack 90.70",
        "dynamic_at": "clean 98.93, AutoAttack 92.24",
        "h_sat": "clean 99.01, AutoAttack 80.71",
        "p_sat": "clean 99.16, AutoAttack 92.00",
    },
    "0.45": {
        "pgd_at": "clean 11.22, AutoAttack 11.22 (a constant classifier)",
        "trades": "clean 97.36, AutoAttack 0.00 (stuck)",
        "dynamic_at": "clean 97.98, AutoAttack 65.71",
        "h_sat": "clean 98.35, AutoAttack 54.10",
        "p_sat": "clean 97.87, AutoAttack 58.50",
    },
}

_IMAGENETTE_SOURCE = f"{_SAT}; numbers of the authors' AISec 2021 slides"
_IMAGENETTE_RUN = _sgd("imagenette", RN, epochs=100, lr=0.05, drops=_SAT_DROPS, size=64, stem="imagenet")
_IMAGENETTE_METHODS: dict[str, dict[str, Any]] = {
    "pgd_at": {},
    "trades": {"beta": 1.5},
    "dynamic_at": {"bound": Ramp(0.5, 0.0, 1 / 100, 81)},
    "h_sat": {"bound": Ramp(0.2, 1.0, 30, 70), "estimator": "last_layer"},
    "p_sat": {"bound": Ramp(0, 0.4, 30, 70), "by": "stop", "strict": False},
}
_IMAGENETTE_OURS = (
    "Only eps is published. Ours: ResNet-18 with the ImageNet stem at 64 pixels, crop and mirror image, steps of eps "
    "/ 4, optimiser and schedule as in the paper's configuration of CIFAR-10. The attack behind the table is not named."
)
_IMAGENETTE_NOTES = {
    "pgd_at": _IMAGENETTE_OURS,
    "trades": f"{_IMAGENETTE_OURS} β is that of CIFAR-10.",
    "dynamic_at": f"{_IMAGENETTE_OURS} The schedule of the bound is that of CIFAR-10.",
    "h_sat": f"{_RECONSTRUCTED} {_IMAGENETTE_OURS}",
    "p_sat": f"{_IMAGENETTE_OURS} The schedule of λ is that of CIFAR-10.",
}
_IMAGENETTE_TABLE = {
    16: {
        "pgd_at": "clean 49.10, adversarial 28.00",
        "trades": "clean 78.05, adversarial 8.90",
        "dynamic_at": "clean 66.20, adversarial 30.30",
        "h_sat": "clean 69.10, adversarial 35.45",
        "p_sat": "clean 72.20, adversarial 31.25",
    },
    24: {
        "pgd_at": "clean 42.55, adversarial 21.05",
        "trades": "clean 68.50, adversarial 1.90",
        "dynamic_at": "clean 52.50, adversarial 24.50",
        "h_sat": "clean 47.50, adversarial 27.75",
        "p_sat": "clean 62.15, adversarial 20.00",
    },
}

_sat = [
    _p_sat_cifar("cifar10", PRN, "cifar10-preact-resnet18", ""),
    _p_sat_cifar("cifar10", WRN, "cifar10-wrn-34-10", "clean 86.84, AutoAttack 50.72 (released weights)"),
    _p_sat_cifar("cifar100", PRN, "cifar100-preact-resnet18", ""),
    _p_sat_cifar("cifar100", WRN, "cifar100-wrn-34-10", "clean 62.82, AutoAttack 24.57 (released weights)"),
    Preset(
        "fgsm_sat",
        "cifar10-preact-resnet18",
        {"bound": Steps(0.0, ((5, 0.4 / 3), (10, 0.8 / 3), (15, 0.4))), "reach": 1.25, "eps": 8 / 255},
        _sgd("cifar10", PRN, epochs=30, lr=0.2, schedule="cyclic", selection=5000),
        f"{_SAT}, FGSM-ATES",
        "",
        f"The code's cycle has its peak at a third of the run, `cyclic` at 40 %. {_SAT_NOTE}",
    ),
    Preset(
        "pgd_at",
        "sat-cifar10-preact-resnet18",
        {**LINF_8},
        _sat_cifar("cifar10", PRN),
        f"{_SAT}, configuration of CIFAR",
        "",
        _SAT_NOTE,
    ),
    Preset(
        "trades",
        "sat-cifar10-preact-resnet18",
        {"beta": 1.5, **LINF_8},
        _sat_cifar("cifar10", PRN),
        f"{_SAT}, baseline",
        "",
        f"{_TRADES_MEAN.format(theirs=15, ours=1.5)} {_SAT_NOTE}",
    ),
    Preset(
        "dynamic_at",
        "sat-cifar10-preact-resnet18",
        {"bound": Ramp(0.5, 0.0, 1 / 100, 81), **LINF_8},
        _sat_cifar("cifar10", PRN),
        f"{_SAT}, baseline",
        "",
        _SAT_NOTE,
    ),
    *(
        made
        for eps, table in _MNIST_TABLE.items()
        for made in _sat_family(
            label=f"mnist-{eps}",
            threat={"eps": float(eps), "step_size": 0.02, "steps": 40},
            settings=_MNIST_RUN,
            methods=_MNIST_METHODS,
            source=_MNIST_SOURCE,
            published=table,
            notes=_MNIST_NOTES,
        )
    ),
    *(
        made
        for level, table in _IMAGENETTE_TABLE.items()
        for made in _sat_family(
            label=f"imagenette-{level}",
            threat={"eps": level / 255, "step_size": level / 4 / 255, "steps": 10},
            settings=_IMAGENETTE_RUN,
            methods=_IMAGENETTE_METHODS,
            source=_IMAGENETTE_SOURCE,
            published=table,
            notes=_IMAGENETTE_NOTES,
        )
    ),
]

# ISEAT ---------------------------------------------------------------------------------------------------------------

_ISEAT = "Li & Spratling 2023 (arXiv 2303.14077); code TreeLLi/Instance-adaptive-Smoothness-Enhanced-AT"
_ISEAT_SCHEDULE = Steps(0.0, ((100, 0.1),))

_iseat = [
    Preset(
        "iseat",
        "cifar10-wrn-34-10",
        {"smoothness": _ISEAT_SCHEDULE, "gamma": 7e-3, **LINF_8},
        _rice("cifar10", WRN),
        f"{_ISEAT}, command of its README",
        "",
        "The paper's number (AutoAttack 59.32) is one with further augmentation: see cifar10-wrn-34-10-idbh.",
    ),
    Preset(
        "iseat",
        "cifar10-wrn-34-10-idbh",
        {"smoothness": _ISEAT_SCHEDULE, "gamma": 7e-3, **LINF_8},
        _rice("cifar10", WRN, augment="idbh-weak"),
        f"{_ISEAT}; augmentation and average of Li & Spratling 2023 (IDBH), code TreeLLi/DA-Alone-Improves-AT",
        "AutoAttack 59.32, for an augmentation that is not named",
        "The augmentation and the average behind the number are not known: those of the same authors' IDBH for this "
        "network are our guess, and γ and λ are those without it.",
        changes={"average": EMA(0.999, "reestimate")},
    ),
    Preset(
        "iseat",
        "cifar10-preact-resnet18",
        {"smoothness": _ISEAT_SCHEDULE, "gamma": 7e-3, **LINF_8},
        _rice("cifar10", PRN),
        f"{_ISEAT}, defaults of its parser",
        "",
        "γ and λ for this network are not known: those of WRN-34-10.",
    ),
    Preset(
        "iseat",
        "cifar10-wrn-28-10-500k",
        {"smoothness": Steps(0.0, ((200, 0.1),)), "gamma": 7e-3, **LINF_8},
        _sgd(
            *("cifar10", WIDE_28),
            epochs=400,
            drops=((200, 0.1), (300, 0.01)),
            batch_size=256,
            extra_fraction=0.5,
        ),
        f"{_ISEAT}, --rst",
        "AutoAttack 61.55",
        "γ and λ for this setting are not known: those of WRN-34-10. The code counts 200 epochs of labelled images, "
        "which are 400 of both kinds.",
        needs=_500K,
    ),
]

# PGD-AT, TRADES, MART ------------------------------------------------------------------------------------------------

_RICE = "Rice et al. 2020 (arXiv 2002.11569); code locuslab/robust_overfitting"
_RICE_NOTE = "The code pads by reflection, and a further clean forward pass a step moves its BatchNorm statistics."
_IDBH = "Li & Spratling 2023 (IDBH); code TreeLLi/DA-Alone-Improves-AT"
_IDBH_START = {**TRAIN_MODE, "attack.start": Zero()}
_IDBH_AVERAGE = {**_IDBH_START, "average": EMA(0.999, "reestimate")}
_WARM_DECAY = "The decay of our average warms up over the first 10,000 steps."
_TRICKS = "Pang et al. 2021 (arXiv 2010.00467); code P2333/Bag-of-Tricks-for-AT"
_TRICKS_DROPS = ((100, 0.1), (105, 0.01))

_pgd_at = [
    Preset(
        "pgd_at",
        "fast-cifar10",
        {
            "eps": Ramp(0, 8 / 255, 0, 0.1),
            "steps": Steps(2, ((0.2, 4), (0.5, 7), (0.8, 10))),
            "step_size": Steps(5 / 255, ((0.2, 3 / 255), (0.5, 2 / 255))),
        },
        {
            **_sgd("cifar10", "resnet18", epochs=30, lr=0.2, schedule="one-cycle", nesterov=True),
            "patience": 8,
        },
        "ours: the parts of docs/speed.md put together, by the passes that they save",
        "",
        "Its 30 epochs have not been measured; two epochs at width 16 took about 0.58 of the time of ten steps "
        "throughout and lost nothing (docs/speed.md). The radius rises over the first tenth of the run; the "
        "attack has 2 steps at first and 10 in the last fifth, 37 % fewer passes than ten throughout; the run ends "
        "when eight epochs have brought no better checkpoint on the selection split.",
        changes={"average": EMA(0.995)},
    ),
    Preset(
        "pgd_at",
        "madry-cifar10-wrn-32-10",
        {**LINF_8},
        _sgd("cifar10", WRN, epochs=205, weight_decay=2e-4, drops=((0.5, 0.1), (0.75, 0.01))),
        "Madry et al. 2018 (arXiv 1706.06083); code MadryLab/cifar10_challenge",
        "clean 87.14, AutoAttack 44.04 (released weights)",
        f"{DEPTH} The code counts 80,000 steps, which are 204.8 epochs; the paper has 7 attack steps, the code 10.",
        changes=TRAIN_MODE,
    ),
    Preset(
        "pgd_at",
        "rice-cifar10-preact-resnet18",
        {**LINF_8},
        _rice("cifar10", PRN),
        _RICE,
        "best on test images: clean 82.92, PGD-10 53.49; last: clean 84.93, PGD-10 45.59; best on 1,000 held-out "
        "images: clean 81.31, PGD-10 53.27",
        _RICE_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "pgd_at",
        "rice-cifar10-wrn-34-10",
        {**LINF_8},
        _rice("cifar10", WRN),
        _RICE,
        "best on test images: clean 86.07, PGD-10 56.80; last: clean 86.88, PGD-10 48.56",
        _RICE_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "pgd_at",
        "rice-cifar10-wrn-34-20",
        {**LINF_8},
        _rice("cifar10", "wide_resnet_34_20"),
        _RICE,
        "clean 85.34, PGD-10 58.16, AutoAttack 53.42 (best on test images)",
        _RICE_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "pgd_at",
        "rice-cifar10-preact-resnet18-l2",
        {**L2_HALF},
        _rice("cifar10", PRN),
        _RICE,
        "clean 88.67, PGD-10 71.62, AutoAttack 67.68 (best on test images)",
        _RICE_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "pgd_at",
        "rice-cifar100-preact-resnet18",
        {**LINF_8},
        _rice("cifar100", PRN),
        _RICE,
        "best on test images: clean 52.69, PGD-10 28.15; last: clean 53.83, PGD-10 21.87",
        "The code rotates by up to 15 degrees too, which is left out here.",
        changes=TRAIN_MODE,
    ),
    Preset(
        "pgd_at",
        "rice-svhn-preact-resnet18",
        {"eps": 8 / 255, "step_size": 1 / 255, "steps": 10},
        _rice("svhn", PRN, lr=0.01, augment="none"),
        f"{_RICE}, step size of its logs (the script's default is 2/255)",
        "best on test images: clean 89.81, PGD-10 61.04; last: clean 89.70, PGD-10 54.30",
        "",
        changes=TRAIN_MODE,
    ),
    *(
        Preset(
            "pgd_at",
            f"bag-of-tricks-cifar10-{short}",
            {**LINF_8},
            _sgd("cifar10", model, epochs=110, drops=_TRICKS_DROPS),
            _TRICKS,
            "",
            "",
        )
        for short, model in (("resnet18", RN), ("wrn-34-10", WRN))
    ),
    Preset(
        "pgd_at",
        "gairat-cifar10-wrn-32-10",
        {**OLD_LINF},
        _GAIRAT_RUN,
        f"{_GAIRAT}, Table 1, the baseline with λ = ∞",
        "clean 86.92, PGD-20 51.96, PGD+ 51.28 (best of all epochs on test images, 5 runs)",
        DEPTH,
    ),
    Preset(
        "pgd_at",
        "idbh-strong-cifar10-preact-resnet18",
        {**LINF_8},
        _rice("cifar10", PRN, augment="idbh-strong"),
        _IDBH,
        "AutoAttack 50.74 ± 0.06, as others quote it",
        "",
        changes=_IDBH_START,
    ),
    Preset(
        "pgd_at",
        "idbh-weak-cifar10-preact-resnet18",
        {**LINF_8},
        _rice("cifar10", PRN, augment="idbh-weak"),
        _IDBH,
        "AutoAttack 51.73 ± 0.16, as others quote it",
        f"That the average for this network is the one of WRN-34-10 is our reading. {_WARM_DECAY}",
        changes=_IDBH_AVERAGE,
    ),
    Preset(
        "pgd_at",
        "idbh-weak-cifar10-wrn-34-10",
        {**LINF_8},
        _rice("cifar10", WRN, augment="idbh-weak"),
        f"{_IDBH}, command of its README",
        "",
        _WARM_DECAY,
        changes=_IDBH_AVERAGE,
    ),
]

_TRADES = "Zhang et al. 2019 (arXiv 1901.08573); code yaodongyu/TRADES"

_trades = [
    Preset(
        "trades",
        "cifar10-wrn-34-10",
        {"beta": 6.0, **OLD_LINF},
        _sgd("cifar10", WRN, epochs=76, weight_decay=2e-4, drops=((74, 0.1),)),
        _TRADES,
        "clean 84.92, PGD-20 56.61, AutoAttack 53.08 (last epoch, eps 0.031)",
    ),
    *(
        Preset(
            "trades",
            f"bag-of-tricks-cifar10-{short}",
            {"beta": 6.0, **LINF_8},
            _sgd("cifar10", model, epochs=110, drops=_TRICKS_DROPS),
            _TRICKS,
            published,
            "β is not stated in what we have: that of TRADES.",
        )
        for short, model, published in (
            ("wrn-34-10", WRN, "clean 85.48, AutoAttack 53.80"),
            ("wrn-34-20", "wide_resnet_34_20", "clean 86.43, AutoAttack 54.39"),
        )
    ),
    Preset(
        "trades",
        "rst-cifar10-wrn-28-10-500k",
        {"beta": 6.0, **OLD_LINF},
        _RST_RUN,
        "Carmon et al. 2019 (arXiv 1905.13736); code yaircarmon/semisup-adv",
        "clean 89.69, AutoAttack 59.53",
        _PER_EPOCH,
        needs=_500K,
    ),
    Preset(
        "trades",
        "wang-cifar10-wrn-28-10-1m",
        {"beta": 5.0, **LINF_8},
        _sgd(
            *("cifar10", WIDE_28),
            epochs=400,
            lr=0.2,
            batch_size=512,
            nesterov=True,
            schedule="cosine",
            decay_norm=False,
            label_smoothing=0.1,
            extra_fraction=0.7,
            selection=1024,
        ),
        "Wang et al. 2023 (arXiv 2302.04638); code wzekai99/DM-Improves-AT",
        "AutoAttack 63.35 ± 0.12, as others quote it",
        "The code's network has SiLU, here ReLU; its learning rate rises over the first 2.5 % of the run, here it "
        "begins at its highest; its average is a copy for as long, ours warms up. Biases do not decay here either.",
        changes={
            "attack.mode": "batch",
            "attack.start": Uniform(),
            "average": EMA(0.995, "copy"),
        },
        needs={"extra": "a million images of an EDM diffusion model"},
    ),
]

_MART = "Wang et al. 2020 (ICLR); code YisenWang/MART"
_MART_DROPS = ((74, 0.1), (89, 0.01), (99, 0.001))

_mart = [
    Preset(
        "mart",
        "cifar10-resnet18",
        {"beta": 5.0, **OLD_LINF},
        _sgd("cifar10", RN, epochs=120, lr=0.01, weight_decay=3.5e-3, drops=_MART_DROPS),
        _MART,
        "AutoAttack 47.5 in later papers",
        "Rate and weight decay are far from those of the other methods: its numbers do not compare with theirs.",
    ),
    Preset(
        "mart",
        "cifar10-wrn-34-10",
        {"beta": 6.0, **OLD_LINF},
        _sgd("cifar10", WRN, epochs=90, weight_decay=7e-4, drops=((74, 0.1), (89, 0.01))),
        f"{_MART}, its last version",
        "",
        "An earlier version of the script has 76 epochs and weight decay 2e-4.",
    ),
]

# FAT and MAIL --------------------------------------------------------------------------------------------------------

_FAT = "Zhang et al. 2020 (arXiv 2002.11242); code zjfheart/Friendly-Adversarial-Training"
_MAIL = "Liu et al. 2021 (MAIL); code QizhouWang/MAIL"
_MAIL_RUN = _sgd("cifar10", RN, epochs=120, lr=0.01, weight_decay=3.5e-3, drops=((75, 0.1), (90, 0.01), (100, 0.001)))
_MAIL_NOTE = (
    "The code goes on from a run without weights and stops after its 101st epoch, for which it reports AutoAttack on "
    "1,000 images; here it is one run of 120 epochs."
)

_friendly = [
    Preset(
        "fat",
        "cifar10-wrn-32-10",
        {"patience": Steps(0, ((50, 1), (90, 2))), **OLD_LINF},
        _sgd("cifar10", WRN, epochs=120, weight_decay=2e-4, drops=((59, 0.1), (89, 0.01), (109, 0.005))),
        _FAT,
        "clean 89.34, PGD-20 46.13, CW-30 46.82 (last epoch)",
        DEPTH,
    ),
    Preset(
        "fat_trades",
        "cifar10-wrn-34-10",
        {"patience": Steps(0, ((30, 1), (50, 2), (70, 3))), "beta": 6.0, **OLD_LINF},
        _sgd("cifar10", WRN, epochs=85, weight_decay=2e-4, drops=((74, 0.1),)),
        _FAT,
        "clean 86.60, PGD-20 55.98, CW-30 54.29",
    ),
    Preset(
        "fat_mart",
        "cifar10-wrn-34-10",
        {"patience": Steps(0, ((20, 1), (40, 2), (60, 3), (80, 4))), "beta": 6.0, **OLD_LINF},
        _sgd("cifar10", WRN, epochs=85, weight_decay=2e-4, drops=((59, 0.1),)),
        _FAT,
    ),
    Preset(
        "mail_at",
        "cifar10-resnet18",
        {"slope": 10.0, "bias": -0.5, "burn_in": 75, **OLD_LINF},
        _MAIL_RUN,
        _MAIL,
        "AutoAttack 44.2, as others quote it (44.9 for plain adversarial training)",
        _MAIL_NOTE,
    ),
    Preset(
        "mail_trades",
        "cifar10-resnet18",
        {"beta": 5.0, "slope": 2.0, "bias": 0.0, "burn_in": 75, **OLD_LINF},
        _MAIL_RUN,
        _MAIL,
        "AutoAttack 50.6, as others quote it (48.1 for TRADES)",
        f"{_MAIL_NOTE} β is the default of the code's parser.",
    ),
]

# Weight space --------------------------------------------------------------------------------------------------------

_AWP = "Wu et al. 2020 (arXiv 2004.05884); code csdongxian/AWP"
_AWP_NOTE = "The code attacks the first batch of each epoch in eval mode, by oversight, and pads by reflection."
_AFTER_TEN = Steps(0.0, ((9, 5e-3),))

_weights = [
    Preset(
        "at_awp",
        "cifar10-preact-resnet18",
        {"gamma": 1e-2, **LINF_8},
        _rice("cifar10", PRN),
        _AWP,
        "best on test images: clean 81.18, PGD-20 55.39; last: clean 81.65, PGD-20 54.30",
        _AWP_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "at_awp",
        "cifar10-wrn-34-10",
        {"gamma": 1e-2, **LINF_8},
        _rice("cifar10", WRN),
        _AWP,
        "clean 86.23, AutoAttack 53.97 (log; the table prints another clean accuracy)",
        _AWP_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "at_awp",
        "cifar10-preact-resnet18-l2",
        {"gamma": 1e-2, **L2_HALF},
        _rice("cifar10", PRN),
        _AWP,
        "clean 90.11, PGD-20 72.69, AutoAttack 70.31 (best on test images)",
        _AWP_NOTE,
        changes=TRAIN_MODE,
    ),
    Preset(
        "at_awp",
        "cifar100-preact-resnet18",
        {"gamma": 1e-2, **LINF_8},
        _rice("cifar100", PRN),
        _AWP,
        "clean 53.81, AutoAttack 25.34",
        "",
        changes=TRAIN_MODE,
    ),
    Preset(
        "at_awp",
        "svhn-preact-resnet18",
        {"gamma": Steps(0.0, ((5, 1e-2),)), "eps": 8 / 255, "step_size": 1 / 255, "steps": 10},
        _rice("svhn", PRN, lr=0.01, augment="none"),
        _AWP,
        "best on test images: clean 91.76, PGD-20 59.12; last: clean 93.00, PGD-20 57.15",
        "",
        changes=TRAIN_MODE,
    ),
    *(
        Preset(
            "trades_awp",
            f"{data}-wrn-34-10",
            {"beta": 6.0, "gamma": _AFTER_TEN, **LINF_8},
            _sgd(data, WRN, epochs=200, drops=((99, 0.1), (149, 0.01))),
            f"{_AWP}, script of TRADES-AWP",
            published,
            "Every epoch is saved; which one was evaluated is not stated.",
        )
        for data, published in (
            ("cifar10", "clean 85.36, AutoAttack 56.17"),
            ("cifar100", "clean 60.17, AutoAttack 28.80"),
        )
    ),
    Preset(
        "kd_swa",
        "cifar10-resnet18",
        {"standard_weight": 0.1, "robust_weight": 0.6, "temperature": 2.0, "begin": 55, **LINF_8},
        _sgd("cifar10", RN, epochs=200, drops=((50, 0.1), (150, 0.01)), selection=5000),
        "Chen et al. 2021 (ICLR); code VITA-Group/Alleviate-Robust-Overfitting",
        "",
        "",
        changes=TRAIN_MODE,
        needs={
            "standard": "weights of a ResNet-18 trained without an attack (instar train natural)",
            "robust": "weights of one trained with PGD-AT (instar train pgd_at)",
        },
    ),
]

# One step ------------------------------------------------------------------------------------------------------------

_PEAK = "The code's cycle has its peak at half of the run, `cyclic` at 40 %."
_WARM_EPS = Ramp(0.0, 8 / 255, 0.0, 5)
_N_FGSM = "de Jorge et al. 2022 (arXiv 2202.01181); official code"
_GRAD_ALIGN = "Andriushchenko & Flammarion 2020 (arXiv 2007.02617); code tml-epfl/understanding-fast-adv-training"
_WARM_NOTE = "Radius and step rise over the first five epochs; that the first of them has a fifth is our reading."

_single = [
    Preset(
        "fast_at",
        "cifar10-preact-resnet18",
        {"eps": 8 / 255, "step_size": 10 / 255},
        _sgd("cifar10", PRN, epochs=15, lr=0.2, schedule="cyclic"),
        "Wong et al. 2020 (arXiv 2001.03994); code locuslab/fast_adversarial",
        "clean 83.34, AutoAttack 43.21 (released weights)",
        f"{_PEAK} Early stopping on a batch of training images is left out.",
    ),
    Preset(
        "n_fgsm",
        "cifar10-preact-resnet18",
        {"noise": 2.0, "eps": 8 / 255, "step_size": 8 / 255},
        _sgd("cifar10", PRN, epochs=30, lr=0.2, schedule="cyclic"),
        _N_FGSM,
        "",
        _PEAK,
    ),
    Preset(
        "n_fgsm",
        "svhn-preact-resnet18",
        {"noise": 2.0, "eps": _WARM_EPS},
        _sgd("svhn", PRN, epochs=30, lr=0.05, schedule="cyclic", augment="none"),
        _N_FGSM,
        "",
        f"{_WARM_NOTE} The number of epochs is that of CIFAR-10.",
    ),
    Preset(
        "grad_align",
        "cifar10-preact-resnet18",
        {"alignment": 0.2, "eps": 8 / 255},
        _sgd("cifar10", PRN, epochs=30, lr=0.3, schedule="cyclic"),
        f"{_GRAD_ALIGN}, its script for CIFAR-10",
        "clean 79.84, AutoAttack 43.93 (RobustBench)",
        "Whether that number is of this command is not stated.",
    ),
    Preset(
        "grad_align",
        "svhn-preact-resnet18",
        {"alignment": 0.2, "eps": _WARM_EPS},
        _sgd("svhn", PRN, epochs=15, lr=0.05, schedule="cyclic", augment="none"),
        f"{_GRAD_ALIGN}, its script for SVHN",
        "",
        f"{_WARM_NOTE} λ follows the paper's rule at 8/255.",
    ),
    Preset(
        "free_at",
        "cifar10-wrn-32-10",
        {"replays": 8, "eps": 8 / 255, "step_size": 8 / 255},
        _sgd("cifar10", WRN, epochs=26, weight_decay=2e-4, drops=((0.5, 0.1), (0.75, 0.01))),
        "Shafahi et al. 2019 (arXiv 1904.12843); code ashafahi/free_adv_train",
        "",
        f"{DEPTH} The code counts 80,000 updates, 8 on each batch, which are 25.6 epochs.",
    ),
]


def _by_name(all_presets: list[Preset]) -> dict[str, dict[str, Preset]]:
    found: dict[str, dict[str, Preset]] = {}
    for made in all_presets:
        if made.name in found.setdefault(made.recipe, {}):
            raise ValueError(f"two presets of {made.recipe} are called {made.name}")
        found[made.recipe][made.name] = made
    return found


PRESETS: dict[str, dict[str, Preset]] = _by_name(
    [*_gairat, *_spat, *_sat, *_iseat, *_pgd_at, *_trades, *_mart, *_friendly, *_weights, *_single]
)
"""Every preset: name of the recipe → name of the preset → preset."""
