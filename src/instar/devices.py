"""Devices in words."""

from __future__ import annotations

import platform

import torch


def device_name(device: torch.device) -> str:
    """The device as records, run descriptions and the doctor call it.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu (")
        True
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
