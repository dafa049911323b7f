"""Pictures of runs, made from their files alone: ``run.json``, ``log.jsonl``, ``instances/`` and ``evaluations/``.

Every function returns a matplotlib figure that belongs to no window and no global list: save it with
`instar.report.write_png`, or with its own ``savefig`` as SVG or PDF. Epochs are counted from 1 in pictures, as in the
progress display; the files count from 0.
"""

from instar.report.bars import evaluation_bars
from instar.report.contact import gallery
from instar.report.curves import instance_curves, learning_curves
from instar.report.geometry import survival
from instar.report.mechanism import mechanism_figure
from instar.report.pictures import compare_pictures, write_pictures
from instar.report.ridges import unevenness

__all__ = [
    "compare_pictures",
    "evaluation_bars",
    "gallery",
    "instance_curves",
    "learning_curves",
    "mechanism_figure",
    "survival",
    "unevenness",
    "write_pictures",
]
