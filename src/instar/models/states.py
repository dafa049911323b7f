"""State dicts: which tensors a model has, how others differ from them, and taking them over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.models.registry import origin


@dataclass(frozen=True)
class Differences:
    """How a state dict differs from a model's.

    Attributes:
        missing: Keys of the model that the state lacks.
        unexpected: Keys of the state that the model lacks.
        mismatched: Keys whose shapes differ → (shape in the file, shape in the model).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def any(self) -> bool:
        """Whether there is any difference."""
        return bool(self.missing or self.unexpected or self.mismatched)


def compare(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Differences:
    """How `state` differs from `target`.

    Example:
        >>> compare({"a": torch.zeros(1), "b": torch.zeros(1)}, {"b": torch.zeros(2)})
        Differences(missing=(), unexpected=('a',), mismatched={'b': ((1,), (2,))})
    """
    shapes = {
        key: (tuple(state[key].shape), tuple(value.shape))
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    }
    return Differences(
        missing=tuple(key for key in target if key not in state),
        unexpected=tuple(key for key in state if key not in target),
        mismatched=shapes,
    )


def other_architecture(path: Path, model: nn.Module, differences: Differences) -> UserError:
    """The error for a file that does not fit a model."""
    made = origin(model)
    name = made.architecture if made else type(model).__name__
    parts = []
    if differences.missing:
        parts.append(f"{len(differences.missing)} keys missing in the file ({some(differences.missing)})")
    if differences.unexpected:
        parts.append(f"{len(differences.unexpected)} unknown to the model ({some(differences.unexpected)})")
    if differences.mismatched:
        key, (theirs, ours) = next(iter(differences.mismatched.items()))
        parts.append(
            f"{len(differences.mismatched)} of another shape ({key} {theirs} in the file, {ours} in the model)"
        )
    return UserError(f"{path} does not fit {name}: {'; '.join(parts)}. Is it another architecture or width?")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch: ``torch.compile``, ``DataParallel``, ``AveragedModel``."""
    while True:
        compiled = getattr(model, "_orig_mod", None)  # the class itself would take seconds to import
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel | torch.optim.swa_utils.AveragedModel
        ):
            model = model.module
        else:
            return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict.

    Raises:
        UserError: It holds anything but tensors.
    """
    state = model.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"weights are tensors only; {type(model).__name__} also keeps {some(others)} in its state dict")
    return state


def detached(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as plain tensors of their own: on the CPU, contiguous, sharing nothing with the model."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors_of(model).items()
    }


def copy_into(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copies tensors that fit into the model, in place."""
    target = tensors_of(model)
    with torch.no_grad():
        for key, value in state.items():
            target[key].copy_(value)


def head_path(model: nn.Module) -> str | None:
    """Under which name a model registers its ``head``; None if it has none."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of many names, as people list them.

    Example:
        >>> some("abcd")
        'a, b, c, ...'
    """
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
