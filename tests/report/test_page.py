"""The HTML report: whole, valid, escaped, and honest about what is missing."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import io
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from report_runs import HOSTILE, train_on

from instar import UserError
from instar.cli import main
from instar.cli.report import run as report
from instar.evaluate.record import Record
from instar.evaluate.sanity import Finding
from instar.evaluate.symptoms import NOTHING_LEFT
from instar.report import read
from instar.report.page import render, write_page
from instar.report.page.assemble import build
from instar.report.page.evaluations import differences_by_run
from instar.report.page.numbers import has_parquet
from instar.report.page.summary import _verdict

COUNTS = {"clean": 160, "pgd_20": 90, "autoattack": 60, "worst_case": 60}
COLUMNS = {"pgd_20": "PGD-20", "autoattack": "AutoAttack"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Document(html.parser.HTMLParser):
    """A page as a list of elements; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def payloads(text: str) -> list[dict[str, Any]]:
    return [json.loads(found) for found in re.findall(r'class="payload">(.*?)</script>', text, re.DOTALL)]


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    (path,) = write_page([trained], tmp_path_factory.mktemp("page") / "page.html", examples=12)
    return path.read_text(encoding="utf-8")


def test_every_tag_is_closed_and_every_id_is_unique_and_every_reference_leads_somewhere(page: str) -> None:
    document = Document(page)
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) > 40
    assert sorted(set(ids)) == sorted(ids)
    targets = [a["href"][1:] for a in document.all("a") + document.all("use") if a.get("href", "").startswith("#")]
    targets += re.findall(r"url\(#([^)]+)\)", page)
    targets += [word for _, a in document.elements for word in a.get("aria-labelledby", "").split()]
    assert len(targets) > 20
    assert set(targets) <= set(ids)
    assert document.elements[0] == ("html", {"lang": "en"})
    assert [name for name, _ in document.elements].count("h1") == 1


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    document = Document(page)
    for _, attributes in document.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "background"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "@import" not in page
    styles = "".join(attributes.get("style", "") for _, attributes in document.elements)
    assert re.findall(r"url\((?!#)", styles) == []
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}
    (policy,) = (meta["content"] for meta in document.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data: blob:")


def test_names_that_would_do_harm_are_shown_as_they_are_and_do_none(page: str) -> None:
    document = Document(page)
    for name in HOSTILE:
        assert any(name in words for words in document.words), name
    assert document.all("img")
    assert all(
        image["src"].startswith(("data:image/webp;base64,", "data:image/png;base64,")) for image in document.all("img")
    )
    assert not any(attribute.startswith("on") for _, attributes in document.elements for attribute in attributes)
    kinds = [script.get("type", "") for script in document.all("script")]
    assert kinds == ["application/json", "application/json", "", "text/plain", "text/plain"]
    assert len(document.all("style")) == 1
    words = [column["words"] for column in payloads(page)[0]["columns"] if column["title"] == "class"]
    assert words == [sorted(HOSTILE)]


def test_a_hostile_recipe_and_note_do_no_harm(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    bad = "</script><script>alert(3)</script>"
    model = {"name": bad, "arguments": {"width": 8}}
    folder = new_run(tmp_path / "run", recipe=f"x.py:{bad}", method=bad, model=model, precision=bad)
    with_text = write_page([folder], tmp_path / "page.html")[0].read_text(encoding="utf-8")
    assert len(Document(with_text).all("script")) == 1
    assert "<script>alert(3)" not in with_text


def test_every_picture_says_what_it_shows(page: str) -> None:
    document = Document(page)
    assert all(image["alt"].strip() for image in document.all("img"))
    drawn = document.all("svg")
    assert len(drawn) >= 8
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in drawn)
    curve = next(svg["aria-label"] for svg in drawn if svg["aria-label"].startswith("Robust accuracy."))
    assert re.search(
        r"held-out robust: PGD-AT: from \d+\.\d %? to \d+\.\d %?", curve.replace("\N{NO-BREAK SPACE}", " ")
    )


def test_every_button_and_field_has_a_name_and_every_table_a_caption_or_a_label(page: str) -> None:
    tables = re.findall(r"<table[^>]*>.*?</table>", page, re.DOTALL)
    assert len(tables) >= 6
    assert all("<caption" in table or "aria-labelledby" in table for table in tables)
    regions = [a for _, a in Document(page).elements if a.get("role") == "region"]
    assert regions
    assert all(region.get("aria-label") and region.get("tabindex") == "0" for region in regions)
    assert '<a class="skip" href="#content">' in page


def test_main_numbers_stand_with_interval_and_protocol(trained: Path) -> None:
    made, failed = build([trained], examples=0)
    assert failed == []
    (view,) = made.runs
    record = next(r for r in read(trained).records() if r.checkpoint == "best")
    assert view.cards[0].value.split()[0] == f"{100 * record.scores['clean'].accuracy:.1f}"
    assert view.cards[1].title == "Under worst case, suite quick"
    for card in view.cards:
        assert card.interval
        assert "Linf" in card.protocol
        assert "test images" in card.protocol
        assert "best checkpoint" in card.protocol
    assert view.verdict.word == record.verdict.word
    assert "AutoAttack was not run: the number can only fall." in view.warnings
    assert view.equation.startswith("min_θ")
    assert view.expression == read(trained).config["method"]


def test_runs_are_quoted_at_the_same_checkpoint(
    tmp_path: Path, new_run: Callable[..., Path], record: Callable[..., Record]
) -> None:
    runs = [new_run(tmp_path / name, recipe=name) for name in ("gairat", "trades")]
    more: dict[str, Any] = {"weights_sha256": "0", "eps_value": 8 / 255}
    more["data"] = {"name": "cifar10", "title": "CIFAR-10", "shape": [3, 32, 32], "classes": 10}
    for folder, checkpoint, right in ((runs[0], "last", 60), (runs[1], "last", 50), (runs[1], "best", 70)):
        counts = {**COUNTS, "autoattack": right}
        more["attacks"] = {name: {"expression": name, "title": COLUMNS[name]} for name in COLUMNS}
        record(counts=counts, checkpoint=checkpoint, **more).write(folder / "evaluations")
    for folder in runs:
        for path in (folder / "evaluations").glob("*.npz"):
            n = 200
            columns = {"index": np.arange(n), "label": np.arange(n) % 10, "prediction": np.arange(n) % 10}
            columns |= {"clean_margin": np.zeros(n, np.float32), "clean": np.ones(n, np.uint8)}
            right = 50 if path.stem.endswith("last") and folder.name == "trades" else 60
            columns |= {"autoattack": (np.arange(n) < right).astype(np.uint8), "broken_by": np.array([""] * n)}
            columns |= {"pgd_20": columns["autoattack"], "worst_case": columns["autoattack"]}
            np.savez(path, **columns)
    made, _ = build(runs, examples=0)
    assert [view.headline.split("\N{NO-BREAK SPACE}")[0] for view in made.runs] == [
        "GAIRAT keeps 30.0",
        "TRADES keeps 25.0",
    ]
    (view,) = made.evaluations
    assert view.differences, view.differences_note
    assert [head[:2] for head in view.heads] == [("GAIRAT", "last"), ("TRADES", "best"), ("TRADES", "last")]
    assert {row[2]: row[3] for row in view.differences}["AutoAttack"] == "−5.0"
    assert [view.beside for view in made.runs] == [
        "",
        "Its best checkpoint keeps 35.0\N{NO-BREAK SPACE}% of them (28.7–41.8).",
    ]
    assert made.lead.startswith(
        "GAIRAT keeps most under AutoAttack, 30.0\N{NO-BREAK SPACE}% of 200 test images, TRADES fewest, 25.0"
    )
    assert "TRADES cannot be told from GAIRAT" in made.lead
    assert made.overview[:2] == ["Clean accuracy", "Under AutoAttack"]
    document = Document(render(made))
    assert document.all("table")[0]["class"] == "scores overview"
    told = "".join(document.words)
    assert all(card.value in told and card.interval.removeprefix("95 %: ") in told for card in made.runs[1].cards[:2])


def test_a_network_at_chance_is_not_called_sound(tmp_path: Path, record: Callable[..., Record]) -> None:
    made = record(counts=COUNTS, gap=(0.0, 0.01))
    nothing = Finding(NOTHING_LEFT, "normal", 0.1, None, 0.1, 0.1, "no better than chance", "by hand")
    fine = dataclasses.replace(made.findings[0], verdict="normal")
    view = _verdict(dataclasses.replace(made, findings=(fine,)))
    assert (view.word, view.tone) == ("sound", "good")
    assert view.scope.endswith("checks made, and none speaks against the number")
    view = _verdict(dataclasses.replace(made, findings=(fine, nothing)))
    assert (view.word, view.tone) == ("no better than chance", "")
    assert _verdict(dataclasses.replace(made, findings=())).tone == ""


def test_one_run_is_told_once(trained: Path, tmp_path: Path) -> None:
    from instar.analyse import analyse

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before, _ = build([folder], examples=12)
    assert [shown.key for shown in before.training] == ["learning-curves", "survival", "unevenness"]
    assert before.classes[0].confusions
    analyse(folder, only=["reweighting"])
    analyse(folder, only=["pairs"], n=24)
    for split in ("test", "train"):
        analyse(folder, only=["vulnerability"], split=split, n=24)
    made, failed = build([folder], examples=12)
    assert failed == []
    assert [shown.key for shown in made.training] == ["learning-curves", "unevenness"]
    (classes,) = made.classes
    assert classes.confusions == []
    pairs = next(view for view in made.analyses if view.key == classes.elsewhere)
    assert "pairs" in pairs.key
    vulnerability = [view for view in made.analyses if "vulnerability" in view.key]
    assert [view.label.rsplit(", ")[-1] for view in vulnerability[:2]] == ["train images", "test images"]
    assert [view.folded for view in vulnerability[:2]] == [False, True]
    text = render(made)
    assert f'<a href="#{pairs.key}">hard class pairs</a>' in text
    assert text.count('<details class="pictures printed">') == sum(view.folded for view in made.analyses)


def test_differences_of_a_run_share_a_row_only_where_all_runs_were_compared_by_the_same_attacks() -> None:
    cells = [(arm, "PGD-AT", attack, "+1.0", "", "1", "") for arm in ("SPAT", "TRADES") for attack in ("clean", "FGSM")]
    assert differences_by_run(cells) == [("SPAT", cells[:2]), ("TRADES", cells[2:])]
    assert differences_by_run(cells[:3]) == []


def test_analyses_of_several_runs_stand_side_by_side_with_the_numbers_of_each(trained: Path, tmp_path: Path) -> None:
    from instar.analyse import analyse

    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(trained, folder)
        analyse(folder, only=["overfitting"])
    made, failed = build(folders, examples=0)
    assert failed == []
    (view,) = [view for view in made.analyses if view.label == "side by side"]
    assert [name for name, _ in view.heads] == [run.name for run in made.runs]
    assert [colour for _, colour in view.heads] == [run.colour for run in made.runs]
    assert len(view.singles) == 2
    assert {len(cells) for _, cells in view.rows} == {2}
    assert view.pictures
    assert view.key == "analysis-overfitting"
    assert "Run by run: 2 runs" in render(made)


def test_galleries_show_examples_within_the_ball_and_what_the_model_says(trained: Path) -> None:
    made, _ = build([trained], examples=12)
    test, training = made.galleries
    assert [heading for heading, _, _ in test.parts] == ["Most vulnerable", "Least vulnerable"]
    gaps = [float(tile.measured.split()[1]) for tile in test.parts[0][2]]
    assert gaps == sorted(gaps, reverse=True)
    assert all(tile.right_before for _, _, tiles in test.parts for tile in tiles)
    assert gaps[0] >= float(test.parts[1][2][0].measured.split()[1])
    assert [len(tiles) for _, _, tiles in training.parts] == [8, 8]
    assert "PGD-20 on cross-entropy, Linf(8/255)" in test.protocol
    (classes,) = made.classes
    (confusion,) = classes.confusions
    assert np.array(confusion.rows).sum(1).tolist() == [3, 3, 3, 3]  # spread over the classes, which lie in order
    assert sorted(row.name for row in classes.rows) == sorted(HOSTILE)


def test_the_page_names_what_it_leaves_out(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    table = {"kappa": [0, 2, 4], "loss": [2, 1, 1]}
    data = {"name": "mnist", "path": "mnist", "train_images": 3}
    folder = new_run(tmp_path / "run", tables=[table], data=data)
    text = write_page([folder], tmp_path / "page.html", root=tmp_path)[0].read_text(encoding="utf-8")
    assert "No thumbnails: no MNIST below" in text
    assert "No galleries of GAIRAT" in text
    assert payloads(text)[0]["rows"] == 3
    assert payloads(text)[0]["atlas"] is None


def test_a_model_of_another_data_set_costs_the_galleries_and_one_line(trained: Path, tmp_path: Path) -> None:
    other = train_on(tmp_path, ["red", "green", "blue"])
    for name in ("best.safetensors", "best.json", "last.safetensors", "last.json"):
        (other / "checkpoints" / name).write_bytes((trained / "checkpoints" / name).read_bytes())
    made, failed = build([other], examples=6)
    assert failed == []
    assert made.galleries == []
    (line,) = (line for line in made.missing if "galleries" in line)
    assert "tells 4 classes apart" in line
    assert "is it another data set?" in line
    assert len(made.training) == 3


def test_a_data_set_of_other_classes_is_noticed(tmp_path: Path) -> None:
    run = train_on(tmp_path, ["red", "green", "blue"])
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "red").rename(tmp_path / "pictures" / split / "yellow")
    made, _ = build([run], examples=6)
    assert made.galleries == []
    assert any("other classes" in line for line in made.missing)


def test_damage_costs_its_own_part_and_is_the_error_in_the_end(
    run: Path, tmp_path: Path, record: Callable[..., Record]
) -> None:
    (run / "evaluations").mkdir()
    (run / "evaluations" / "quick-best.json").write_text("{")
    with pytest.raises(
        UserError, match=r"cannot read the evaluation record .*quick-best.json.*the rest is in"
    ) as error:
        write_page([run], tmp_path / "page.html", examples=0)
    assert "\n" not in str(error.value)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No evaluation quick-best: cannot read" in text
    assert "figure-learning-curves" in text


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["nowhere", "--out", "page.html"], "nowhere holds no run"),
        (["RUN", "--out", "folder", "--figures", "figures"], "--figures belongs to a page"),
        (
            ["RUN", "--out", "page.html", "--examples", "-1"],
            "--examples must be a number of test images, 0 for none; got -1",
        ),
        (["RUN", "--out", "FILE/page.html"], "cannot"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    words: list[str], answer: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = [word.replace("RUN", str(run)).replace("FILE", str(tmp_path / "file")) for word in words]
    assert main(["report", *given]) == 2
    told = capsys.readouterr().err
    assert answer in told
    assert told.strip().splitlines()[-1].startswith("instar: ")


def test_a_run_that_has_just_begun_has_no_page(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(tmp_path / "run", robust=[], epochs=5)
    with pytest.raises(UserError, match="no finished epoch yet: there is nothing to show"):
        write_page([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page_beside_the_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(run), "--examples", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run / "report.html")
    assert str(run / "pictures" / "survival.png") in lines
    report([str(run), "--out", str(run / "elsewhere")])
    assert not (run / "elsewhere" / "report.html").exists()


@pytest.mark.parametrize("pyarrow", ["as installed", "missing"])
def test_figures_and_numbers_are_written_as_files_of_every_kind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pyarrow: str
) -> None:
    if pyarrow == "missing":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        assert not has_parquet()
    words = [str(run), "--out", str(tmp_path / "page.html"), "--figures", str(tmp_path / "f"), "--examples", "0"]
    assert report(words) == 0
    told = capsys.readouterr()
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert {
        f"{key}.{kind}" for key in ("learning-curves", "survival", "unevenness") for kind in ("png", "svg", "csv")
    } <= names
    assert all(str(tmp_path / "f" / name) in told.out for name in names)
    assert ("survival.parquet" in names) == has_parquet()
    assert ("no Parquet" in told.err) != has_parquet()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "f" / "survival.csv").read_text(encoding="utf-8"))))
    assert [row["images"] for row in rows[:5]] == ["3", "1", "1", "0", "2"]
    assert ET.parse(tmp_path / "f" / "survival.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "f" / "survival.png") as picture:
        assert picture.width == 1500


def test_numbers_lie_beside_figures_as_links(page: str) -> None:
    links = {a["download"]: a["href"] for a in Document(page).all("a") if "download" in a}
    assert {"learning-curves.csv", "survival.csv", "unevenness.csv", "evaluation-quick.csv"} <= set(links)
    text = unquote(links["evaluation-quick.csv"].partition(",")[2])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["checkpoint"] for row in rows} == {"best", "last"}
    assert all(0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1 for row in rows)


