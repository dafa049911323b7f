"""The commands as a user types them: what they print, what they write, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import instar
from instar.cli import main

QUICK = ["--model", "small_cnn", "--width", "4", "--batch-size", "256", "--epochs", "1", "--steps", "2"]


def _fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail; returns its one line of complaint."""
    status = main(list(words))
    complaint = capsys.readouterr().err
    assert status == 2
    assert complaint.startswith("instar: ")
    assert complaint.count("\n") == 1
    return complaint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "gairat", "--data", "digits", "--out", str(folder), *QUICK]) == 0
    return folder


def test_training_writes_the_whole_configuration(run: Path) -> None:
    stored = json.loads((run / "run.json").read_text())
    assert stored["recipe"] == "gairat"
    assert instar.parse(stored["method"]).attack.steps == 2
    assert stored["threat"] == {"norm": "Linf", "eps": 0.2}
    assert stored["data"]["name"] == "digits"
    assert stored["versions"]["instar"] == instar.__version__
    assert stored["training"]["batch_size"] == 256
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"best.safetensors", "last.safetensors", "best.json"}


def test_a_run_loads_as_a_plain_module_with_its_normalisation_inside(run: Path) -> None:
    import torch

    from instar.data import TestSplit, batches, load

    model = instar.load(run)
    batch = next(
        batches(
            TestSplit(load("digits", split="test")), batch_size=360, epoch=0, seed=0, shuffle=False, drop_last=False
        )
    )
    with torch.no_grad():
        accuracy = (model(batch.x).argmax(1) == batch.y).float().mean()
    assert accuracy > 0.2  # far above the 0.1 of chance after five steps of training
    assert not model.training


def test_evaluating_a_run_prints_intervals_and_writes_records(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--suite", "quick", "--n", "40"]) == 0
    printed = capsys.readouterr().out
    assert "margin PGD-20" in printed
    assert "95 % Wilson" in printed
    record = json.loads((run / "evaluations" / "quick-best.json").read_text())
    assert record["protocol"]["n"] == 40
    assert 0 <= record["results"]["worst_case"]["accuracy"] <= record["results"]["clean"]["accuracy"] <= 1


def test_a_printed_configuration_makes_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "trades",
        "--data",
        "digits",
        *QUICK,
        "--beta",
        "3",
        "--eps",
        "4/255",
        "--set",
        "attack.mode=batch",
    ]
    assert main([*words, "--print-config"]) == 0
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    assert yaml.safe_load(config.read_text())["eps"] == "4/255"
    assert main([*words, "--out", str(tmp_path / "flags")]) == 0
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "yaml")]) == 0
    first, second = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("flags", "yaml"))
    assert first == second
    assert first["method"].startswith("Method(PGD(Linf(4/255), objective=KL(), steps=2, step_size=1/255")
    assert "mode='batch'" in first["method"]


