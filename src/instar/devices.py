"""Devices in words."""

from __future__ import annotations

import platform
import re

import torch

from instar.errors import first_line


def why_unusable(error: BaseException) -> str:
    """Why PyTorch cannot use a device, in a line; of a name that it does not know, which ones to try.

    Example:
        >>> try:
        ...     torch.device("gpu")
        ... except RuntimeError as error:
        ...     why_unusable(error)
        'expected auto, cpu, cuda, or cuda:1 for the second GPU'
    """
    said = first_line(error)
    return re.sub(r"^Expected one of cpu,.*", "expected auto, cpu, cuda, or cuda:1 for the second GPU", said)


def device_name(device: torch.device) -> str:
    """The device as records, run descriptions and the doctor call it.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu (")
        True
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
