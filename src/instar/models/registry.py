"""Models by name: this package's own networks, every timm model, and a user's own code."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from instar.errors import UserError, one_line, unknown
from instar.models.normalize import Normalize, statistics
from instar.models.preact_resnet import PreActResNet
from instar.models.precision import FloatStemConv2d
from instar.models.resnet import ResNet
from instar.models.small import MnistCNN, SatCNN, SmallCNN
from instar.models.wide_resnet import WideResNet
from instar.own_code import own_function

OWN: dict[str, Callable[..., nn.Module]] = {
    "mnist_cnn": MnistCNN,
    "preact_resnet18": partial(PreActResNet, 18),
    "preact_resnet34": partial(PreActResNet, 34),
    "resnet18": partial(ResNet, 18),
    "resnet34": partial(ResNet, 34),
    "resnet50": partial(ResNet, 50),
    "sat_cnn": SatCNN,
    "small_cnn": SmallCNN,
}
PUBLISHED_WIDE = ("wide_resnet_28_10", "wide_resnet_34_10", "wide_resnet_34_20", "wide_resnet_70_16")
WIDE = re.compile(r"(?:wide[-_]?resnet|wrn)[-_]?(\d+)[-_x](\d+)", re.IGNORECASE)
LARGEST = (
    8192  # channels and pixels beyond it are typing mistakes, and would take the machine's memory before anyone noticed
)

# What a function of a user may call the arguments of `create`; the first name it has is used.
SYNONYMS = {
    "classes": ("classes", "num_classes", "n_classes"),
    "channels": ("channels", "in_channels", "in_chans", "num_channels"),
    "image_size": ("image_size", "img_size"),
    "width": ("width",),
    "mean": ("mean",),
    "std": ("std",),
}


@dataclass(frozen=True)
class Origin:
    """How a model was made: ``create(origin.architecture, **origin.arguments)`` makes it again, with new weights.

    Args:
        architecture: Canonical name, as :func:`canonical` returns it.
        arguments: Keyword arguments of :func:`create`, plain values that JSON can hold.

    Example:
        >>> origin(create("small_cnn", classes=10, width=4)).arguments["width"]
        4
    """

    architecture: str
    arguments: Mapping[str, Any]


def names() -> list[str]:
    """The names of this package's own networks; any ``wide_resnet_D_W`` works beside the published ones listed.

    Returns:
        Sorted names.

    Example:
        >>> "resnet18" in names()
        True
    """
    return sorted([*OWN, *PUBLISHED_WIDE])


def canonical(name: str) -> str:
    """The name under which a model is recorded: ``"WideResNet-28-10"`` and ``"wrn_28_10"`` are ``"wide_resnet_28_10"``.

    Args:
        name: An own name in any usual spelling, ``"timm/<name>"``, ``"file.py:function"`` or ``"module:function"``.

    Returns:
        The canonical name.

    Raises:
        UserError: If the name is none of these; it lists the nearest.

    Example:
        >>> canonical("WRN-28-10"), canonical("PreActResNet-18")
        ('wide_resnet_28_10', 'preact_resnet18')
    """
    if name.startswith("timm/") or ":" in name:
        return name
    if match := WIDE.fullmatch(name):
        return f"wide_resnet_{int(match[1])}_{int(match[2])}"
    letters = {known.replace("_", ""): known for known in OWN}
    compressed = re.sub(r"[-_ ]", "", name.lower())
    if compressed in letters:
        return letters[compressed]
    raise unknown("model", name, [*names(), "timm/<name>", "file.py:function"])


def create(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    image_size: int = 32,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """A classifier of images (B, C, H, W) in [0, 1] that returns logits (B, K), with new weights.

    Args:
        name: One of :func:`names`; any ``wide_resnet_D_W``; ``"timm/<name>"`` for a timm model;
            ``"package.module:function"`` for a function of yours, which is called with those of the arguments below
            that it accepts (``num_classes``, ``in_channels``, ``in_chans`` and ``img_size`` are understood too).
        classes: Number of classes K, at least 2.
        channels: Channels C of the images.
        image_size: Height and width in pixels; some networks choose their stem or strides by it.
        width: Channels of the first stage of an own network; None is the published width.
        mean: Normalisation means in [0, 1], one a channel; None is 0. Normalisation is the model's first layer.
        std: Normalisation standard deviations in (0, 1]; None is 1.
        seed: Seed of the initial weights, leaving torch's generators as found; None draws from torch's default
            generator.
        **arguments: Further arguments of the network: ``activation``, ``head``, ``scale``, ``stem`` and so on; for
            timm those of its model.

    Returns:
        The model in training mode. Own networks and timm models have ``normalize``, ``features(x) -> (B, D)`` and
        ``head``.

    Raises:
        UserError: If the name or an argument is unknown or impossible, or the model cannot process such images.

    Example:
        >>> create("resnet18", classes=10, width=4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> create("resnet81", classes=10)
        Traceback (most recent call last):
            ...
        instar.errors.UserError: unknown model 'resnet81'. Did you mean 'resnet18' ...
    """
    architecture = canonical(name)
    _check_count("classes", classes, 2)
    _check_count("channels", channels, 1)
    _check_count("image_size", image_size, 1)
    if width is not None:
        _check_count("width", width, 1)
    means, stds = statistics(mean, std, channels) if mean is not None or std is not None else (None, None)
    given: dict[str, Any] = {
        "classes": classes,
        "channels": channels,
        "image_size": image_size,
        "width": width,
        "mean": means,
        "std": stds,
    }
    with _seeded(seed):
        if architecture.startswith("timm/"):
            model = _create_timm(architecture.removeprefix("timm/"), given, arguments)
        elif ":" in architecture:
            model = _create_from_code(architecture, given, arguments)
        else:
            model = _create_own(architecture, given, arguments)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    kept = {key: value for key, value in plain.items() if value is not None}
    model._instar_origin = Origin(architecture, {**kept, **arguments})  # type: ignore[assignment]
    return model


def origin(model: nn.Module) -> Origin | None:
    """How :func:`create` made a model, or None for one made elsewhere.

    Args:
        model: Any module.

    Returns:
        Its :class:`Origin`.

    Example:
        >>> origin(create("wrn-10-1", classes=10)).architecture
        'wide_resnet_10_1'
    """
    return getattr(model, "_instar_origin", None)


class Normalized(nn.Module):
    """A foreign network behind a normalisation layer: ``net(normalize(x))``.

    Args:
        net: A module that returns logits (B, K) of normalised images.
        mean: Means in [0, 1]; None is 0.
        std: Standard deviations; None is 1.
        channels: Channels of the images.

    Example:
        >>> Normalized(nn.Flatten(), mean=[0.5], std=[0.5], channels=1)(torch.ones(1, 1, 1, 2))
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean=mean, std=std, channels=channels)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W) in [0, 1]."""
        return self.net(self.normalize(x))


class TimmClassifier(Normalized):
    """A timm network behind a normalisation layer, with the ``features`` and ``head`` of this package's own networks.

    Args:
        net: The timm model.
        mean: Means in [0, 1]; None is 0.
        std: Standard deviations; None is 1.
        channels: Channels of the images.
    """

    @property
    def head(self) -> nn.Module:
        """The classifier layer of timm."""
        return self.net.get_classifier()  # type: ignore[operator]

    def features(self, x: Tensor) -> Tensor:
        """The features (B, D) before the classifier, of images (B, C, H, W) in [0, 1]."""
        return self.net.forward_head(self.net.forward_features(self.normalize(x)), pre_logits=True)  # type: ignore[operator]


def _create_own(architecture: str, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    match = WIDE.fullmatch(architecture)
    build = partial(WideResNet, int(match[1]), int(match[2])) if match else OWN[architecture]
    known = inspect.signature(build).parameters
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of {architecture}", key, set(known) - set(given))
    try:
        return build(**{key: value for key, value in given.items() if value is not None}, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{architecture} refused its arguments: {one_line(error)}") from error


def _create_timm(name: str, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    import timm  # here, because it takes seconds to import and most runs do without it

    known = timm.list_models()
    # Names such as hf-hub:... or local-dir:... fetch or unpickle files that somebody else chose.
    if name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr('timm/' + other) for other in near)}?" if near else ""
        raise UserError(f"unknown timm model {name!r}.{hint} timm.list_models() lists all {len(known)}")
    if given["width"] is not None:
        raise UserError(f"timm models have their width in the name; got width {given['width']} for timm/{name}")
    refused = {"num_classes": "classes", "in_chans": "channels", "img_size": "image_size"}
    for key in arguments:
        if key in refused:
            raise UserError(f"give {refused[key]} instead of timm's {key}")
        if key in ("checkpoint_path", "cache_dir") or key.startswith("pretrained_cfg"):
            raise UserError(
                f"{key} is not taken for timm/{name}, because such files may run code; load the weights afterwards"
            )
    extra = dict(arguments)
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        extra["img_size"] = given["image_size"]
    try:
        net = timm.create_model(name, num_classes=given["classes"], in_chans=given["channels"], **extra)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"timm/{name} refused its arguments: {one_line(error)}") from error
    _keep_stem_in_float(net)
    model = TimmClassifier(net, mean=given["mean"], std=given["std"], channels=given["channels"])
    _check_output(f"timm/{name}", model, given)
    return model


def _keep_stem_in_float(net: nn.Module) -> None:
    """Replaces the first convolution that timm names by one that stays float32 under autocast, same parameters."""
    paths = getattr(net, "pretrained_cfg", {}).get("first_conv") or ()
    for path in (paths,) if isinstance(paths, str) else paths:
        try:
            conv = net.get_submodule(path)
        except AttributeError:
            continue
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
            continue
        stem = FloatStemConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        stem.weight, stem.bias = conv.weight, conv.bias
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, stem)


def _create_from_code(name: str, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    function = own_function(name, what="model")
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted: dict[str, Any] = {}
    for key, value in given.items():
        found_names = [synonym for synonym in SYNONYMS[key] if synonym in parameters]
        if found_names and value is not None:
            accepted[found_names[0]] = value
        elif key == "classes" and takes_any:
            accepted["num_classes"] = value  # the field's usual name; torchvision's functions pass it on
    if given["width"] is not None and "width" not in accepted:
        raise UserError(f"{name} takes no width; got width {given['width']}")
    for key in arguments:
        if key not in parameters and not takes_any:
            raise unknown(f"argument of {name}", key, parameters)
    try:
        model = function(**accepted, **arguments)
    except Exception as error:  # the user's code; the cause stays chained
        raise UserError(f"{name} failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} must return a torch.nn.Module; got {type(model).__name__}")
    if given["mean"] is not None and "mean" not in accepted:
        model = Normalized(model, mean=given["mean"], std=given["std"], channels=given["channels"])
    _check_output(name, model, given)
    return model


def _check_output(name: str, model: nn.Module, given: Mapping[str, Any]) -> None:
    """Runs one black image through a foreign model: a wrong shape is cheaper to report now than in training."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    shape = (1, given["channels"], given["image_size"], given["image_size"])
    modes = {module: module.training for module in model.modules()}
    model.eval()  # BatchNorm buffers stay as they are
    try:
        with torch.no_grad():
            logits = model(torch.zeros(shape, device=device))
    except Exception as error:  # any failure of foreign code means the same: it cannot process such images
        raise UserError(f"{name} cannot process images of shape {shape[1:]}: {one_line(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, given["classes"]):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name} must return logits of shape (1, {given['classes']}) for one image; got {got}")


def _check_count(name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= LARGEST:
        raise UserError(f"{name} must be a whole number from {smallest} to {LARGEST}; got {value!r}")


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    # Models are made on the CPU, so the generators of other devices need no copy.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
