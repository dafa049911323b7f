"""The pages about the methods are those that their script writes from docstrings, passes and presets now."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from instar.methods import RECIPES
from instar.presets import PRESETS

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_method_pages", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(build: ModuleType) -> dict[str, str]:
    return build.pages()


def test_the_committed_pages_are_what_the_script_writes(pages: dict[str, str]) -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    assert sorted(committed) == sorted(pages)
    stale = [name for name, text in pages.items() if committed[name] != text]
    assert stale == [], "run: python docs/methods/build.py"


def test_every_recipe_has_a_page_with_its_equation_and_source(pages: dict[str, str]) -> None:
    assert set(pages) == {"README.md", *(f"{name}.md" for name in RECIPES)}
    for name in RECIPES:
        assert "```text\n" in pages[f"{name}.md"], name
        assert "**Source.** " in pages[f"{name}.md"], name
        assert f"| [{name}]({name}.md) |" in pages["README.md"]


def test_every_argument_on_a_page_is_explained(pages: dict[str, str]) -> None:
    rows = [line for text in pages.values() for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_a_reconstruction_says_so_before_its_equation(pages: dict[str, str]) -> None:
    labelled = {name for name, text in pages.items() if "**RECONSTRUCTION" in text}
    assert labelled == {"h_sat.md", "gair_trades.md"}
    for name in labelled:
        assert pages[name].index("**RECONSTRUCTION") < pages[name].index("```text")


def test_every_preset_is_on_the_page_of_its_recipe(pages: dict[str, str]) -> None:
    for recipe, presets in PRESETS.items():
        for name, made in presets.items():
            assert f"### {name}\n" in pages[f"{recipe}.md"]
            assert f"- source: {made.source}\n" in pages[f"{recipe}.md"]
