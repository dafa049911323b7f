"""Pictures of runs, from their files alone.

Example:
    >>> import tempfile
    >>> from instar.report import write_pictures
    >>> from instar.train import train
    >>> run = train("pgd_at", out=tempfile.mkdtemp(), epochs=1, width=4, batch_size=256, arguments={"steps": 2})
    >>> [path.name for path in write_pictures(run.out)]
    ['learning_curves.png', 'survival.png', 'unevenness.png', 'gallery.png']
"""

from instar.report.distributions import Survival, Unevenness, survival_counts, top_share, unevenness_by_epoch
from instar.report.figures import evaluation_bars, instance_curves, learning_curves, survival, unevenness
from instar.report.gallery import gallery
from instar.report.pictures import compare_pictures, write_pictures
from instar.report.stored import StoredRun, Unavailable, read
from instar.report.style import write_png

__all__ = [
    "StoredRun",
    "Survival",
    "Unavailable",
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
    "write_pictures",
    "write_png",
]
