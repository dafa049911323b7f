"""A method in a file outside of the package gets the training, the resume, the evaluation and the report for free."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "focal_at.py"
FLAGS = [
    "--data",
    "digits",
    "--epochs",
    "4",
    "--width",
    "4",
    "--batch_size",
    "256",
    "--steps",
    "2",
    "--precision",
    "float32",
    "--save_every",
    "0",
]


def _instar(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from instar.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_example_is_about_thirty_lines_of_code() -> None:
    text = re.sub(r'""".*?"""', "", EXAMPLE.read_text(), flags=re.DOTALL)
    assert len([line for line in text.splitlines() if line.strip()]) <= 30


def test_it_trains_resumes_evaluates_and_reports_from_the_command_line(tmp_path: Path) -> None:
    own = tmp_path / "my_file.py"
    own.write_text(EXAMPLE.read_text())
    words = ["train", "my_file.py:focal_at", *FLAGS, "--focus", "1", "--out"]
    assert _instar(*words, "whole", folder=tmp_path).returncode == 0
    code = "import sys; from instar.cli import main; sys.exit(main())"
    child = subprocess.Popen([sys.executable, "-c", code, *words, "parts"], cwd=tmp_path, stdout=subprocess.PIPE)
    log, give_up = tmp_path / "parts" / "log.jsonl", time.monotonic() + 120
    while not log.exists() and child.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    refused = _instar("train", "--resume", "--out", "parts", folder=tmp_path)
    assert refused.returncode == 2
    assert "instar train --resume --trust --out parts" in refused.stderr
    assert _instar("train", "--resume", "--trust", "--out", "parts", folder=tmp_path).returncode == 0
    a, b = (load_file(tmp_path / run / "checkpoints" / "last.safetensors") for run in ("whole", "parts"))
    assert all((a[key] == b[key]).all() for key in a)
    assert _instar("evaluate", "parts", "--suite", "quick", "--n", "20", folder=tmp_path).returncode == 0
    assert _instar("report", "parts", folder=tmp_path).returncode == 0
    assert list((tmp_path / "parts").rglob("*.png"))


def test_a_function_that_is_no_recipe_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("def nothing():\n    return 3\n")
    done = _instar("train", "other.py:nothing", "--out", "run", folder=tmp_path)
    assert done.returncode != 0
    assert "a recipe must return a Method" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["train my_file.py:focal_at --focs 1", "explain my_file.py:focal"])
def test_a_wrong_word_about_it_gets_one_line(word: str, tmp_path: Path) -> None:
    (tmp_path / "my_file.py").write_text(EXAMPLE.read_text())
    done = _instar(*word.split(), folder=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
