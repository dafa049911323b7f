"""TorchScript programs: networks that bring their own code, and run only when the user vouches for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from instar.errors import UserError, one_line
from instar.models.reading import absent


def load_torchscript(path: str | Path, *, trust: bool = False) -> nn.Module:
    """A TorchScript program as a module, with gradients.

    Args:
        path: The file.
        trust: Whether the user vouches for it. A program can do what its author liked, such as writing files.

    Returns:
        The module in eval mode, on the CPU.

    Raises:
        UserError: It is not trusted, missing or damaged.

    Example:
        >>> load_torchscript("net.pt")
        Traceback (most recent call last):
            ...
        instar.errors.UserError: net.pt is a TorchScript program, and such programs can run code: ...
    """
    path = Path(path)
    if not trust:
        raise UserError(
            f"{path} is a TorchScript program, and such programs can run code: give --trust (trust=True) if you know "
            "where it comes from, or export its state_dict()"
        )
    if not path.is_file():
        raise absent(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch advise against the format
            loaded: nn.Module = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # damaged archives fail in many ways, all of which mean the same here
        raise UserError(f"{path} is no TorchScript program, or damaged ({one_line(error)[:120]})") from None
    return loaded.eval()
