"""What a sweep consists of, what is refused before anything starts, and how runs are found again."""

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from instar.cli import main
from instar.cli.sweep import configuration
from instar.errors import UserError
from instar.sweep import Configuration, Evaluation, Member, choices, look, plan
from instar.sweep.grid import listed, method_words

TINY = ("--data", "digits", "--epochs", "2", "--width", "4")


def planned(words: Sequence[str]) -> Configuration:
    """A configuration that repeats its words, without reading them."""
    return Configuration(" ".join(words), {"seed": 0, "epochs": 2, "device": "auto"})


def members(folder: Path, evaluation: Evaluation | None = None, **flags: object) -> list[Member]:
    return plan(choices(flags, {}), out=folder, configure=planned, evaluation=evaluation)


def stored(member: Member, *, lines: int = 0, **changed: object) -> None:
    """The run folder of a member as training leaves it."""
    member.folder.mkdir(parents=True)
    run = {
        "recipe": member.recipe,
        "method": member.configuration.method,
        "training": {**member.configuration.training, **changed},
    }
    (member.folder / "run.json").write_text(json.dumps(run))
    text = "".join(json.dumps({"epoch": epoch, "seconds": 36.0 * (epoch + 1)}) + "\n" for epoch in range(lines))
    (member.folder / "log.jsonl").write_text(text)


def complaint(*words: str) -> str:
    """The one line with which the command refuses."""
    from contextlib import redirect_stderr

    said, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(printed):
        status = main(["sweep", *words])
    assert status == 2, printed.getvalue()
    assert said.getvalue().count("\n") == 1, said.getvalue()
    return said.getvalue()


def test_a_sweep_is_the_product_of_all_that_has_several_values() -> None:
    flags = {"recipes": "gairat,trades(beta=3)", "seeds": [0, 1, 2], "eps": ["4/255", "8/255"], "epochs": 3}
    found = choices(flags, {"attack.mode": "eval,train"})
    assert len(found) == 2 * 3 * 2 * 2
    assert len({(choice.words, choice.seed) for choice in found}) == len(found)
    assert found[-1].label == "trades(beta=3), eps 8/255, attack.mode train"
    expected = "--recipe trades --beta 3 --eps 8/255 --epochs 3 --set attack.mode=train"
    assert (" ".join(found[-1].words), found[-1].seed) == (expected, 2)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4/255,8/255", ["4/255", "8/255"]),
        ("((0.5, 0.1), (0.75, 0.01))", ["((0.5, 0.1), (0.75, 0.01))"]),
        ("AWP(5e-3), SAM(rho=0.1, norm='a,b')", ["AWP(5e-3)", "SAM(rho=0.1, norm='a,b')"]),
    ],
)
def test_commas_inside_of_brackets_and_quotes_separate_nothing(text: str, values: list[str]) -> None:
    assert listed(text) == values


@pytest.mark.parametrize("text", ["", "a,,b", "Ramp(0", "'a"])
def test_a_list_of_values_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        listed(text)


@pytest.mark.parametrize(
    "text", ["", "@x", "trades@", "trades(3)", "trades(beta=", "trades(**x)", "trades(beta=3) or 1"]
)
def test_a_method_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        method_words(text)


def test_a_configuration_is_what_train_would_run() -> None:
    found = configuration(["--recipe", "trades", "--beta", "3", "--eps", "0.1", *TINY])
    assert "3 * KL()" in found.method
    assert "Linf(0.1)" in found.method
    assert (found.training["epochs"], found.training["width"], found.training["seed"]) == (2, 4, 0)


