"""Searching in bfloat16: a faster copy that attacks run on, while the model itself confirms what they find."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from instar.attacks import FoldingError, fold
from instar.errors import UserError, one_line
from instar.evaluate.subject import Subject
from instar.models.precision import FloatLinear, FloatStemConv2d

PRECISIONS = ("float32", "bf16")
"""``"float32"``: everything. ``"bf16"``: attacks search on a bfloat16 copy behind a float32 first layer; every example
is confirmed in float32, and where it is not, the point is attacked again in float32. A point that the search in
bfloat16 found nothing against counts as robust."""


class _Autocast(nn.Module):
    """A copy of a model under autocast, its first convolution and its linear layers in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        stems = [name for name, module in self.model.named_modules() if type(module) is nn.Conv2d][:1]
        heads = [name for name, module in self.model.named_modules() if type(module) is nn.Linear][-1:]
        for name in (*stems, *heads):
            if name:  # a lone layer has no name, and nothing around it to gain from
                self.model.get_submodule(name).__class__ = FloatStemConv2d if name in stems else FloatLinear

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K), in float32."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()


def searcher(subject: Subject, images: Tensor, *, precision: str) -> nn.Module | None:
    """The copy that attacks search on.

    Args:
        subject: The model.
        images: Some images (B, C, H, W) to try the copy with.
        precision: One of `PRECISIONS`.

    Returns:
        A folded copy in bfloat16 behind a float32 first convolution; for a model that cannot be folded a copy under
        autocast. None for float32.

    Raises:
        UserError: The copy does not run, or gives no numbers.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> x = torch.rand(2, 3, 4, 4)
        >>> fast = searcher(Subject(net, net, 2, torch.device("cpu")), x, precision="bf16")
        >>> fast(x).dtype, bool((fast(x) - net(x)).abs().max() < 0.05)
        (torch.float32, True)
    """
    if precision == "float32":
        return None
    if subject.black_box:
        raise UserError("the model is a black box in a precision of its own; leave out precision")
    try:
        made: nn.Module = fold(subject.model, images, dtype=torch.bfloat16)
    except FoldingError:
        made = _Autocast(subject.model)
    try:
        with torch.no_grad():
            logits = made(images)
    except Exception as error:  # foreign code fails in bfloat16 in any way it likes
        raise UserError(
            f"the model cannot be run in bf16 ({type(error).__name__}: {one_line(error)}); leave out precision"
        ) from None
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model returns NaN or infinity in bf16; leave out precision")
    return made
