"""A report as one self-contained HTML page, from the files of runs.

Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from instar.report.page import write_page
    >>> from instar.train import train
    >>> run = train("pgd_at", out=tempfile.mkdtemp(), epochs=1, width=4, batch_size=256, arguments={"steps": 1})
    >>> (page,) = write_page([run.out], Path(run.out) / "report.html", examples=0)
    >>> page.read_text(encoding="utf-8").startswith("<!doctype html>")
    True
"""

from instar.report.page.assemble import build
from instar.report.page.write import render, write_figures, write_page

__all__ = ["build", "render", "write_figures", "write_page"]