def test_a_configuration_is_that_of_the_run_it_becomes(tmp_path: Path) -> None:
    from instar.runs import read_run
    from instar.sweep.plan import difference

    words = ["--recipe", "pgd_at", "--steps", "1", "--data", "digits", "--epochs", "1", "--width", "4"]
    assert main(["train", *words, "--batch_size", "512", "--out", str(tmp_path / "run")]) == 0
    run = read_run(tmp_path / "run")
    assert difference(run, "pgd_at", configuration([*words, "--batch_size", "512"])) == ""
    assert difference(run, "pgd_at", configuration([*words, "--batch_size", "256"])) == "its batch_size is 512, not 256"
    assert "its method is" in difference(run, "pgd_at", configuration([*words, "--batch_size", "512", "--eps", "0.3"]))
    assert "its recipe is" in difference(run, "trades", configuration([*words, "--batch_size", "512"]))


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--recipes", "gairt"], r"gairt: unknown recipe 'gairt'\. Did you mean 'gairat'"),
        (["--recipes", "pgd_at", "--epoch", "3"], r"unknown flag 'epoch'\. Did you mean 'epochs'"),
        (["--recipes", "pgd_at,trades", "--beta", "3"], r"pgd_at: unknown flag 'beta'"),
        (["--recipes", "pgd_at", "--eps", "0.1,8"], r"pgd_at, eps 8: .*eps of Linf must be in \[0, 1\]"),
        (["--recipes", "pgd_at", "--model", "resnet81"], r"unknown model 'resnet81'"),
        (["--recipes", "pgd_at@nowhere"], r"unknown preset of pgd_at 'nowhere'"),
        (["--recipes", "pgd_at", "--set", "attack.epss=1"], r"epss"),
        (["--recipes", "pgd_at", "--seeds", "0,x"], r"seeds are whole numbers"),
        (["--recipes", "pgd_at", "--seeds", "0,0"], r"--seed has a value twice"),
        (["--recipes", "pgd_at", "--eps", "0.1,1/10"], r"two runs of the sweep are the same"),
        (["--recipes", "pgd_at", "--suite", "quik"], r"unknown suite 'quik'\. Did you mean 'quick'"),
        (["--recipes", "pgd_at", "--n", "10"], r"an evaluation needs a suite"),
        (["--recipes", "pgd_at", "--suite", "quick", "--evaluate", "epss=1"], r"unknown flag of the evaluation 'epss'"),
        (["--recipes", "pgd_at", "--resume", "x"], r"--resume means nothing in a sweep"),
        (["--recipes", "pgd_at", "--scheduler", "ray"], r"unknown scheduler 'ray'"),
        (["--recipes", "pgd_at", "--jobs", "0"], r"jobs must be at least 1"),
        (["--seeds", "0,1"], r"a sweep needs methods"),
        (["--recipes"], r"--recipes needs a value"),
        (["nothing.yaml"], r"cannot read the sweep nothing\.yaml: there is no such file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_started(words: list[str], pattern: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    assert re.search(pattern, complaint(*words, "--out", str(out)))
    assert not out.exists()


def test_a_file_says_what_flags_say_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "recipes: [pgd_at, 'trades(beta=3)']\nseeds: [0, 1]\neps: [0.1, 8/255]\ndata: digits\nepochs: 5\nwidth: 4\n"
        "nesterov: false\nset: {attack.steps: [1, 2]}\nevaluate: {suite: quick, n: 20, batch_size: 10}\njobs: 2\n"
    )
    out = str(tmp_path / "out")
    assert main(["sweep", str(file), "--out", out, "--epochs", "2", "--eps", "0.1", "--dry-run"]) == 0
    from_file = capsys.readouterr().out
    flags = ["--recipes", "pgd_at,trades(beta=3)", "--seeds", "0,1", "--data", "digits", "--width", "4"]
    flags += ["--nesterov=false", "--set", "attack.steps=1,2", "--suite", "quick", "--n", "20"]
    flags += ["--evaluate", "batch_size=10", "--epochs", "2", "--eps", "0.1", "--out", out, "--dry-run"]
    assert main(["sweep", *flags]) == 0
    from_flags = capsys.readouterr().out

    def trained(text: str) -> list[list[str]]:
        return [sorted(line.split()) for line in text.splitlines() if "instar train" in line]

    assert len(trained(from_file)) == 8
    assert trained(from_file) == trained(from_flags)
    assert from_file.count("--suite quick --checkpoint best --n 20 --batch_size 10") == 8


def test_the_names_of_runs_are_distinct_and_can_be_folders(tmp_path: Path) -> None:
    found = members(tmp_path, recipes="a.py:mine,b.py:mine", seeds="0,1", eps="4/255,8/255", start="Uniform(),Zero()")
    names = [member.name for member in found]
    assert len(set(names)) == len(found) == 16
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


def test_a_larger_sweep_finds_the_runs_of_a_smaller_one_whatever_they_are_called(tmp_path: Path) -> None:
    (small,) = members(tmp_path, recipes="pgd_at", eps="0.1")
    assert small.name == "pgd_at-seed0"
    stored(small, lines=2)
    large = members(tmp_path, recipes="pgd_at,trades", seeds="0,1", eps="0.1,0.2")
    assert [member.name for member in large if look(member).complete] == ["pgd_at-seed0"]
    assert len({member.folder for member in large}) == 8


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (one,) = members(tmp_path, recipes="pgd_at")
    stored(one, lines=2, epochs=7)
    before = {file: file.read_bytes() for file in one.folder.iterdir()}
    with pytest.raises(UserError, match=r"holds another run: its epochs is 7, not 2\. Choose another --out"):
        members(tmp_path, recipes="pgd_at")
    assert {file: file.read_bytes() for file in one.folder.iterdir()} == before


def test_where_a_run_is_computed_makes_it_no_other_run(tmp_path: Path) -> None:
    (one,) = members(tmp_path, recipes="pgd_at")
    stored(one, lines=1, device="cuda")
    (again,) = members(tmp_path, recipes="pgd_at")
    assert (again.folder, len(look(again).lines), look(again).trained) == (one.folder, 1, False)


def test_runs_that_differ_in_the_device_alone_keep_their_own_folders(tmp_path: Path) -> None:
    def both() -> list[Member]:
        def configure(words: Sequence[str]) -> Configuration:
            return Configuration("", {"seed": 0, "epochs": 2, "device": words[words.index("--device") + 1]})

        return plan(choices({"recipes": "pgd_at", "device": "cuda,cpu"}, {}), out=tmp_path, configure=configure)

    for member in both():
        stored(member, lines=2)
    assert [member.name for member in both()] == ["pgd_at-device_cuda-seed0", "pgd_at-device_cpu-seed0"]


def test_training_is_complete_with_its_last_line_and_not_before(tmp_path: Path) -> None:
    for lines in range(3):
        (one,) = members(tmp_path / str(lines), recipes="pgd_at")
        stored(one, lines=lines)
        assert look(one).complete == (lines == 2)
        with_evaluation = dataclasses.replace(one, evaluation=Evaluation("quick", "best", {}))
        assert not look(with_evaluation).complete
