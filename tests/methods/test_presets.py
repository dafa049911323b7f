"""The presets hold the tables of the papers, build, and give way to what the user says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from instar.config import Settings, build_method, learning_rate
from instar.data.catalogue import CATALOGUE
from instar.data.indexed import resized
from instar.errors import UserError
from instar.method import Method
from instar.methods import RECIPES
from instar.models import registry
from instar.presets import PRESETS, TIMES, Preset, apply, changes_of, preset
from instar.schedules import Progress, Ramp, Scaled, Schedule, Steps, resolve

EVERY = [made for presets in PRESETS.values() for made in presets.values()]
every_preset = pytest.mark.parametrize("made", EVERY, ids=lambda made: f"{made.recipe}/{made.name}")


def built(made: Preset, tmp_path: Path, **given: Any) -> tuple[Method, Settings]:
    """Method and settings of a preset; what only the user can give is an empty file."""
    gift = tmp_path / "given"
    gift.touch()
    accepted = RECIPES[made.recipe].__kwdefaults__ or {}
    needed = {name: str(gift) for name in made.needs}
    arguments = {name: path for name, path in needed.items() if name in accepted}
    fields = {name: path for name, path in needed.items() if name not in accepted}
    arguments, fields = apply(made, arguments, fields | given)
    settings = Settings(**fields)
    info = CATALOGUE[settings.data]
    if settings.size is not None:
        info = resized(info, settings.size)
    changes = changes_of(made, given)
    return build_method(RECIPES[made.recipe], arguments, info=info, settings=settings, changes=changes), settings


def times(item: Any) -> list[float]:
    """The times in a schedule."""
    if isinstance(item, Steps):
        return [when for when, _ in item.changes]
    if isinstance(item, Ramp):
        return [item.begin, item.end]
    return times(item.schedule) if isinstance(item, Scaled) else []


def rates(made: Preset, **given: Any) -> list[float]:
    """The learning rate at the beginning of every epoch."""
    needed = {name: "file" for name in made.needs}
    _, fields = apply(made, needed, given)
    settings = Settings(**fields)
    updates = settings.epochs * 7
    return [learning_rate(settings, update=7 * epoch, updates=updates) for epoch in range(settings.epochs)]


@every_preset
def test_a_preset_builds_its_method_in_every_epoch(made: Preset, tmp_path: Path) -> None:
    method, settings = built(made, tmp_path)
    assert registry.canonical(settings.model or "") == settings.model
    for epoch in range(settings.epochs):
        now = method.at(Progress(epoch, settings.epochs))
        assert resolve(now, Progress(0, 1)) is now  # no schedule is left
    assert (method.average is not None) == ("average" in made.changes or made.recipe == "kd_swa")


@every_preset
def test_every_time_of_a_preset_lies_in_its_run(made: Preset) -> None:
    epochs = made.settings["epochs"]
    found = [t for item in made.arguments.values() if isinstance(item, Schedule) for t in times(item)]
    found += [when for when, _ in made.settings.get("drops", ())]
    found += [made.arguments[name] for name in TIMES if name in made.arguments]
    assert all(0 <= when < epochs for when in found), found


@every_preset
def test_a_preset_names_its_source_and_itself(made: Preset) -> None:
    assert PRESETS[made.recipe][made.name] is made
    assert preset(made.recipe, made.name) is made
    assert made.source
    assert "\n" not in made.source + made.published + made.unknown
    assert made.settings["data"] in made.name or made.settings["data"] == "imagenette"
    if made.recipe in ("h_sat", "gair_trades"):
        assert made.unknown.startswith("A reconstruction")


# Rates by epoch as the codes print them. Where they count from 1, so does the table.
FROM_ONE = {
    ("gairat", "cifar10-wrn-32-10"): {
        1: 0.1,
        59: 0.1,
        60: 0.01,
        89: 0.01,
        90: 0.001,
        109: 0.001,
        110: 0.0005,
        120: 0.0005,
    },
    ("gairat", "cifar10-resnet18"): {29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 100: 0.001},
    ("gair_trades", "cifar10-wrn-34-10"): {74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001, 100: 0.001},
    ("spat", "cifar10-wrn-34-10"): {1: 0.1, 74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001, 100: 0.001},
    ("fat", "cifar10-wrn-32-10"): {59: 0.1, 60: 0.01, 90: 0.001, 110: 0.0005, 120: 0.0005},
    ("fat_trades", "cifar10-wrn-34-10"): {74: 0.1, 75: 0.01, 85: 0.01},
    ("fat_mart", "cifar10-wrn-34-10"): {59: 0.1, 60: 0.01, 85: 0.01},
    ("trades", "cifar10-wrn-34-10"): {74: 0.1, 75: 0.01, 76: 0.01},
    ("mart", "cifar10-resnet18"): {74: 0.01, 75: 1e-3, 90: 1e-4, 99: 1e-4, 100: 1e-5, 120: 1e-5},
    ("mart", "cifar10-wrn-34-10"): {74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001},
    ("trades_awp", "cifar10-wrn-34-10"): {99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 200: 0.001},
}
FROM_ZERO = {
    ("pgd_at", "rice-cifar10-preact-resnet18"): {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001},
    ("pgd_at", "rice-svhn-preact-resnet18"): {99: 0.01, 100: 0.001, 150: 1e-4},
    ("pgd_at", "bag-of-tricks-cifar10-resnet18"): {99: 0.1, 100: 0.01, 104: 0.01, 105: 0.001, 109: 0.001},
    ("pgd_at", "madry-cifar10-wrn-32-10"): {102: 0.1, 103: 0.01, 153: 0.01, 154: 0.001},
    ("p_sat", "cifar10-preact-resnet18"): {39: 0.05, 40: 0.005, 60: 5e-4, 80: 5e-5, 99: 5e-5},
    ("p_sat", "mnist-0.3"): {39: 0.01, 40: 0.001, 49: 0.001, 50: 1e-4, 60: 1e-5, 69: 1e-5},
    ("iseat", "cifar10-wrn-34-10"): {99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001},
    ("mail_at", "cifar10-resnet18"): {74: 0.01, 75: 0.001, 90: 1e-4, 100: 1e-5},
    ("kd_swa", "cifar10-resnet18"): {49: 0.1, 50: 0.01, 149: 0.01, 150: 0.001},
}


@pytest.mark.parametrize(
    ("recipe", "name", "table", "first"),
    [(*key, table, 1) for key, table in FROM_ONE.items()] + [(*key, table, 0) for key, table in FROM_ZERO.items()],
    ids=str,
)
def test_the_learning_rate_of_an_epoch_is_the_published_one(
    recipe: str, name: str, table: dict[int, float], first: int
) -> None:
    found = rates(preset(recipe, name))
    assert {epoch: pytest.approx(found[epoch - first]) for epoch in table} == table
    assert len(set(found)) <= len(set(table.values()))  # and there is no further drop


def values(made: Preset, argument: str) -> list[float]:
    """An argument of a preset in every epoch of its run."""
    epochs = made.settings["epochs"]
    return [made.arguments[argument](Progress(epoch, epochs)) for epoch in range(epochs)]


def test_schedules_change_in_the_epochs_of_the_codes() -> None:
    assert values(preset("fat", "cifar10-wrn-32-10"), "patience") == [0] * 50 + [1] * 40 + [2] * 30
    assert values(preset("gair_fat", "cifar10-wrn-32-10"), "patience") == [0] * 40 + [3] * 30 + [6] * 50
    assert values(preset("fat_trades", "cifar10-wrn-34-10"), "patience") == [0] * 30 + [1] * 20 + [2] * 20 + [3] * 15
    assert values(preset("iseat", "cifar10-wrn-34-10"), "smoothness") == [0.0] * 100 + [0.1] * 100
    assert values(preset("trades_awp", "cifar10-wrn-34-10"), "gamma") == [0.0] * 9 + [5e-3] * 191
    curriculum = values(preset("p_sat", "cifar10-wrn-34-10"), "bound")
    assert curriculum == pytest.approx([0.0] * 30 + [0.01 * k for k in range(1, 41)] + [0.4] * 30)
    for eps in ("0.3", "0.45"):
        stairs = values(preset("p_sat", f"mnist-{eps}"), "bound")
        assert stairs == [0.0] * 30 + [1 / 3] * 15 + [2 / 3] * 15 + [1.0] * 10


@pytest.mark.parametrize(
    ("name", "last"), [("mnist-0.3", 30), ("sat-cifar10-preact-resnet18", 80), ("imagenette-16", 80)]
)
def test_the_bound_of_dynamic_at_falls_by_the_rule_of_the_code(name: str, last: int) -> None:
    found = values(preset("dynamic_at", name), "bound")
    assert found == pytest.approx([max(0.0, 0.5 * (1 - epoch / last)) for epoch in range(len(found))], abs=1e-12)


@pytest.mark.parametrize(("name", "first"), [("cifar10-wrn-32-10", 60), ("cifar10-resnet18", 30)])
def test_gairat_begins_to_weigh_in_the_epoch_of_its_first_drop(name: str, first: int, tmp_path: Path) -> None:
    method, settings = built(preset("gairat", name), tmp_path)
    shifts = [method.at(Progress(e, settings.epochs)).loss.left.shift for e in range(settings.epochs)]
    assert shifts == [math.inf] * (first - 1) + [-1.0] * (settings.epochs - first + 1)
    before = [rate == settings.lr for rate in rates(preset("gairat", name))]
    assert before == [math.isinf(shift) for shift in shifts]


def test_the_two_rows_of_the_mnist_table_differ_in_the_radius_alone() -> None:
    for recipe in ("pgd_at", "trades", "dynamic_at", "h_sat", "p_sat"):
        near, far = preset(recipe, "mnist-0.3"), preset(recipe, "mnist-0.45")
        assert (near.arguments["eps"], far.arguments["eps"]) == (0.3, 0.45)
        assert {**near.arguments, "eps": 0.45} == far.arguments
        assert near.settings == far.settings
        assert near.published != far.published
        assert (near.settings["model"], near.settings["selection"], near.arguments["steps"]) == ("sat_cnn", 6000, 40)


def test_a_beta_that_its_code_divides_by_the_classes_is_a_tenth_here() -> None:
    assert preset("trades", "mnist-0.3").arguments["beta"] == 200 / 10
    assert preset("trades", "sat-cifar10-preact-resnet18").arguments["beta"] == 15 / 10


def test_what_the_user_gives_wins_and_none_is_not_given() -> None:
    made = preset("gairat", "cifar10-wrn-32-10")
    arguments, settings = apply(made, {"shift": 0.0, "eps": None}, {"seed": 3, "weight_decay": 5e-4})
    assert arguments == {**made.arguments, "shift": 0.0}
    assert settings == {**made.settings, "seed": 3, "weight_decay": 5e-4}
    assert made.arguments["shift"] == -1.0  # the preset itself stays as it is


@pytest.mark.parametrize(
    ("recipe", "name"), [("gairat", "cifar10-wrn-32-10"), ("p_sat", "mnist-0.3"), ("dynamic_at", "imagenette-16")]
)
def test_a_run_of_another_length_is_the_published_one_in_small(recipe: str, name: str, tmp_path: Path) -> None:
    made = preset(recipe, name)
    epochs = made.settings["epochs"]
    long = rates(made)
    twice = rates(made, epochs=2 * epochs)
    assert twice[::2] == pytest.approx(long)
    assert twice[1::2] == pytest.approx(long)
    method, _ = built(made, tmp_path)
    slow, _ = built(made, tmp_path, epochs=2 * epochs)
    if recipe != "dynamic_at":  # a line has steps of its own on the longer run
        for epoch in range(epochs):
            assert slow.at(Progress(2 * epoch, 2 * epochs)) == method.at(Progress(epoch, epochs))
    tenth, _ = built(made, tmp_path, epochs=max(epochs // 10, 2))
    assert resolve(tenth, Progress(1, max(epochs // 10, 2))) is not tenth


def test_the_same_number_of_epochs_leaves_the_published_ones_as_written() -> None:
    made = preset("gairat", "cifar10-wrn-32-10")
    assert apply(made, {}, {"epochs": 120}) == (made.arguments, made.settings)


def test_another_norm_does_not_inherit_the_radius() -> None:
    arguments, _ = apply(preset("trades", "cifar10-wrn-34-10"), {"norm": "L2"}, {})
    assert {"eps", "step_size"} & set(arguments) == set()
    arguments, _ = apply(preset("trades", "cifar10-wrn-34-10"), {"norm": "L2", "eps": 0.5, "step_size": 0.1}, {})
    assert (arguments["eps"], arguments["step_size"]) == (0.5, 0.1)
    arguments, _ = apply(preset("pgd_at", "rice-cifar10-preact-resnet18-l2"), {"norm": "L2"}, {})
    assert arguments["eps"] == 128 / 255


@pytest.mark.parametrize(
    ("recipe", "name", "message"),
    [
        ("gair_rst", "cifar10-wrn-28-10-500k", "needs --extra, the 500,000 pseudo-labelled TinyImages"),
        ("kd_swa", "cifar10-resnet18", "needs --standard, weights of a ResNet-18 trained without an attack"),
    ],
)
def test_what_only_the_user_has_is_asked_for_in_one_line(recipe: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply(preset(recipe, name), {}, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_average_of_the_users_own_takes_the_place_of_the_published_one(tmp_path: Path) -> None:
    made = preset("pgd_at", "idbh-weak-cifar10-wrn-34-10")
    published, _ = built(made, tmp_path)
    assert (published.average.decay, published.average.batch_norm) == (0.999, "reestimate")
    own, _ = built(made, tmp_path, ema=0.99)
    assert own.average.decay == 0.99
    assert own.attack.mode == "train"


@pytest.mark.parametrize(
    ("recipe", "name", "known"),
    [("gairat", "cifar10-wrn", "cifar10-wrn-32-10"), ("natural", "cifar10", "none"), ("file.py:own", "x", "none")],
)
def test_an_unknown_name_gets_one_line_with_the_known_ones(recipe: str, name: str, known: str) -> None:
    with pytest.raises(UserError) as caught:
        preset(recipe, name)
    assert f"unknown preset of {recipe} {name!r}" in str(caught.value)
    assert known in str(caught.value)
    assert "\n" not in str(caught.value)
