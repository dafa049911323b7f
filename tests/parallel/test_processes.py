"""The number of processes, and of pieces that a batch is treated in, changes no result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from instar.instances import read_instances
from instar.methods import RECIPES
from instar.models import create, save

WORKER = Path(__file__).with_name("worker.py")
LIMIT = 1e-9
"""Largest difference of any weight, average, momentum, or shared tensor; what is measured is about 1e-14."""

pytestmark = pytest.mark.timeout(1200)  # some 300 runs: a minute of one core, and waiting on a busy machine

SPECIAL = ("ranks within ranks", "gradients aligned and ranked")
ESTIMATORS = {f"h_sat by {name}": {"estimator": name, "bound": 0.5} for name in ("power", "gauss_newton")}
NETWORKS = ("group", "batch")
SHARDED = ("pgd_at", "trades", "at_awp", "trades_awp", "mart_awp", "at_sam", "gairat", "fat", "gair_rst", "kd_swa")
"""What is trained in shards here, from weights in place and stop rules to teachers; `benchmarks/equal_weights.py
--shard full` trains all that can be."""

GUARDED: dict[str, dict[str, Any]] = {
    "unguarded": {},
    "clipped": {"clip_grad": 0.05},
    "skipped": {"on_nan": "skip"},
    "rolled back": {"on_nan": "rollback"},
}


def _all_cases(teacher: str) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    given = {"kd_swa": {"robust": teacher, "begin": 0.0}}
    for norm in NETWORKS:
        for name in (*RECIPES, *SPECIAL):
            cases[f"{name}, {norm}"] = {"recipe": name, "norm": norm, "arguments": given.get(name, {})}
    for name, arguments in ESTIMATORS.items():
        cases[f"{name}, group"] = {"recipe": "h_sat", "norm": "group", "arguments": arguments}
    attack = "batch statistics in an attack that stops"
    cases[attack] = {"recipe": attack, "norm": "batch"}
    for name in (*RECIPES, *SPECIAL):
        pieces = {"recipe": name, "norm": "group", "arguments": given.get(name, {})}
        cases[f"{name} in pieces"] = pieces | {"settings": {"accumulate": 3}, "processes": [1]}
        if name in ("gairat", "iseat", "free_at", *SPECIAL):
            cases[f"{name} in pieces and processes"] = pieces | {"settings": {"accumulate": 2}, "processes": [4]}
    for name in ESTIMATORS:
        cases[f"{name} in pieces"] = cases[f"{name}, group"] | {"settings": {"accumulate": 2}, "processes": [1]}
    settings: dict[str, dict[str, Any]] = {
        "mixed": {"mix": "cutmix", "augment": "standard"},
        "augmented": {"augment": "idbh-weak"},
        "adamw": {"optimizer": "adamw", "lr": 1e-3},
        "frozen": {"batch_norm": "frozen"},
        "local": {"batch_norm": "local"},
        "folded": {"fold": True},
    }
    for name, chosen in settings.items():
        cases[f"gairat, {name}"] = {"recipe": "gairat", "norm": "batch", "settings": chosen}
    for name in ("gairat", "iseat", "free_at"):  # begun by four, gone on with by two, ended by one
        for count, more in ((4, {"interrupt": 1}), (2, {"resume": True, "interrupt": 2}), (1, {"resume": True})):
            settings_ = {"settings": {"epochs": 2}, "norm": "batch", "recipe": name}
            cases[f"{name} by {count}"] = settings_ | more | {"out": f"{name}-by-many", "processes": [count]}
        cases[f"{name} by the same"] = {"recipe": name, "norm": "batch", "settings": {"epochs": 2}, "processes": [1]}
    for name in (*SHARDED, "averaged"):
        for norm in ("batch",) if name == "averaged" else NETWORKS if name in ("pgd_at", "trades_awp") else ("group",):
            one = {"recipe": name, "norm": norm, "arguments": given.get(name, {})}
            counts = [2, 4] if name in ("averaged", "trades_awp") else [2]
            cases |= {} if f"{name}, {norm}" in cases else {f"{name}, {norm}": one | {"processes": [1]}}
            more = {"settings": {"shard": "full"}, "processes": counts}
            cases[f"{name}, {norm}, in shards"] = one | more
    cases["pgd_at, group, in shards"]["weigh"] = cases["pgd_at, group"]["weigh"] = True
    for name in ("pgd_at, group", "trades, batch", "trades_awp, group"):
        cases[name]["count"] = True
    shards = {"shard": "full"}
    cases["trades_awp in shards and pieces"] = {
        "recipe": "trades_awp", "norm": "group", "settings": shards | {"accumulate": 2}, "processes": [2],
    }  # fmt: skip
    cases["adamw in shards"] = cases["gairat, adamw"] | {
        "settings": settings["adamw"] | shards, "processes": [2],
    }  # fmt: skip
    for name, chosen in GUARDED.items():
        guarded: dict[str, Any] = {"recipe": "averaged", "norm": "batch"}
        guarded |= {} if name in ("clipped", "unguarded") else {"poison": [1, 0]}
        cases[f"{name}, one"] = guarded | {"settings": chosen | {"epochs": 2}, "processes": [1]}
        cases[f"{name}, in shards"] = guarded | {"settings": chosen | shards | {"epochs": 2}, "processes": [2]}
    cases["iseat in shards"] = {"recipe": "iseat", "norm": "group", "settings": shards, "processes": [2]}
    averaged = {"recipe": "averaged", "norm": "batch"}
    cases["averaged by the same"] = averaged | {"settings": {"epochs": 2}, "processes": [1]}
    for count, more in ((4, shards), (2, {}), (1, shards)):  # begun in shards by four, without by two, ended by one
        ended: dict[str, Any] = {"interrupt": 1 if count == 4 else 2} if count > 1 else {}
        cases[f"averaged by {count}"] = averaged | ended | {
            "settings": {"epochs": 2} | more, "processes": [count], "resume": count < 4, "out": "averaged-by-many",
        }  # fmt: skip
    for part, more in ((1, {"interrupt": 1}), (2, {"resume": True})):  # by two, and by two again
        chosen = {"recipe": "iseat", "norm": "batch", "out": "iseat-by-two", "processes": [2]}
        cases[f"iseat, part {part}"] = chosen | more
    return cases


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by four, two and one processes: ``COUNT/CASE`` is a run's folder."""
    base = tmp_path_factory.mktemp("processes")
    teacher = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    save(teacher, base / "teacher.safetensors", {})
    (base / "cases.json").write_text(json.dumps(_all_cases(str(base / "teacher.safetensors"))))
    counts = ("4", "2", "1")
    for count in counts:
        (base / count).mkdir()
    command = [sys.executable, str(WORKER), str(base / "cases.json"), str(base), *counts]
    with subprocess.Popen(command, start_new_session=True) as running:
        try:
            status = running.wait()
        finally:  # a test that runs out of time leaves nobody behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    traces = [path.read_text() for path in sorted(base.rglob("*.traceback"))]
    assert status == 0, "\n".join(traces)
    return base


