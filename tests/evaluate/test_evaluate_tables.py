from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instar.errors import UserError
from instar.evaluate import AutoAttack, Entry, Record, Score, fgsm, margin_pgd, pgd, table
from instar.evaluate.sanity import CHECKS, findings, judge
from instar.evaluate.shards import Outcome
from instar.evaluate.verdict import conclude
from instar.threat import Linf

ENTRIES = (
    fgsm(Linf(8 / 255)),
    pgd(Linf(8 / 255), steps=20),
    margin_pgd(Linf(8 / 255), steps=100),
    Entry("autoattack", "AutoAttack", AutoAttack(Linf(8 / 255))),
)


def outcomes(**robust: int) -> dict[str, Outcome]:
    """Of 1,000 points the first ones withstand each attack."""
    verdicts = {name: np.arange(1000) < count for name, count in robust.items()}
    return {name: Outcome(column, np.full(1000, -1, np.int8)) for name, column in verdicts.items()}


@pytest.mark.parametrize(
    ("name", "robust", "verdicts"),
    [
        ("PGD-AT", {"fgsm": 570, "pgd_20": 513, "margin_pgd_100": 497, "autoattack": 476}, ["normal"] * 3),
        ("TRADES", {"fgsm": 570, "pgd_20": 528, "margin_pgd_100": 504, "autoattack": 494}, ["normal"] * 3),
        ("MART", {"fgsm": 590, "pgd_20": 540, "margin_pgd_100": 494, "autoattack": 475}, ["suspect", "high", "normal"]),
        (
            "GAIRAT",
            {"fgsm": 600, "pgd_20": 545, "margin_pgd_100": 380, "autoattack": 330},
            ["suspect", "suspect", "normal"],
        ),
        (
            "masked",
            {"fgsm": 300, "pgd_20": 500, "margin_pgd_100": 490, "autoattack": 470},
            ["normal"] * 2 + ["suspect"],
        ),
    ],
)
def test_published_numbers_get_the_verdicts_that_hindsight_gave_them(
    name: str, robust: dict[str, int], verdicts: list[str]
) -> None:
    found = findings(ENTRIES, outcomes(**robust))
    by_check = {finding.check: finding for finding in found}
    checks = ("pgd_minus_autoattack", "pgd_minus_margin", "iterative_minus_single_step")
    assert [by_check[check].verdict for check in checks] == verdicts
    assert set(by_check) == {"headline", *checks, "single_step_minus_iterative"}
    gap = by_check["pgd_minus_autoattack"]
    assert gap.value == pytest.approx((robust["pgd_20"] - robust["autoattack"]) / 1000)
    word = {"PGD-AT": "sound", "TRADES": "sound", "MART": "suspect", "GAIRAT": "suspect"}.get(name, "overestimated")
    assert conclude(found).word == word
    if name == "GAIRAT":
        assert "likely overestimated by PGD-20" in gap.text


def test_a_value_at_a_threshold_is_on_the_lower_side() -> None:
    assert [judge(value, normal=0.1, suspect=0.2) for value in (0.1, 0.2, 0.21)] == ["normal", "high", "suspect"]


def record(checkpoint: str, robust: int, **more: Any) -> Record:
    protocol = {
        "key": f"{checkpoint}{robust}",
        "norm": "Linf",
        "eps": "8/255",
        "images": "first 1000 of the 10000 official test images of CIFAR-10",
        "seed": 0,
        "precision": "float32",
        "bn_mode": "eval",
        "checkpoint": {"rule": f"the {checkpoint} one", "epoch": 3},
    }
    scores = {
        "clean": Score("clean", 800, 1000),
        "pgd_20": Score("PGD-20", robust, 1000),
        "worst_case": Score("worst case", robust, 1000),
    }
    run = {"seconds": {"clean": 1.0, "pgd_20": 60.0}, "reused": []}
    return Record("runs/a", "mine", checkpoint, protocol, scores, run=run, **more)


