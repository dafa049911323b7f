"""Random numbers keyed by what they are for, so that neither a resume nor a second worker changes a result."""

from __future__ import annotations

import hashlib

import torch


def key(seed: int, *, epoch: int = 0, step: int = 0, purpose: str) -> int:
    """A 63-bit seed that belongs to one draw of one run.

    Args:
        seed: The run's seed.
        epoch: Epoch, from 0.
        step: Step within the epoch, from 0.
        purpose: What the numbers are for, for example ``"start"`` or ``"augment"``.

    Returns:
        An integer in [0, 2**63), equal for equal arguments on every machine.

    Example:
        >>> key(0, epoch=1, step=2, purpose="start") == key(0, epoch=1, step=2, purpose="start")
        True
        >>> key(0, purpose="start") == key(0, purpose="order")
        False
    """
    text = f"{seed}/{epoch}/{step}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, *, epoch: int = 0, step: int = 0, purpose: str, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A generator seeded by `key`: nothing has to be stored to repeat a draw.

    Args:
        seed: The run's seed.
        epoch: Epoch, from 0.
        step: Step within the epoch, from 0.
        purpose: What the numbers are for.
        device: Where the numbers are drawn. CPU and GPU generators give different numbers for one seed.

    Returns:
        A fresh generator on `device`.

    Example:
        >>> a = torch.rand(2, generator=generator(0, purpose="start"))
        >>> b = torch.rand(2, generator=generator(0, purpose="start"))
        >>> bool((a == b).all())
        True
    """
    made = torch.Generator(device=device)
    made.manual_seed(key(seed, epoch=epoch, step=step, purpose=purpose))
    return made
