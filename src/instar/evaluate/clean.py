"""What a model says of the clean images, which every attack is compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from instar.errors import UserError
from instar.evaluate.conditions import Conditions
from instar.evaluate.progress import Progress
from instar.evaluate.shards import Shard, fetch
from instar.evaluate.subject import Subject
from instar.evaluate.targets import Case
from instar.randomness import key
from instar.signals.losses import lead

PROBE = 8


@dataclass(frozen=True)
class Clean:
    """What the model says of the clean images, shard by shard.

    Attributes:
        prediction: Predicted labels (n,).
        margin: z_y − max_{j≠y} z_j in logits (n,).
        label: Labels (n,).
        index: Official positions (n,).
        digests: SHA-256 of each shard's images.
        probes: Logits of each shard's first images.
        shard_size: Points in a shard.
        seconds: Time spent.
        random: Whether the model gave other logits when it was asked again.
    """

    prediction: np.ndarray
    margin: np.ndarray
    label: np.ndarray
    index: np.ndarray
    digests: tuple[str, ...]
    probes: tuple[np.ndarray, ...]
    shard_size: int
    seconds: float
    random: bool = False

    @classmethod
    def measure(cls, case: Case, subject: Subject, conditions: Conditions, report: Progress) -> Clean:
        """Run the model on all images, shard by shard.

        A model that draws random numbers draws the same ones at every repetition.

        Raises:
            UserError: It returns NaN or infinity, or another shape than before.
        """
        with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(key(conditions.seed, purpose="clean predictions"))
            return cls._measure(case, subject, conditions, report)

    @classmethod
    def _measure(cls, case: Case, subject: Subject, conditions: Conditions, report: Progress) -> Clean:
        begun = time.perf_counter()
        random = False
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("prediction", "margin", "label", "index")}
        digests, probes, right = [], [], 0
        total, step = len(case.split), conditions.shard_size
        for start in range(0, total, step):
            x, y, index, digest = fetch(case.split, start=start, stop=min(start + step, total), device=subject.device)
            # In the same batches in which AutoAttack's reference computes its clean accuracy.
            logits = torch.cat([subject.model(part) for part in x.split(conditions.batch_size)]).float()
            if logits.shape != (len(x), subject.classes):
                raise UserError(
                    f"the model must return logits of shape {(len(x), subject.classes)} for {len(x)} images; got "
                    f"{tuple(logits.shape)} on images {start} to {start + len(x) - 1}"
                )
            if not bool(torch.isfinite(logits).all()):
                bad = int(index[int((~torch.isfinite(logits)).any(1).nonzero()[0])])
                raise UserError(f"the model returns NaN or infinity on clean image {bad}: its weights are broken")
            predicted = logits.argmax(1)
            for name, found in zip(parts, (predicted, -lead(logits, y), y, index), strict=True):
                parts[name].append(found.cpu().numpy())
            if start == 0:
                first = x[: conditions.batch_size]
                size = 1e-4 * float(logits.abs().max())  # GPUs may sum in another order
                random = not torch.allclose(subject.model(first).float(), logits[: len(first)], rtol=1e-3, atol=size)
            digests.append(digest)
            probes.append(logits[:PROBE].cpu().numpy())
            right += int((predicted == y).sum())
            report("clean", min(start + step, total), total, right)
        joined = {name: np.concatenate(found) for name, found in parts.items()}
        seconds = time.perf_counter() - begun
        return cls(
            **joined, digests=tuple(digests), probes=tuple(probes), shard_size=step, seconds=seconds, random=random
        )

    @property
    def correct(self) -> np.ndarray:
        """Which clean predictions are right (n,)."""
        return self.prediction == self.label

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self.digests)

    def span(self, number: int) -> tuple[int, int]:
        """First position of a shard, and one past its last."""
        start = number * self.shard_size
        return start, min(start + self.shard_size, len(self.label))

    def shard(self, case: Case, number: int, device: torch.device) -> Shard:
        """A shard, with its images.

        Args:
            case: Where they come from.
            number: Which shard, from 0.
            device: Where they are wanted.

        Raises:
            UserError: The images are others than those of the clean predictions.
        """
        start, stop = self.span(number)
        x, y, index, digest = fetch(case.split, start=start, stop=stop, device=device)
        if digest != self.digests[number]:
            raise UserError(
                f"images {start} to {stop - 1} of {case.split.images.info.title} changed while they were evaluated. "
                "Does the data set draw random transforms?"
            )
        correct = torch.from_numpy(self.correct[start:stop]).to(device)
        return Shard(number, start, x, y, index, correct, digest, self.probes[number])