def _difference(first: Path, second: Path) -> tuple[float, str]:
    """The largest difference of any tensor of two runs, with its name; tables and selected epochs must be equal."""
    a, b = (load_file(folder / "checkpoints" / "state.safetensors") for folder in (first, second))
    probed = "shared.guard.sights"  # the probe's history, which runs in shards have none of
    if b.keys() != a.keys():
        assert "in shards" in second.name
        assert b.keys() == a.keys() - {probed}
        del a[probed]
    assert any(name.startswith("model.") for name in a)
    found = {name: float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel()}
    for one, other in zip(*(sorted((run / "instances").iterdir()) for run in (first, second)), strict=True):
        rows, others = read_instances(one), read_instances(other)
        assert all((rows[key] == others[key]).all() for key in ("seen", "kappa", "correct"))
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (first, second)]
    for one, other in zip(*logs, strict=True):
        assert {key: one[key] for key in one if key.startswith("selection")} == {
            key: other[key] for key in other if key.startswith("selection")
        }
    worst = max(found, key=lambda name: found[name])
    return found[worst], worst


@pytest.mark.parametrize("norm", NETWORKS)
@pytest.mark.parametrize("name", [*RECIPES, *SPECIAL])
def test_one_two_and_four_processes_train_the_same_network(name: str, norm: str, trained: Path) -> None:
    case = f"{name}, {norm}"
    for count in ("2", "4"):
        difference, where = _difference(trained / "1" / case, trained / count / case)
        assert difference < LIMIT, (count, where)
    seen = read_instances(trained / "4" / case / "instances" / "epoch_000.npz")["seen"]
    assert (seen == 0).sum() == 36, "every process's rows are in the table"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("trades_awp", "trades"),
        ("at_sam", "pgd_at"),
        ("p_sat", "pgd_at"),
        ("h_sat", "pgd_at"),
        ("dynamic_at", "pgd_at"),
        ("fgsm_sat", "fgsm_at"),
        ("gairat", "pgd_at"),
        ("mail_trades", "trades"),
        ("fat", "pgd_at"),
    ],
)
def test_what_is_compared_is_the_method_and_not_its_limit(name: str, limit: str, trained: Path) -> None:
    runs = [load_file(trained / "1" / f"{who}, group" / "checkpoints" / "state.safetensors") for who in (name, limit)]
    weights = "model.blocks.0.conv.weight"
    assert float((runs[0][weights] - runs[1][weights]).abs().max()) > 1e-7


