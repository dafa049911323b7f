"""ONNX models: somebody's network as a black box, run by onnxruntime, and our networks written as such files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instar.errors import UserError, one_line
from instar.models.reading import absent

LARGEST = 2**31
"""Bytes of an ONNX file, which is one protobuf message."""

TOLERANCE = 1e-4
"""How far the logits of an exported file may differ from the network's, as a share of the largest."""

NO_GRADIENTS = (
    "an ONNX model gives no gradients, so attacks that need them cannot judge it: take --suite black_box (Square and "
    "random noise), and expect a weaker attack to find less"
)
INPUTS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


class OnnxClassifier(nn.Module):
    """A network in an ONNX file as a module without gradients.

    Args:
        path: The file.

    Raises:
        UserError: onnxruntime is not installed; the file is missing or damaged, or not one image input (B, C, H, W) or
            (B, H, W, C) to one output (B, K).
    """

    black_box = True
    """Only black-box attacks can be run against it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        self.path = str(path)
        self._session: Any = _session(path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in INPUTS:
            found = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs) or "none"
            raise UserError(f"{path} must have one input, images (B, C, H, W) of floating point; it has {found}")
        self._input, self._output = inputs[0].name, outputs[0].name
        self._type = INPUTS[inputs[0].type]
        batch, first, _, last = inputs[0].shape
        self._batch = batch if isinstance(batch, int) and batch > 0 else None
        self._channels_last = last in (1, 3) and first not in (1, 3) and isinstance(first, int)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxClassifier:
        """Itself: there is nothing in it that could be changed."""
        return self

    def extra_repr(self) -> str:
        """The file as it prints."""
        return Path(self.path).name

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (B, K) for images (B, C, H, W) in [0, 1], without a graph.

        Raises:
            UserError: A gradient is asked for, or onnxruntime cannot process such images.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(NO_GRADIENTS)
        parts = [self._run(part) for part in x.split(self._batch or max(len(x), 1))]
        return torch.from_numpy(np.concatenate(parts)).to(device=x.device, dtype=x.dtype)

    def _run(self, x: Tensor) -> np.ndarray:
        images = x.detach().cpu()
        images = images if images.dtype == torch.float64 else images.float()  # numpy knows no bfloat16
        if self._channels_last:
            images = images.permute(0, 2, 3, 1)
        array = np.ascontiguousarray(images.numpy(), dtype=self._type)
        count = len(array)
        if self._batch is not None and count < self._batch:  # files with a fixed batch take no smaller one
            array = np.concatenate([array, np.repeat(array[-1:], self._batch - count, axis=0)])
        try:
            found: np.ndarray = self._session.run([self._output], {self._input: array})[0]
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise UserError(
                f"{self.path} cannot process images of shape {tuple(x.shape)}: {one_line(error)[:200]}"
            ) from None
        return found[:count]


def _session(path: Path) -> Any:
    runtime = optional("onnxruntime", "run ONNX models")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise absent(path) from None
    if size > LARGEST:
        raise UserError(f"{path} is too large: {size:,} bytes, where an ONNX file has at most {LARGEST:,}")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in runtime.get_available_providers()]
    try:
        # By path: onnxruntime then refuses tensors that are kept in files outside of the model's folder.
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise UserError(f"{path} is no ONNX model, or damaged ({one_line(error)[:200]})") from None


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def optional(package: str, purpose: str) -> Any:
    """A package of the extra ``onnx``.

    Raises:
        UserError: It is not installed.

    Example:
        >>> optional("onnxruntime_of_tomorrow", "run ONNX models")
        Traceback (most recent call last):
            ...
        instar.errors.UserError: onnxruntime_of_tomorrow is needed to run ONNX models: pip install 'instar[onnx]'
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is needed to {purpose}: pip install 'instar[onnx]'") from None


def exported(model: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """A network as the contents of an ONNX file, with whatever it does to images and logits inside.

    Args:
        model: Images (B, C, H, W) in [0, 1] → logits (B, K), in eval mode, on the CPU in float32.
        shape: One image as (C, H, W).

    Returns:
        The file, whose input ``images`` and output ``logits`` take any batch size.

    Raises:
        UserError: onnx or onnxscript is not installed, the network cannot be traced, or is too large for one file.
    """
    for package in ("onnx", "onnxscript"):
        optional(package, "write ONNX models")
    images = torch.full((2, *shape), 0.5)
    try:
        with torch.no_grad(), _quietly():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        content: bytes = program.model_proto.SerializeToString()  # type: ignore[union-attr]
    except Exception as error:  # foreign code fails to trace in any way it likes
        reason = one_line(error).partition(". ")[0][:200]
        raise UserError(f"this network cannot be written as ONNX: {type(error).__name__}: {reason}") from error
    return content


def largest_difference(path: Path, model: nn.Module, shape: tuple[int, int, int]) -> float:
    """How far the logits of an ONNX file are from a network's, as a share of the largest, on random images.

    Args:
        path: The file.
        model: The network, in eval mode on the CPU.
        shape: One image as (C, H, W).

    Returns:
        max |difference| / max |logit|, over batches of 1 and of 3.

    Raises:
        UserError: onnxruntime is not installed or cannot read the file.
    """
    runner = OnnxClassifier(path)
    draws = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 3):
        x = torch.rand(count, *shape, generator=draws)
        with torch.no_grad():
            ours, theirs = model(x), runner(x)
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12)))
    return worst


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the exporter's progress off the screen and its advice out of the warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
