"""The documents name only what exists: files, pictures, make targets, commands."""

import re
from pathlib import Path

import pytest

from instar.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*")),
]
FENCE = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|<img[^>]*\ssrc=\"([^\"]+)\"")


def commands(document: Path) -> list[list[str]]:
    """The command lines that a document shows in its shell blocks, or that a script runs, as words."""
    text = document.read_text(encoding="utf-8")
    shell = "".join(FENCE.findall(text)) if document.suffix == ".md" else text
    lines = shell.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split("#")[0].split() for line in lines]


def test_the_readme_shows_the_two_commands_that_do_all_the_set_up() -> None:
    shown = [" ".join(words) for words in commands(ROOT / "README.md")]
    assert {"make run", "make test"} <= set(shown)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_shown_exists(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(document):
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)} <= set(targets), words
        elif words[:1] == ["instar"] and words[1:2] != ["--version"]:
            assert words[1] in COMMANDS, words


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    links = [markdown or html for markdown, html in LINK.findall(document.read_text(encoding="utf-8"))]
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in files if not (document.parent / link).exists()] == []
