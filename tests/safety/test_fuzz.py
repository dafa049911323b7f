"""A short form of `benchmarks/fuzz.py`: some hundred mutated inputs for every reader."""

from __future__ import annotations

import pytest

from instar.errors import UserError
from tests.safety import targets
from tests.safety.fuzzing import WATCH, Target, fuzz, sprung

INPUTS = 300


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    found = targets.everything(folder)
    return {target.name: target for target in found}


NAMES = (
    *("expression", "configuration", "card of weights", "safetensors", "file of torch.save", "checkpoint"),
    *("instance table", "description of a run", "run for a report", "record", "IDX", "pickled CIFAR batch"),
    *("binary CIFAR batch", "MATLAB file", "PNG of rows", "picture", "JSON labels", "extra images"),
)


def test_every_reader_is_fuzzed(readers: dict[str, Target]) -> None:
    assert set(readers) == set(NAMES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs_are_read_or_refused_in_one_line(readers: dict[str, Target], name: str) -> None:
    outcome = fuzz(readers[name], inputs=INPUTS, seed=1)
    assert not outcome.crashes, outcome.crashes[0]
    assert outcome.refused  # the mutations reach the checks
    assert outcome.accepted + outcome.refused == INPUTS


@pytest.mark.parametrize("name", NAMES)
def test_sound_inputs_are_read(readers: dict[str, Target], name: str) -> None:
    hostile = targets.HOSTILE_SEEDS.get(name, 0)
    seeds = readers[name].seeds
    for content in seeds[: len(seeds) - hostile]:
        readers[name].read(content)
    for content in seeds[len(seeds) - hostile :]:
        WATCH.seen.clear()
        with pytest.raises(UserError):
            readers[name].read(content)
        assert not WATCH.seen


def test_a_crash_a_trap_and_a_long_message_are_noticed() -> None:
    def crashes(content: bytes) -> None:
        raise KeyError("x")

    def springs(content: bytes) -> None:
        sprung("by a test")

    def evaluates(content: bytes) -> None:
        eval("sprung()", {"sprung": str})

    for reader, expected in ((crashes, "KeyError"), (springs, "trap"), (evaluates, "exec of")):
        outcome = fuzz(Target("bad", (b"seed",), reader), inputs=3, seed=0)
        assert expected in outcome.crashes[0][1]
