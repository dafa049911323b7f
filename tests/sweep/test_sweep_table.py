"""The table of a sweep: what counts as done, means over seeds, errors in one line."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest

from instar.sweep import Evaluation, choices, look, plan, write
from instar.sweep.plan import Configuration, Member
from instar.sweep.state import answers, error_of
from instar.sweep.table import groups, rows

EVALUATION = Evaluation("mine", "best", {"n": 4})
RIGHT = {0: ([1, 1, 1, 0], [1, 0, 0, 0]), 1: ([1, 1, 1, 1], [1, 1, 1, 0]), 2: ([1, 1, 0, 0], [1, 1, 0, 0])}


def members(out: Path, evaluation: Evaluation | None = EVALUATION) -> list[Member]:
    found = choices({"recipes": "pgd_at", "seeds": "0,1,2", "eps": "0.1,0.2"}, {})
    return plan(
        found,
        out=out,
        configure=lambda words: Configuration(" ".join(words), {"seed": 0, "epochs": 2}),
        evaluation=evaluation,
    )


def trained(member: Member, *, lines: int = 2, weights: str = "w") -> None:
    (member.folder / "checkpoints").mkdir(parents=True)
    run = {
        "recipe": "pgd_at",
        "method": member.configuration.method,
        "training": dict(member.configuration.training),
    }
    (member.folder / "run.json").write_text(json.dumps(run))
    robust = [0.5, 0.25]
    log = [
        {"epoch": e, "seconds": 1800.0 * (e + 1), "selection_clean": 0.9, "selection_robust": robust[e]}
        for e in range(lines)
    ]
    (member.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (member.folder / "checkpoints" / "best.json").write_text(json.dumps({"sha256": weights}))


def evaluated(member: Member, *, weights: str = "w") -> None:
    import numpy as np

    from instar.evaluate import Record, Score

    clean, pgd = RIGHT[member.seed]
    protocol = {
        "norm": "Linf",
        "eps": "0.1",
        "eps_value": 0.1,
        "key": "k",
        "n": 4,
        "images": "first 4 of the 360 official test images of digits",
        "seed": 0,
        "precision": "float32",
        "weights_sha256": weights,
        "attacks": {"pgd": {"title": "PGD-10", "expression": "PGD()"}},
        "data": {"name": "digits", "title": "digits"},
        "model": {"architecture": "small_cnn"},
        "reference_autoattack": False,
    }
    scores = {
        "clean": Score("clean", sum(clean), 4),
        "pgd": Score("PGD-10", sum(pgd), 4),
        "worst_case": Score("worst case", sum(pgd), 4),
    }
    instances = {"index": np.arange(4), "clean": np.array(clean, np.uint8), "pgd": np.array(pgd, np.uint8)}
    Record("run", "mine", "best", protocol, scores, (), instances, {"seconds": {"pgd": 3600.0}}).write(
        member.folder / "evaluations"
    )


def test_a_group_is_the_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    found = members(tmp_path)
    for member in found:
        trained(member)
        evaluated(member)
    first, second = groups(write(found, tmp_path))
    robust = [sum(pgd) / 4 for _, pgd in RIGHT.values()]
    assert first.values["worst_case"] == (statistics.fmean(robust), statistics.stdev(robust))
    assert first.values["clean"] == (0.75, 0.25)
    word = look(found[0]).records["best"].verdict.word
    assert (first.label, second.label) == ("pgd_at, eps 0.1", "pgd_at, eps 0.2")
    assert (first.seeds, first.verdict) == ((0, 1, 2), f"3 {word}")
    assert first.hours == pytest.approx(3 * (1.0 + 1.0))
    text = (tmp_path / "results.md").read_text()
    assert "| accuracy, % | seeds | clean | PGD-10 | worst case | verdict | hours |" in text
    assert f"| pgd_at, eps 0.1 | 3 | 75.0 ± 25.0 | 50.0 ± 25.0 | 50.0 ± 25.0 | 3 {word} | 6.00 |" in text
    assert f"| pgd_at-eps_0.1-seed1 | done | 100.0 | 75.0 | 75.0 | {word} | 2.00 |" in text


def test_the_three_files_say_the_same(tmp_path: Path) -> None:
    found = members(tmp_path)
    for member in found[:4]:
        trained(member)
        evaluated(member)
    shown = write(found, tmp_path)
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    content = json.loads((tmp_path / "results.json").read_text())
    assert [line["run"] for line in table] == [run["run"] for run in content["runs"]] == [r.member.name for r in shown]
    for line, run in zip(table, content["runs"], strict=True):
        values = {name: float(line[name]) for name in content["columns"] if line[name]}
        assert values == run["accuracy"]
        assert (line["eps"], line["status"], int(line["seed"])) == (run["eps"], run["status"], run["seed"])
    assert [(g["of"], g["seeds"]) for g in content["groups"]] == [(3, [0, 1, 2]), (3, [0])]
    assert "1 of 3" in (tmp_path / "results.md").read_text()


def test_an_evaluation_of_other_weights_or_images_does_not_count(tmp_path: Path) -> None:
    one, *_ = members(tmp_path)
    trained(one)
    evaluated(one, weights="others")
    assert not look(one).complete
    evaluated(one)
    assert look(one).complete
    protocol = look(one).records["best"].protocol
    assert answers(protocol, EVALUATION)
    assert not answers(protocol, Evaluation("mine", "best", {"n": 5}))
    assert not answers(protocol, Evaluation("mine", "best", {}))
    assert answers(protocol, Evaluation("mine", "best", {}, whole=False))
    assert answers(protocol, Evaluation("mine", "best", {"n": 4, "eps": "1/10"}))
    for other in ({"eps": "8/255"}, {"norm": "L2"}, {"seed": "1"}, {"precision": "bf16"}):
        assert not answers(protocol, Evaluation("mine", "best", {"n": 4, **other})), other
    all_of_them = {**protocol, "n": 360, "images": "all 360 official test images of digits"}
    assert answers(all_of_them, Evaluation("mine", "best", {}))
    assert answers(all_of_them, Evaluation("mine", "best", {"n": 1000}))
    assert not answers(all_of_them, Evaluation("mine", "best", {"n": 100}))


def test_a_damaged_record_is_asked_for_again(tmp_path: Path) -> None:
    one, *_ = members(tmp_path)
    trained(one)
    evaluated(one)
    path = one.folder / "evaluations" / "mine-best.json"
    path.write_bytes(path.read_bytes()[:100])
    assert look(one).trained
    assert not look(one).complete


def test_without_an_evaluation_the_table_shows_what_training_measured(tmp_path: Path) -> None:
    found = members(tmp_path, None)
    for member in found:
        trained(member)
    first, _ = groups(write(found, tmp_path))
    assert first.values["selection_robust"] == (0.5, 0.0)  # of the best epoch, which is the first
    text = (tmp_path / "results.md").read_text()
    assert "| accuracy, % | seeds | held-out clean | held-out robust | verdict | hours |" in text
    assert "no test image was looked at" in text


def test_what_is_not_done_says_how_far_it_is_or_why_it_failed(tmp_path: Path) -> None:
    found = members(tmp_path)
    trained(found[0])
    trained(found[1], lines=1)
    trained(found[2], lines=1)
    found[2].log.parent.mkdir()
    found[2].log.write_text("$ instar train\nTraceback\ninstar: note: a note\ninstar: the loss became nan\n")
    (found[3].folder).mkdir()
    (found[3].folder / "run.json").write_text("{}")
    (found[3].folder / "log.jsonl").write_text("no JSON\n")
    said = [row.status for row in rows(found)]
    assert said[:3] == ["trained, not evaluated", "epoch 1 of 2", "failed: the loss became nan"]
    assert said[3].startswith("failed: cannot read the log")
    assert said[4:] == ["not begun", "not begun"]
    assert error_of(found[1].log) == ""
