"""Pictures and pages of runs, from their files.

Example:
    >>> import tempfile
    >>> from instar.report import learning_curves
    >>> from instar.train import train
    >>> run = train("pgd_at", out=tempfile.mkdtemp(), epochs=1, width=4, batch_size=256, arguments={"steps": 1})
    >>> figure = learning_curves(run.out)
    >>> [axes.get_label() for axes in figure.axes]
    ['robust', 'clean', 'loss', 'rate']

`write_pictures` draws everything that a run's files allow; `write_page` puts all that is known into one HTML file.
"""

from instar.report.distributions import Survival, Unevenness, survival_counts, top_share, unevenness_by_epoch
from instar.report.figures import (
    compare_pictures,
    evaluation_bars,
    gallery,
    instance_curves,
    learning_curves,
    survival,
    unevenness,
    write_pictures,
)
from instar.report.page import write_page
from instar.report.stored import StoredRun, UnavailableError, read
from instar.report.style import write_png

__all__ = [
    "StoredRun",
    "Survival",
    "UnavailableError",
    "Unevenness",
    "compare_pictures",
    "evaluation_bars",
    "gallery",
    "instance_curves",
    "learning_curves",
    "read",
    "survival",
    "survival_counts",
    "top_share",
    "unevenness",
    "unevenness_by_epoch",
    "write_page",
    "write_pictures",
    "write_png",
]
