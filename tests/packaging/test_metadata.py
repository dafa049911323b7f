"""What is written in several places agrees: versions, dependencies, constraints."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import instar

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIRED = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PYPROJECT["project"]["optional-dependencies"].items()
}
# `dev` also names other extras, as instar[docs,onnx].
DEVELOPMENT = [
    requirement
    for asked in EXTRAS["dev"]
    for requirement in (
        [one for extra in sorted(asked.extras) for one in EXTRAS[extra]] if asked.name == "instar" else [asked]
    )
]
# Packages whose import has another name than the distribution.
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


def pins(name: str) -> dict[str, Version]:
    lines = [
        line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]
    # Nothing but NAME==VERSION: no index, no path, no URL.
    parts = [re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)", line) for line in lines]
    assert [line for line, match in zip(lines, parts, strict=True) if match is None] == []
    return {match[1]: Version(match[2]) for match in parts if match is not None}


def third_party_imports(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"instar"}


def test_the_version_is_one() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert instar.__version__ == PYPROJECT["project"]["version"] == citation["version"]


def imported_as(requirements: Iterable[Requirement]) -> set[str]:
    return {IMPORTED_AS.get(requirement.name, requirement.name) for requirement in requirements}


def test_every_package_that_the_source_imports_is_declared() -> None:
    required = imported_as(REQUIRED)
    optional = required | imported_as(one for name, extra in EXTRAS.items() if name != "dev" for one in extra)
    undeclared = set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # What an extra installs may only be imported where it is needed: within a function.
        missing = (third_party_imports(tree.body) - required) | (third_party_imports(ast.walk(tree)) - optional)
        undeclared |= {f"{path.relative_to(ROOT)}: {name}" for name in missing}
    assert undeclared == set()


@pytest.mark.parametrize("requirement", REQUIRED + DEVELOPMENT, ids=lambda requirement: requirement.name)
def test_the_locked_version_lies_in_the_declared_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("constraints.txt")[canonicalize_name(requirement.name)])


def test_every_locked_version_accepts_every_supported_python() -> None:
    locked, first = pins("constraints.txt"), PYPROJECT["project"]["requires-python"].removeprefix(">=")
    refusing = []
    for installed in distributions():
        name, wanted = canonicalize_name(installed.metadata["Name"]), installed.metadata["Requires-Python"]
        if locked.get(name) == Version(installed.version) and wanted:
            refusing += [] if SpecifierSet(wanted).contains(f"{first}.0") else [f"{name} wants Python {wanted}"]
    assert refusing == []


@pytest.mark.parametrize("requirement", REQUIRED, ids=lambda requirement: requirement.name)
def test_the_oldest_versions_tested_are_the_lower_bounds_declared(requirement: Requirement) -> None:
    (lowest,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
    oldest = pins(".ci/constraints-oldest.txt")[canonicalize_name(requirement.name)]
    # The first release that exists of 2.6 is 2.6.0, and of 1.11 perhaps 1.11.2: equal as far as the bound goes.
    assert oldest.release[: len(lowest.release)] == lowest.release