@pytest.mark.parametrize("case", [f"{name}, group" for name in ESTIMATORS])
def test_curvatures_of_the_whole_batch_are_those_of_one_process(case: str, trained: Path) -> None:
    for count in ("2", "4"):
        assert _difference(trained / "1" / case, trained / count / case)[0] < LIMIT


@pytest.mark.parametrize("name", ["mixed", "augmented", "adamw", "frozen", "folded"])
def test_settings_that_draw_random_numbers_or_keep_other_state_divide_too(name: str, trained: Path) -> None:
    case = f"gairat, {name}"
    for count in ("2", "4"):
        assert _difference(trained / "1" / case, trained / count / case)[0] < LIMIT


def test_an_attack_in_train_mode_that_stops_early_neither_hangs_nor_differs(trained: Path) -> None:
    case = "batch statistics in an attack that stops"
    for count in ("2", "4"):
        assert _difference(trained / "1" / case, trained / count / case)[0] < LIMIT
    state = load_file(trained / "4" / case / "checkpoints" / "state.safetensors")
    kappa = read_instances(trained / "4" / case / "instances" / "epoch_000.npz")
    assert state["model.blocks.0.norm.num_batches_tracked"] > 2, "the attack's forward passes update the statistics"
    assert kappa["kappa"].max() > 0


def test_frozen_statistics_stay_and_those_of_shares_differ(trained: Path) -> None:
    frozen = load_file(trained / "2" / "gairat, frozen" / "checkpoints" / "state.safetensors")
    assert not frozen["model.blocks.0.norm.running_mean"].any()
    one, two = (trained / count / "gairat, local" for count in ("1", "2"))
    assert _difference(trained / "1" / "gairat, batch", one)[0] == 0, "one process's share is the whole batch"
    assert _difference(one, two)[0] > 1e-6


@pytest.mark.parametrize("name", [*RECIPES, *SPECIAL])
def test_pieces_of_a_batch_give_the_weights_of_the_batch(name: str, trained: Path) -> None:
    difference, where = _difference(trained / "1" / f"{name}, group", trained / "1" / f"{name} in pieces")
    assert difference < LIMIT, where


@pytest.mark.parametrize("name", ["gairat", "iseat", "free_at", *SPECIAL])
def test_pieces_and_processes_together_give_the_weights_of_the_batch(name: str, trained: Path) -> None:
    difference, where = _difference(trained / "1" / f"{name}, group", trained / "4" / f"{name} in pieces and processes")
    assert difference < LIMIT, where


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_curvature_of_the_whole_batch_in_pieces_is_refused_in_one_line(name: str, trained: Path) -> None:
    message = (trained / "1" / f"{name} in pieces.0.error").read_text()
    assert "looks at the whole batch at every step of the attack" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["gairat", "iseat", "free_at"])
def test_the_number_of_processes_may_change_at_every_resume(name: str, trained: Path) -> None:
    assert _difference(trained / "1" / f"{name} by the same", trained / f"{name}-by-many")[0] < LIMIT


