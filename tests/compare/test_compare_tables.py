"""Tables in four formats from the same cells, and the command that prints them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.cli import main
from instar.compare import Comparison, compare
from instar.evaluate import Record

Make = Callable[..., Record]
RunFolder = Callable[..., Path]


@pytest.fixture
def found(make: Make) -> Comparison:
    strong = [1] * 120 + [0] * 80
    weak = [1] * 60 + [0] * 100 + [1] * 10 + [0] * 30
    records = [
        make({"clean": [1] * 200, "pgd_20": rows}, target=name, label=[place % 2 for place in range(200)])
        for name, rows in (("pgd_at", strong), ("50%", weak))
    ]
    return compare(records)


def test_markdown(found: Comparison) -> None:
    assert found.to_markdown() == (
        "| accuracy, % | clean | pgd-20 | worst case (95 %) | Δ worst case (95 %) | p |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| pgd_at | 100.0 | **60.0** | **60.0 (53.1–66.5)** | – | – |\n"
        "| 50% | 100.0 | 35.0 | 35.0 (28.7–41.8) | −25.0 (−32.5 to −17.6) | < 0.001 |\n"
        "\n"
        "| accuracy, % | worst class (95 %) | zero | one |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| pgd_at | zero 60.0 (48.8–70.2) | 60.0 | 60.0 |\n"
        "| 50% | zero 35.0 (25.3–46.2) | 35.0 | 35.0 |\n"
        "\n"
        "| images | won | lost | both right | both wrong | Δ (95 %) | p | p, Holm |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 50% against pgd_at | 10 | 60 | 60 | 70 | −25.0 (−32.5 to −17.6) | < 0.001 | < 0.001 |\n"
        "\n"
        "- Linf 8/255, first 200 test images of Digits (n = 200), checkpoint last.\n"
        "- Δ: minus pgd_at, in points, on the same images; Tango's interval and McNemar's mid-p test.\n"
        "- One run each: intervals and p-values cover the choice of test images, not the seed of training.\n"
        "- Bold: the best of a column, and all that it is not significantly better than (p ≥ 0.05).\n"
        "- The interval of the worst class is over all classes at once.\n"
    )


def test_latex_has_balanced_rows_and_no_bare_special_letters(found: Comparison) -> None:
    text = found.to_latex()
    for tabular in re.findall(r"\\begin\{tabular\}\{(.*?)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(tabular[0]) - 1}
    assert r"pgd\_at & 100.0 & \textbf{60.0}" in text
    assert r"50\% & 100.0 & 35.0 & 35.0 (28.7--41.8) & $-$25.0 ($-$32.5 to $-$17.6) & $<$ 0.001 \\" in text
    assert r"$\ell_\infty$ 8/255" in text
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    body = re.sub(r"\\label\{.*?\}|\$.*?\$", "", body)
    assert not re.search(r"(?<!\\)[%_#^~]", body)
    assert body.count(r"\begin{table}") == body.count(r"\end{table}") == 3
    assert body.isascii()


def test_json_holds_every_image_won_and_lost(found: Comparison) -> None:
    content = json.loads(found.to_json())
    item = next(entry for entry in content["differences"] if entry["column"] == "pgd_20")
    assert item["won_images"] == list(range(160, 170))
    assert item["lost_images"] == list(range(60, 120))
    assert (item["won"], item["lost"], item["both_right"], item["both_wrong"]) == (10, 60, 60, 70)
    assert content["n"] == 200
    scores = content["arms"][1]["scores"]
    assert scores["pgd_20"]["accuracy"] == 0.35
    assert content["arms"][0]["classes"]["one"]["count"] == 100


def test_text_lists_the_first_images_and_has_no_colours(found: Comparison) -> None:
    text = found.to_text()
    assert "\x1b" not in text
    assert "Bold" not in text
    assert "50% won against pgd_at: images 160, 161, 162" in text
    assert "50% lost against pgd_at: images 60, 61" in text
    assert "and 20 more." in text


def test_the_command_prints_and_writes_every_format(
    make: Make, run_folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"clean": [1, 1, 1, 0], "pgd": [1, 0, 1, 0]}
    a, b = run_folder("a", make(columns), recipe="mart"), run_folder("b", make(columns), recipe="fat")
    assert main(["compare", str(a), str(b), "--column", "pgd"]) == 0
    assert "Δ pgd (95 %)" in capsys.readouterr().out
    for ending, start in (("md", "| accuracy"), ("tex", "% Needs"), ("json", "{"), ("txt", "Accuracy")):
        out = tmp_path / f"table.{ending}"
        assert main(["compare", str(a), "--out", str(out), f"B={b}"]) == 0
        assert out.read_text(encoding="utf-8").startswith(start)
        assert capsys.readouterr().out == f"{out}\n"
    assert main(["compare", str(a), str(b), "--format", "md", "--out", str(tmp_path / "other.txt")]) == 0
    assert (tmp_path / "other.txt").read_text(encoding="utf-8").startswith("| accuracy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "html"], "unknown format 'html'"),
        (["--out", "nowhere/at/all.md"], "there is no folder"),
        (["--against", "last"], "unknown choice of against 'last'"),
        (["--columns", "pgd"], "Did you mean 'column'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, make: Make, run_folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"clean": [1, 1], "pgd": [1, 0]}
    a, b = run_folder("a", make(columns)), run_folder("b", make(columns), recipe="fat")
    assert main(["compare", str(a), str(b), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