def test_best_and_last_stand_side_by_side_in_markdown() -> None:
    text = table.markdown([record("best", 431), record("last", 400)])
    assert text == (
        "| accuracy, % | best | last |\n"
        "| --- | ---: | ---: |\n"
        "| clean | 80.0 (77.4–82.4) | 80.0 (77.4–82.4) |\n"
        "| PGD-20 | 43.1 (40.1–46.2) | 40.0 (37.0–43.1) |\n"
        "| worst case | 43.1 (40.1–46.2) | 40.0 (37.0–43.1) |\n"
        "\n"
        "- Linf 8/255, first 1000 of the 10000 official test images of CIFAR-10, suite mine, seed 0, float32, "
        "BatchNorm eval; robust if no iterate is misclassified.\n"
        "- best: the best one, epoch 4.\n"
        "- last: the last one, epoch 4.\n"
        "- Percent with 95 % Wilson intervals; 2 min 2 s of computing.\n"
        f"- Verdict on best: untested: this suite makes none of the {len(CHECKS)} checks (more: --suite sanity).\n"
        f"- Verdict on last: untested: this suite makes none of the {len(CHECKS)} checks (more: --suite sanity).\n"
    )


def test_the_plain_table_holds_the_same_cells_without_colours() -> None:
    text = table.plain([record("best", 431), record("last", 400)])
    assert "\x1b" not in text
    for cell in ("runs/a", "PGD-20", "43.1 (40.1–46.2)", "40.0 (37.0–43.1)", "best: the best one, epoch 4."):
        assert cell in text


def test_columns_that_a_record_lacks_are_dashes_and_the_worst_case_is_last() -> None:
    short = record("best", 431)
    scores = {name: score for name, score in short.scores.items() if name != "pgd_20"}
    more = {**scores, "fgsm": Score("FGSM", 500, 1000)}
    cells = table.rows([short, replace(short, scores=more)])
    assert [title for title, _ in cells] == ["clean", "PGD-20", "FGSM", "worst case"]
    assert cells[1][1] == ["43.1 (40.1–46.2)", "–"]


def test_what_is_suspect_and_what_was_reused_is_said_below_the_table() -> None:
    found = findings(ENTRIES, outcomes(fgsm=600, pgd_20=545, margin_pgd_100=380, autoattack=330))
    shown = record("best", 431, findings=found)
    shown = replace(shown, run={**shown.run, "reused": ["pgd_20"]})
    lines = table.caption([shown, replace(shown, checkpoint="last")])
    assert any(line.startswith("best, suspect: PGD-20 minus AutoAttack is 21.5 ± 2.5 points") for line in lines)
    assert any("reused from an earlier run: pgd_20" in line for line in lines)
    assert lines[-3] == "last: the best one, epoch 4; the same weights as best."
    assert lines[-1] == "Verdict on best: suspect, 4 of 15 checks made (more: --suite sanity)."
    whole = table.caption([replace(shown, suite="sanity")])
    assert whole[-1] == "Verdict on best: suspect, 4 of 15 checks made."


def test_columns_beside_the_threat_model_are_named_and_diagnoses_are_no_accuracies() -> None:
    shown = record("best", 431)
    scores = {**shown.scores, "far": Score("PGD at 1.0", 0, 1000), "no_gradient": Score("no gradient", 990, 1000)}
    attacks = {"pgd_20": {}, "far": {"counts": False}, "no_gradient": {"counts": False, "diagnosis": True}}
    shown = replace(shown, scores=scores, protocol={**shown.protocol, "attacks": attacks})
    assert [title for title, _ in table.rows([shown])] == ["clean", "PGD-20", "PGD at 1.0", "worst case"]
    assert "best: not in the worst case, because outside of the threat model: PGD at 1.0." in table.caption([shown])


def test_headings_tell_records_apart() -> None:
    best = record("best", 431)
    assert table.headings([best, record("last", 400)]) == ["best", "last"]
    assert table.headings([best, replace(best, suite="other")]) == ["mine, best", "other, best"]
    assert table.headings([best, replace(best, target="runs/b")]) == ["runs/a: mine, best", "runs/b: mine, best"]
    assert table.headings([best, best]) == ["1: runs/a: mine, best", "2: runs/a: mine, best"]


def test_no_record_is_one_line() -> None:
    with pytest.raises(UserError, match="no record"):
        table.render([])
