"""Examples made on another model: what breaks a network without ever having seen its gradients."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from instar.attacks.attack import Attack, counts
from instar.attacks.turns import passes
from instar.errors import UserError
from instar.evidence import Adversary, Batch
from instar.expression import value
from instar.modes import forward_mode
from instar.runs import load
from instar.threat import Ball

STATE = "state.safetensors"
ONLINE = "model."


@value
class Transfer(Attack):
    """An attack on a surrogate; only its final image is shown to the model that is examined.

    A sound model is more accurate on such images than on those of attacks that see its own gradients.

    Attributes:
        source: The surrogate: a run's folder (its best checkpoint), a ``.safetensors`` file with its card, or a run's
            ``checkpoints/state.safetensors`` for the online weights that its average was made from.
        attack: What is run on the surrogate. It should not stop at the first misclassified iterate: an image that has
            just crossed one boundary seldom crosses another.
        weights: The beginning of the SHA-256 of the surrogate's weights; empty takes whatever is there.

    Raises:
        UserError: At the call: no surrogate there, or other weights than named, or of other images or classes.

    Source: Madry et al. 2018; Carlini et al. 2019 (white-box attacks must not be weaker than transfer).
    """

    source: str
    attack: Attack
    weights: str = ""

    @property
    def ball(self) -> Ball | None:
        """The attack's."""
        return getattr(self.attack, "ball", None)

    @property
    def limit(self) -> Ball | None:
        """The attack's."""
        return self.attack.limit

    def budget(self, classes: int) -> dict[str, Any]:
        """Forward passes for each instance, those of the surrogate included."""
        one = passes(self.attack, classes)
        return {} if one is None else {"forwards": one + 1}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Attack the surrogate, whatever `model` is; see `Attack`."""
        found_weights = fingerprint(self.source)
        if not found_weights.startswith(self.weights):
            raise UserError(f"the surrogate {self.source} has other weights than when this attack was written down")
        surrogate = _surrogate(self.source, found_weights, str(batch.x.device))
        with torch.no_grad(), forward_mode(model, "eval"):
            wanted = model(batch.x[:1]).shape[1]
        try:
            with torch.no_grad():
                given = surrogate(batch.x[:1]).shape[1]
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the surrogate {self.source} cannot take images {tuple(batch.x.shape[1:])}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from None
        if given != wanted:
            raise UserError(f"the surrogate {self.source} has {given} classes, the model {wanted}")
        found = self.attack(surrogate, batch, generator=generator)
        # What the surrogate's iterates did says nothing about the model: only the final image counts.
        none = counts(batch.y)
        return Adversary(x=found.x, kappa=none, inspected=none.clone(), moves=found.moves, budget=found.budget)


def file_of(source: str | Path) -> Path:
    """The file of weights that a surrogate's name stands for.

    Args:
        source: A run's folder or a file.

    Returns:
        The file.

    Raises:
        UserError: There is none.
    """
    path = Path(source).expanduser()
    file = path / "checkpoints" / "best.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no surrogate {source}: give a run's folder or a .safetensors file with its card")
    if file.suffix != ".safetensors":
        raise UserError(f"a surrogate must be a run or a .safetensors file with its card; got {source}")
    return file


def fingerprint(source: str | Path) -> str:
    """SHA-256 of a surrogate's weights file.

    Raises:
        UserError: There is no such file.
    """
    file = file_of(source)
    status = file.stat()
    return _hash(str(file), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _hash(file: str, changed: int, size: int) -> str:
    """Hash of a file, computed once for each state of it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=4)
def _surrogate(source: str, weights: str, device: str) -> nn.Module:
    """The network, kept for the next batch."""
    file = file_of(source)
    if file.name == STATE:
        return online(file).to(device).requires_grad_(False)
    return load(file).to(device).requires_grad_(False).eval()


def online(state: Path, *, model: nn.Module | None = None) -> nn.Module:
    """The online weights of a run, which its average follows, from the file that it resumes from.

    Args:
        state: ``checkpoints/state.safetensors`` of a run; the card of its last checkpoint tells the architecture.
        model: A module to put the weights into; needed where it was built by code of the user's own.

    Returns:
        The network in eval mode.

    Raises:
        UserError: The file is damaged, or does not fit the card.
    """
    network = load(state.with_name("last.safetensors"), model=model)
    try:
        tensors = safetensors.torch.load_file(state)
    except Exception as error:  # safetensors has an error of its own for each kind of damage
        raise UserError(f"cannot read {state}: {error}") from None
    mine = {name.removeprefix(ONLINE): tensor for name, tensor in tensors.items() if name.startswith(ONLINE)}
    try:
        network.load_state_dict(mine)
    except RuntimeError as error:
        raise UserError(f"{state} does not fit the last checkpoint: {str(error).partition(chr(10))[0]}") from None
    return network.eval()