def test_a_recipe_of_your_own_trains_from_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from instar import CrossEntropy, Evidence, Linf, Method, PGD, Signal, value\n"
        "@value\n"
        "class Sharp(Signal):\n"
        "    power: float = 2.0\n"
        "    @property\n"
        "    def needs(self): return frozenset({'adv'})\n"
        "    def __call__(self, evidence: Evidence): return CrossEntropy()(evidence) ** self.power\n"
        "def sharp(*, power: float = 2.0, eps: float = 8 / 255, steps: int = 10):\n"
        "    return Method(PGD(Linf(eps), steps=steps), Sharp(power))\n"
    )
    out = tmp_path / "run"
    assert main(["train", f"{mine}:sharp", "--power", "1.5", "--data", "digits", "--out", str(out), *QUICK]) == 0
    stored = json.loads((out / "run.json").read_text())
    assert "Sharp(1.5)" in stored["method"]
    assert stored["recipe"] == f"{mine}:sharp"
    assert (
        main(["train", f"{mine}:sharp", "--power", "1.5", "--data", "digits", "--out", str(out), *QUICK, "--resume"])
        == 0
    )
    assert main(["train", "--resume", "--trust", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "gairat", "--eps", "8"], "got 8. Did you mean 8/255?"),
        (["train", "gairt"], "unknown recipe 'gairt'. Did you mean 'gairat'"),
        (["train"], "which recipe?"),
        (["train", "gairat", "--epochz", "3"], "unknown flag 'epochz'. Did you mean 'epochs'?"),
        (["train", "gairat", "--epochs", "many"], "--epochs: expected int"),
        (["train", "gairat", "--epochs", "0"], "epochs must be at least 1; got 0"),
        (["train", "gairat", "--optimizer", "sdg"], "--optimizer: expected"),
        (["train", "gairat", "--set", "attack.epz=1"], "unknown field of PGD 'epz'"),
        (["train", "gairat", "--set", "attack.eps"], "--set takes PATH=VALUE"),
        (["train", "gairat", "--set", "attack.start=open('x')"], "unknown value 'open'"),
        (["train", "gairat", "--shift", "nan"], "got nan"),
        (["train", "gairat", "--weight", "tan"], "weight of GeometryWeight must be one of"),
        (["train", "gairat", "--steps", "1"], "steps must be at least 2; got 1"),
        (["train", "pgd_at", "--norm", "L2"], "eps is needed with norm L2"),
        (["train", "pgd_at", "--norm", "L7", "--eps", "0.1"], "unknown norm 'L7'"),
        (["train", "pgd_at", "--data", "cifra10"], "cifar10"),
        (["train", "pgd_at", "--model", "resnet81"], "unknown model 'resnet81'"),
        (["train", "pgd_at", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (["train", "pgd_at", "--batch-size", "100000"], "batch_size must be at most"),
        (["train", "pgd_at", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "no_such_file.py:method"], "there is no file no_such_file.py"),
        (["evaluate", "no/such/run"], "no/such/run"),
        (["train", "--resume"], "resume which run?"),
        (["train", "--resume", "--out", "nowhere"], "nowhere holds no run"),
        (["evaluate"], "evaluate what?"),
        (["explain", "gairt"], "unknown recipe"),
        (["data", "chek"], "unknown action"),
        (["data", "check", "nothing"], "nothing"),
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTAR_DATA", str(tmp_path / "data"))
    assert line in _fails(capsys, *words)
    assert not (tmp_path / "runs").exists()  # a refused run leaves nothing behind


def test_missing_data_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTAR_DATA", str(tmp_path))
    complaint = _fails(capsys, "train", "pgd_at", "--data", "cifar10", "--out", str(tmp_path / "run"))
    assert "instar data get cifar10" in complaint


def test_weights_of_another_architecture_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(run / "checkpoints" / "best.safetensors")
    words = ["train", "pgd_at", "--model", "preact_resnet18", "--width", "4", "--init", weights]
    complaint = _fails(capsys, *words, "--out", str(tmp_path / "new"))
    assert "best.safetensors" in complaint
    assert not (tmp_path / "new").exists()


def test_init_starts_from_trained_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "pgd_at", "--out", str(tmp_path / "new"), *QUICK, "--lr", "0"]
    assert main([*words, "--init", str(run / "checkpoints" / "last.safetensors")]) == 0
    assert "last.safetensors" in capsys.readouterr().out  # the report on what was taken


def test_a_place_that_cannot_be_written_to_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write into" in _fails(capsys, "train", "pgd_at", "--out", str(tmp_path / "file" / "run"), *QUICK)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from instar.cli import main; sys.exit(main())", *words]


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the middle in the same way."""
    out = tmp_path / "run"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = _command("train", "pgd_at", "--out", str(out), *QUICK)
    words[2] = f"import instar.saving; instar.saving.PATIENCE = 1.0; {words[2]}"  # a run waits minutes for a disk
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, check=False, timeout=200)
    assert done.returncode == 2
    assert "The run waits up to 1 s for it" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert json.loads((out / "run.json").read_text())["recipe"] == "pgd_at"
    assert not [p for p in out.rglob("*") if p.suffix == ".tmp"]


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "gairat", "--out", str(out), *QUICK, "--epochs", "2000"]
    child = subprocess.Popen(_command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 120
    while not (out / "log.jsonl").exists() and child.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    printed, complaint = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGINT
    assert re.search("saved at (the end of )?epoch", printed), "within an epoch of a few milliseconds, or at its end"
    assert "--resume" in printed
    assert complaint == ""
    assert (out / "checkpoints" / "state.safetensors").exists()


def test_explain_shows_equation_source_cost_and_expression(capsys: pytest.CaptureFixture[str]) -> None:
    for name, recipe in instar.RECIPES.items():
        assert main(["explain", name]) == 0
        printed = capsys.readouterr().out
        assert "Equation:" in printed
        assert "Source:" in printed
        if name == "kd_swa":
            assert "KD+SWA needs a teacher" in printed
            continue
        assert "forward units" in printed
        assert instar.parse(printed.strip().splitlines()[-1].strip()) == recipe()


def test_help_and_version_need_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: instar COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"instar {instar.__version__}\n"


def test_output_into_a_pipe_that_closes_is_no_error() -> None:
    code = "from instar.cli import main; import sys; sys.exit(main(['data', 'list']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    with child.stderr:
        assert child.stderr.read() == b""
    assert child.wait() == 141


def test_a_run_whose_radius_grew_is_evaluated_at_the_radius_it_grew_to(tmp_path: Path) -> None:
    out = tmp_path / "run"
    grows = ["--eps", "Ramp(0, 0.2, 0, 0.5)", "--steps", "Steps(1, ((0.5, 2),))", "--step_size", "0.1"]
    small = ["--data", "digits", "--model", "small_cnn", "--width", "4", "--epochs", "2", "--batch_size", "512"]
    assert main(["train", "pgd_at", *grows, *small, "--out", str(out)]) == 0
    assert json.loads((out / "run.json").read_text())["threat"] == {"norm": "Linf", "eps": 0.2}
    assert json.loads((out / "checkpoints" / "last.json").read_text())["threat"] == {"norm": "Linf", "eps": 0.2}
    assert main(["evaluate", str(out), "--suite", "quick", "--n", "20", "--checkpoint", "last"]) == 0
