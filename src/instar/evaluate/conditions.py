"""What every attack of an evaluation is run under."""

from __future__ import annotations

from dataclasses import dataclass

from instar.errors import UserError, unknown
from instar.evaluate.precision import PRECISIONS

BATCH_SIZE = 250
SHARD_SIZE = 500


@dataclass(frozen=True)
class Conditions:
    """What every attack of an evaluation is run under.

    Attributes:
        seed: Seed of random starts and of AutoAttack.
        batch_size: Points attacked at a time.
        shard_size: Points between two saves; AutoAttack's verdicts depend on it, and on nothing like the number of
            processes.
        precision: What attacks search in, one of `instar.evaluate.precision.PRECISIONS`; verdicts are float32 always.
    """

    seed: int = 0
    batch_size: int = BATCH_SIZE
    shard_size: int = SHARD_SIZE
    precision: str = "float32"

    def __post_init__(self) -> None:
        """Check sizes and precision."""
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