@pytest.mark.parametrize("case", [f"{name}, group" for name in SHARDED] + ["trades_awp, batch", "averaged, batch"])
def test_weights_in_shards_become_those_of_one_process(case: str, trained: Path) -> None:
    for count in ("2", "4") if case.startswith(("averaged", "trades_awp")) else ("2",):
        difference, where = _difference(trained / "1" / case, trained / count / f"{case}, in shards")
        assert difference < LIMIT, (count, where)
    for kind in ("best", "last"):  # files that know nothing of shards
        ours, theirs = (
            load_file(folder / "checkpoints" / f"{kind}.safetensors")
            for folder in (trained / "2" / f"{case}, in shards", trained / "1" / case)
        )
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name].double() - theirs[name]).abs().max()) for name in ours) < LIMIT


def test_each_of_two_processes_holds_half_of_weights_gradients_and_momentum(trained: Path) -> None:
    whole = json.loads((trained / "1" / "pgd_at, group.0.memory").read_text())
    assert whole["weights"] == whole["gradients"] == whole["momentum"] > 0
    for rank in (0, 1):
        half = json.loads((trained / "2" / f"pgd_at, group, in shards.{rank}.memory").read_text())
        assert half == {kind: count / 2 for kind, count in whole.items()}


def test_a_step_exchanges_the_gradients_once_in_one_message_the_rows_in_one_and_a_number(trained: Path) -> None:
    weights = json.loads((trained / "1" / "pgd_at, group.0.memory").read_text())["weights"]
    rows, number = ["all_gather", 9 * 5 * 8], ["all_reduce", 8]  # index, seen, kappa, loss, correct of nine instances
    found = {
        name: json.loads((trained / "2" / f"{name}.0.messages").read_text())
        for name in ("pgd_at, group", "trades, batch", "trades_awp, group")
    }
    assert found["pgd_at, group"] == [["all_reduce", weights], rows, number], "the attack exchanges nothing"
    assert found["trades_awp, group"] == [["all_reduce", weights + 8], ["all_reduce", weights], rows, number]
    # Two layers of 4 and 6 channels, clean and adversarial, forward and backward: three numbers a channel and process.
    statistics = found["trades, batch"][:-3]
    assert sorted(statistics) == [["all_reduce", 2 * 3 * 8 * width] for width in (4, 6) for _ in range(4)]
    assert found["trades, batch"][-3:] == [["all_reduce", weights], rows, number]


def test_shards_take_pieces_and_other_optimisers_too(trained: Path) -> None:
    for case, base in (("trades_awp in shards and pieces", "trades_awp, group"), ("adamw in shards", "gairat, adamw")):
        difference, where = _difference(trained / "1" / base, trained / "2" / case)
        assert difference < LIMIT, where


@pytest.mark.parametrize("name", GUARDED)
def test_guards_do_in_shards_what_they_do_in_one_process(name: str, trained: Path) -> None:
    one, shards = trained / "1" / f"{name}, one", trained / "2" / f"{name}, in shards"
    assert _difference(one, shards)[0] < LIMIT
    if name != "unguarded":  # the guard was needed
        weights = "model.blocks.0.conv.weight"
        free, guarded = (
            load_file(trained / "1" / f"{who}, one" / "checkpoints" / "state.safetensors")[weights]
            for who in ("unguarded", name)
        )
        assert float((free - guarded).abs().max()) > 1e-7


def test_a_run_may_be_taken_into_shards_and_out_of_them_at_every_resume(trained: Path) -> None:
    assert _difference(trained / "1" / "averaged by the same", trained / "averaged-by-many")[0] < LIMIT


def test_a_method_that_cannot_be_sharded_says_so_in_one_line_and_writes_nothing(trained: Path) -> None:
    messages = {(trained / "2" / f"iseat in shards.{rank}.error").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "needs weights with and without AWP at the same time" in messages.pop()
    assert not (trained / "2" / "iseat in shards").exists()


def test_two_processes_resume_bit_for_bit_what_two_processes_began(trained: Path) -> None:
    assert _difference(trained / "2" / "iseat, batch", trained / "iseat-by-two")[0] == 0


def test_only_one_process_writes(trained: Path) -> None:
    names = {path.name for path in (trained / "4" / "gairat, group").rglob("*") if path.is_file()}
    assert json.loads((trained / "4" / "gairat, group" / "run.json").read_text())["hardware"]["processes"] == 4
    assert names == {
        *(f"{name}.{kind}" for name in ("best", "last") for kind in ("json", "safetensors")),
        *("run.json", "log.jsonl", "state.safetensors", "epoch_000.npz"),
    }