def test_a_run_named_twice_is_one_line(run: Path) -> None:
    with pytest.raises(UserError, match="is named twice"):
        build([run, run])


def test_a_record_of_another_version_costs_its_own_part(
    run: Path, tmp_path: Path, record: Callable[..., Record]
) -> None:
    record(counts=COUNTS).write(run / "evaluations")
    path = run / "evaluations" / "standard-best.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["protocol"]["bn_mode"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="lacks 'bn_mode': is it of another"):
        write_page([run], tmp_path / "page.html", examples=0)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No evaluation by standard" in text
    assert "It was not evaluated yet." in text


def test_stored_analyses_are_shown_with_summary_figures_and_numbers(trained: Path, tmp_path: Path) -> None:
    from instar.analyse import ANALYSES, Found

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    name = next(iter(ANALYSES))
    tables = {"rows": {"share": np.array([0.5, 0.25]), "class": np.array(HOSTILE[:2])}}
    protocol = {"label": "PGD-AT, best", "checkpoint": "best", "n": 2, "attack": "PGD(steps=2)"}
    Found(name, "A <b>title</b>", "Half & half.", {"gini": 0.25}, tables, protocol).write(run / "analyses")
    made, failed = build([run], examples=0)
    assert failed == []
    (view,) = made.analyses
    assert (view.title, view.summary, view.figures) == ("A <b>title</b>", "Half & half.", [("gini", "0.25")])
    assert view.note.startswith("No pictures: what is stored cannot be drawn")
    text = render(made)
    Document(text)
    assert "A &lt;b&gt;title&lt;/b&gt;" in text
    assert "Half &amp; half." in text
    assert "PGD(steps=2)" in text
    links = {a["download"]: a["href"] for a in Document(text).all("a") if "download" in a}
    (table,) = (unquote(link) for name, link in links.items() if name.startswith("analysis") and "rows" in name)
    assert "0.25" in table


def test_a_damaged_analysis_is_one_line(run: Path) -> None:
    (run / "analyses").mkdir()
    (run / "analyses" / "best-pairs.json").write_text("{")
    made, failed = build([run], examples=0)
    assert made.analyses == []
    assert [str(error).count("\n") for error in failed] == [0]
    assert any(line.startswith("No analysis best-pairs: cannot read") for line in made.missing)
