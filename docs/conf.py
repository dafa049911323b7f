"""The documentation site: ``make docs`` builds it, warnings are errors, and the notebook of `examples/` is executed."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import instar

HERE = Path(__file__).resolve().parent

project = "Instar"
author = "The Instar authors"
copyright = "The Instar authors"
release = version = instar.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
]
# What a README links to with a path of the repository is a page here, too.
exclude_patterns = ["_build", "jupyter_execute", "methods/build.py", "**/reproduce.sh"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Docstrings quote code with single backticks, as Markdown does.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes are documented once, in the class
napoleon_custom_sections = ["Source", "Deviations", "Equation", "Known criticism", "Limit"]
# The inventories need the network; without it the names stay plain text.
intersphinx_mapping = {}

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True

html_theme = "furo"
html_title = f"Instar {release}"
html_static_path: list[str] = []
html_theme_options = {
    "source_repository": "https://github.com/instar-robustness/instar/",
    "source_branch": "main",
    "source_directory": "docs/",
}


def escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let absolute values and norms in docstrings, |δ|, be no substitutions of reStructuredText."""
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    """Bring the notebooks in from ``examples/``, so that each stands in the repository once."""
    app.connect("autodoc-process-docstring", escape)
    target = HERE / "examples"
    target.mkdir(exist_ok=True)
    for notebook in sorted((HERE.parent / "examples").glob("*.ipynb")):
        shutil.copy(notebook, target / notebook.name)
