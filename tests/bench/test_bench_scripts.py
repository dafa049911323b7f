"""The scripts of ``benchmarks/`` about speed, small."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--model=small_cnn", "--data=digits", "--width=4"]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_growth_names_every_point_and_leaves_out_what_failed() -> None:
    growth = _script("growth")
    found = json.loads((ROOT / "docs" / "results" / "speed" / "growth" / "growth.json").read_text())
    found["points"]["width"]["128"] = {"failed": "too little memory"}
    found["points"]["loader"] = {"128": {"failed": "too little memory"}}
    axes = {one.get_label(): one for one in growth.draw(found).axes}
    assert len(axes) == 10
    words = [label.get_text() for label in axes["rows memory"].get_xticklabels()]
    assert words == ["10k", "100k", "1M", "5M"]
    assert [label.get_text() for label in axes["width time"].get_xticklabels()] == ["16", "32", "64"]
    seconds = [found["points"]["batch"][size]["seconds_an_image"] for size in ("32", "1024")]
    drawn = axes["batch time"].lines[0].get_ydata()
    assert [float(drawn[0]), float(drawn[-1])] == [1e3 * each for each in seconds]


def test_the_official_style_is_timed_with_the_allocator_as_its_users_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = _script("official_apart")
    seen: list[tuple[str, bool]] = []

    def here(command: list[str], *, env: dict[str, str], **_: object) -> object:
        case = json.loads(command[-1].removeprefix("--child="))
        seen.append((case["style"], "MALLOC_ARENA_TEST" in env))
        capsys.readouterr()
        apart.main(command[2:])
        return type("Done", (), {"stdout": capsys.readouterr().out})()

    monkeypatch.delenv("MALLOC_ARENA_TEST", raising=False)
    monkeypatch.setattr(apart.subprocess, "run", here)
    words = [*SMALL, "--batch-size=8", "--turns=2", "--steps=1", "--recipes=pgd_at", f"--out={tmp_path}"]
    found = apart.main(words)
    assert seen == [("instar", False), ("official", True)] * 2
    assert json.loads((tmp_path / "official_apart_w4.json").read_text()) == found
    ours, theirs = found["seconds"]["pgd_at"], found["seconds"]["pgd_at, official style"]
    assert found["times_as_fast"]["pgd_at"]["highest"] == max(b / a for a, b in zip(ours, theirs, strict=True))


def test_runs_with_and_without_half_precision_are_judged_alike_and_made_once(tmp_path: Path) -> None:
    precision = _script("precision")
    words = [*SMALL, "--epochs=1", "--seeds=2", "--suite=quick", "--n=20", f"--out={tmp_path}"]
    found = precision.main(words)
    assert [(row["seed"], row["arm"]) for row in found["rows"]] == [(s, arm) for s in (0, 1) for arm in precision.ARMS]
    pairs = [found["rows"][k]["clean"] - found["rows"][k + 1]["clean"] for k in (0, 2)]
    assert found["difference"]["clean"]["each"] == pairs
    assert found["difference"]["clean"]["points"] == pytest.approx(sum(pairs) / 2)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.safetensors")}
    assert len(stamps) == 4
    assert precision.main(words) == found
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.safetensors")}
