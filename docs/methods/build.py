"""Write the pages about the methods from docstrings, counted passes and presets: ``python docs/methods/build.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

from instar.cli.explain import described, reconstruction, sections
from instar.config import written
from instar.errors import UserError
from instar.methods import RECIPES, Recipe
from instar.passes import passes
from instar.presets import PRESETS, Preset

FOLDER = Path(__file__).resolve().parent
NOTE = "<!-- Written by build.py from the docstrings: change those, and run it again. -->"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    made = {f"{name}.md": page(name, recipe) for name, recipe in RECIPES.items()}
    return {"README.md": overview(), **made}


def overview() -> str:
    """The table of all methods."""
    rows = []
    for name, recipe in RECIPES.items():
        parts = sections(inspect.getdoc(recipe) or "")
        idea = parts[""].splitlines()[0]
        label = " *A reconstruction.*" if reconstruction(inspect.getdoc(recipe) or "") else ""
        units = cost(recipe)
        limit = limits(f"{parts.get('Returns', '')} {parts['']}") or "–"
        rows.append([f"[{name}]({name}.md)", paper(parts), idea + label, str(units) if units else "–", limit])
    return join(
        NOTE,
        "# Methods",
        "One page each, with equation, arguments, source, deviations and published settings; `instar explain NAME` "
        "prints the same.",
        "Cost is that of a training step with the recipe's defaults, in forward passes of the batch (a backward pass "
        "to the input counts 1, a full one 2, one through a gradient 4). The last column says what a method becomes in "
        "a limit.",
        table(["method", "paper", "idea", "cost", "limit"], rows),
    )


def page(name: str, recipe: Recipe) -> str:
    """The page of one method."""
    text = inspect.getdoc(recipe) or ""
    parts = sections(text)
    idea, _, notes = parts[""].partition("\n\n")
    arguments = [
        [f"`{key}`", f"`{written(parameter.default)}`", meaning(parts.get("Args", ""), key)]
        for key, parameter in inspect.signature(recipe).parameters.items()
    ]
    blocks = [NOTE, f"# {name}", flowing(idea)]
    if label := reconstruction(text):
        blocks.append(f"**{label}**")
    blocks += [f"```text\n{parts['Equation']}\n```", flowing(notes)]
    if limit := limits(parts.get("Returns", "")):
        blocks.append(f"**Limit.** {limit}")
    for heading in ("Source", "Deviations", "Known criticism"):
        if heading in parts:
            blocks.append(f"**{heading}.** {capital(flowing(parts[heading]))}")
    if arguments:
        blocks += ["## Arguments", table(["argument", "default", "meaning"], arguments)]
    blocks += ["## Cost and value", value_of(recipe)]
    if name in PRESETS:
        blocks.append("## Published settings")
        blocks.append(f"```sh\ninstar train {name} --preset {next(iter(PRESETS[name]))}\n```")
        blocks += [about(made) for made in PRESETS[name].values()]
    return join(*blocks)


def about(preset: Preset) -> str:
    """A preset in full."""
    given = {**preset.arguments, **preset.settings}
    lines = [f"{key}: {written(item)}" for key, item in given.items()]
    if preset.changes:
        lines += ["set:", *(f"- {path}={written(item)}" for path, item in preset.changes.items())]
    return join(
        f"### {preset.name}",
        f"{preset.title}.",
        "\n".join(f"- {heading}: {text}" for heading, text in described(preset)),
        "\n".join(["```yaml", *lines, "```"]),
    ).rstrip()


def value_of(recipe: Recipe) -> str:
    """Passes of a step and the equal expression; for a recipe that needs an argument, that it does."""
    try:
        method = recipe()
    except UserError as lacking:
        return f"They depend on its arguments: {lacking}."
    return join(
        f"{passes(method).line}.",
        f"```text\n{method!r}\n```",
    ).rstrip()


def cost(recipe: Recipe) -> int | None:
    """Forward units of a step, or None where they depend on arguments."""
    try:
        return passes(recipe()).units
    except UserError:
        return None


def paper(parts: Mapping[str, str]) -> str:
    """Authors and year, as far as the source names them first."""
    found = re.match(r"[^,;]*?\b(?:19|20)\d\d\b", flowing(parts.get("Source", "")))
    return found[0] if found else "–"


def limits(text: str) -> str:
    """The sentences that say what a method becomes."""
    sentences = re.split(r"(?<=\.)\s+(?=[A-Z])", flowing(text).replace("\n\n", " "))
    return " ".join(sentence for sentence in sentences if sentence.startswith(("With ", "During ")))


def meaning(arguments: str, name: str) -> str:
    """What the docstring says about one argument."""
    found = re.search(rf"^{name}: (.*(?:\n .*)*)", arguments, re.MULTILINE)
    return flowing(found[1]) if found else ""


def flowing(text: str) -> str:
    """Text without the line breaks inside of its paragraphs, and with single backticks."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(paragraphs).replace("``", "`")


def capital(text: str) -> str:
    """`text` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def join(*blocks: str) -> str:
    """Blocks with an empty line between them."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def main() -> None:
    """Write the pages, and remove those of methods that are gone."""
    made = pages()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()


if __name__ == "__main__":
    main()
