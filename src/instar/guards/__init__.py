"""What watches over a training run and says what to do next: bad steps, collapse, attacks that find nothing.

A guard changes no number of a run in which nothing goes wrong.
"""

from instar.guards.collapse import Alarm, catastrophic, judge, single_step_only
from instar.guards.deterministic import deterministic
from instar.guards.gradients import clip_gradients, gradient_norm
from instar.guards.health import Health, leave_out, left_out, skipped
from instar.guards.probe import Lookout, Probe, probe, watch

__all__ = [
    "Alarm",
    "Health",
    "Lookout",
    "Probe",
    "catastrophic",
    "clip_gradients",
    "deterministic",
    "gradient_norm",
    "judge",
    "leave_out",
    "left_out",
    "probe",
    "single_step_only",
    "skipped",
    "watch",
]
