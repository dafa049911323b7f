"""What is to be evaluated: a run folder, a weights file of ours or of others, or a module, and on which images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instar.attacks.transfer import STATE, online
from instar.checkpoint import progress_of
from instar.data import Images, TestSplit, from_dataset, load
from instar.data.catalogue import CATALOGUE
from instar.data.splits import Split
from instar.errors import UserError
from instar.evaluate.normalization import Normalization as Normalization
from instar.evaluate.normalization import Statistics, detect, wanted
from instar.expression import parse
from instar.models import canonical, create, load_foreign, origin, read_card
from instar.models import load as load_weights
from instar.models.files import HUB_WEIGHTS, card_of, weights_of
from instar.models.onnx import OnnxClassifier
from instar.models.reading import absent, kind
from instar.models.registry import Normalized
from instar.models.torchscript import load_torchscript
from instar.runs import CHECKPOINTS, KEPT, check_checkpoint, read_run
from instar.threat import Ball, ball

ONLINE = "online"
"""The weights that the optimiser itself trained, where `CHECKPOINTS` hold their average."""
CHOICES = ("both", *CHECKPOINTS, ONLINE, "all", "kept")
"""What a user may ask for; ``"both"`` is best and last, ``"all"`` adds the online weights of a run with an average, and
``"kept"`` is every epoch that `Settings.keep_every` kept."""


@dataclass(frozen=True)
class Case:
    """One model on one set of images.

    Attributes:
        name: Names the record: ``"best"``, ``"last"``, or the stem of the weights file.
        target: What the caller named.
        model: The network.
        split: The images.
        ball: The threat model.
        checkpoint: ``which``, ``rule`` (how it was chosen, by which images), ``epoch`` and ``file`` as far as known.
        weights: SHA-256 of the weights.
        training: What is known about how it was trained: ``method``, ``data`` and so on.
        folder: Where its records belong, or None.
        twin: Of a run with an average the file of the other weights: the online ones of an average, the average of the
            online ones. None for anything else.
    """

    name: str
    target: str
    model: nn.Module
    split: Split
    ball: Ball
    checkpoint: Mapping[str, Any]
    weights: str
    training: Mapping[str, Any]
    folder: Path | None
    twin: Path | None = None


@dataclass(frozen=True)
class Wishes:
    """What the caller said beside the target; None leaves it to the target or the data set."""

    data: Any = None
    root: str | Path | None = None
    size: int | None = None
    model: str | nn.Module | None = None
    model_arguments: Mapping[str, Any] | None = None
    checkpoint: str = "both"
    norm: str | None = None
    eps: float | str | None = None
    normalize: Normalization = "identity"
    out: str | Path | None = None
    trust: bool = False


def resolve(target: Any, wishes: Wishes) -> list[Case]:
    """The cases that a target stands for: best and last, or those asked for, of a run; one for anything else.

    Args:
        target: Path of a run folder, of a folder of the hub, of a weights file, of an ONNX model or of a TorchScript
            program (with ``trust`` only), or a module.
        wishes: What else was said.

    Returns:
        At least one case.

    Raises:
        UserError: Something is missing, does not exist, or does not fit.
    """
    check_checkpoint(wishes.checkpoint, *(choice for choice in CHOICES if choice not in CHECKPOINTS))
    if isinstance(target, nn.Module):
        return [_module(target, wishes)]
    path = Path(target).expanduser()
    cases = _stored(path, wishes)
    for case in cases:
        _lay_out(case.model)
    return cases


def _stored(path: Path, wishes: Wishes) -> list[Case]:
    if path.is_dir() and (path / HUB_WEIGHTS).is_file() and not (path / "run.json").exists():
        return [_file(path / HUB_WEIGHTS, wishes)]
    if path.is_dir():
        return _run(path, wishes)
    if not path.exists():
        raise UserError(f"there is no run folder or weights file {path}")
    run = path.parent.parent
    if path.parent.name == "checkpoints" and (run / "run.json").is_file():
        if path.stem in CHECKPOINTS or KEPT.fullmatch(path.stem):
            return _run(run, replace(wishes, checkpoint=path.stem))
        if path.name == STATE:
            return _run(run, replace(wishes, checkpoint=ONLINE))
    return [_file(path, wishes)]


def _lay_out(model: nn.Module) -> None:
    """Lay the kernels of convolutions out as NHWC, in which they run faster, as in training; no value changes."""
    dimensions = {parameter.dim() for parameter in model.parameters()}
    if 4 in dimensions and 5 not in dimensions and not isinstance(model, torch.jit.ScriptModule):
        model.to(memory_format=torch.channels_last)


def _run(folder: Path, wishes: Wishes) -> list[Case]:
    run = read_run(folder)
    several = wishes.checkpoint in ("both", "all", "kept")
    names: tuple[str, ...] = (*CHECKPOINTS, wishes.checkpoint) if KEPT.fullmatch(wishes.checkpoint) else CHECKPOINTS
    if wishes.checkpoint == "kept":
        names = tuple(sorted(file.stem for file in (folder / "checkpoints").glob("epoch_*.safetensors")))
    files = {name: folder / "checkpoints" / f"{name}.safetensors" for name in names}
    present = {name: file for name, file in files.items() if file.is_file() and (several or name == wishes.checkpoint)}
    if not present and wishes.checkpoint == "kept":
        raise UserError(f"{folder} kept no epochs but best and last; instar train --keep-every 1 keeps each")
    if not present and wishes.checkpoint != ONLINE:
        asked = " or ".join(files) if several else wishes.checkpoint
        raise UserError(
            f"{folder} has no checkpoint {asked}. Has the run finished its first epoch? Look in "
            f"{folder / 'checkpoints'}"
        )
    named = _named(run.get("data"))
    _refuse_foreign(wishes, f"the run {folder.name}")
    split = _split(named["name"] if wishes.data is None else wishes.data, wishes, _size(named, wishes))
    threat = _ball(wishes, run.get("threat"), split)
    selection = run.get("selection") or {}
    rules = {
        "best": f"best by {selection.get('rule', 'an unknown rule')} on {selection.get('n', 'an unknown number of')} "
        "images held out of the training set",
        "last": "last epoch",
    }
    out = folder / "evaluations" if wishes.out is None else Path(wishes.out)
    training = {key: run.get(key) for key in ("recipe", "method", "precision", "versions")} | {"data": _used(run)}
    state = online_of(folder)
    cases = []
    for name, file in present.items():
        model = load_weights(file, model=_given(wishes, split, read_card(file)))
        card = read_card(file)
        checkpoint: dict[str, Any] = {
            "which": name,
            "rule": rules.get(name, "one of several epochs"),
            "file": file.name,
        }
        checkpoint |= {key: card.get(key) for key in ("epoch", "weights", "selection")}
        cases.append(Case(name, str(folder), model, split, threat, checkpoint, card["sha256"], training, out, state))
    if wishes.checkpoint == ONLINE or (wishes.checkpoint == "all" and has_online(folder)):
        model, checkpoint = _online(folder, wishes, split)
        last = files["last"]
        cases.append(Case(ONLINE, str(folder), model, split, threat, checkpoint, digest(model), training, out, last))
    return cases


def online_of(target: str | Path) -> Path | None:
    """The file with the online weights of a run whose checkpoints hold an average.

    Args:
        target: What is evaluated.

    Returns:
        ``checkpoints/state.safetensors``; None for a run without an average or without that file, and anything else.
    """
    state = Path(target).expanduser() / "checkpoints" / STATE
    last = state.with_name("last.safetensors")
    if not state.is_file() or not last.is_file():
        return None
    return state if read_card(last).get("weights") == "average" else None


def has_online(folder: Path) -> bool:
    """Whether the online weights of a run can be evaluated by themselves; warns where only their file is missing."""
    if online_of(folder) is not None:
        return True
    last = folder / "checkpoints" / "last.safetensors"
    if last.is_file() and read_card(last).get("weights") == "average":
        warnings.warn(f"the online weights of {folder} are not evaluated: {_no_state(folder)}", stacklevel=2)
    return False


def _no_state(folder: Path) -> str:
    return (
        f"there is no {folder / 'checkpoints' / STATE}, the state that a resume needs, which alone holds them beside "
        "their average"
    )


def _online(folder: Path, wishes: Wishes, split: Split) -> tuple[nn.Module, dict[str, Any]]:
    """The online weights of a run, and what is known of them."""
    last = folder / "checkpoints" / "last.safetensors"
    if not last.is_file():
        raise UserError(f"{folder} has no checkpoint last, beside which online weights are told apart")
    if read_card(last).get("weights") != "average":
        raise UserError(
            f"{folder} has no average: its checkpoint last already holds the online weights. Give --checkpoint last"
        )
    state = online_of(folder)
    if state is None:
        raise UserError(f"{folder} cannot be evaluated by its online weights: {_no_state(folder)}")
    model = online(state, model=_given(wishes, split, read_card(last)))
    progress = progress_of(state)
    rule = "online weights, as the optimiser left them at the end; best and last hold their average"
    if progress.step:
        rule = f"online weights after {progress.step} steps of epoch {progress.epoch + 1}, which was not finished"
    checkpoint = {"which": ONLINE, "rule": rule, "file": state.name, "weights": ONLINE}
    # Epochs are counted from 0, and the state names the one that would come next.
    return model, checkpoint | {"epoch": progress.epoch - (0 if progress.step else 1), "selection": None}


def _named(data: Any) -> dict[str, Any]:
    """What a run or card says of its data, with the name under which it can be loaded again."""
    known = dict(data) if isinstance(data, Mapping) else {"name": data}
    name = known.get("name")
    # A folder of pictures is called by its last part, and found by its path.
    return known | {"name": name if name in CATALOGUE else known.get("path") or name}


def _size(named: Mapping[str, Any], wishes: Wishes) -> int | None:
    """The size of pictures that a run or card names, for the data set that it is of and for no other."""
    return named.get("size") if wishes.data is None or wishes.data == named["name"] else None


def _refuse_foreign(wishes: Wishes, what: str) -> None:
    """Refuse what would change nothing: a model of ours has its normalisation and its width.

    Raises:
        UserError: Normalisation, or arguments of a network that was not named, were given.
    """
    if wishes.normalize != "identity":
        raise UserError(f"--normalize is for foreign weights: {what} has its normalisation inside. Leave it out")
    if wishes.model_arguments and wishes.model is None:
        flags = ", ".join(f"--{name}" for name in wishes.model_arguments)
        raise UserError(f"{flags} is for foreign weights: {what} says what network it is. Leave it out")


def _used(run: Mapping[str, Any]) -> dict[str, Any]:
    """The images that weights were fitted to. A run adds none of its own; weights that it began from may have."""
    data = run.get("data")
    known = data if isinstance(data, Mapping) else {"name": data}
    began = (run.get("training") or {}).get("init")
    return {
        "name": known.get("name"),
        "train_images": known.get("train_images"),
        "init": began,
        "additional_data": None if began else False,
    }


def _file(path: Path, wishes: Wishes) -> Case:
    path = weights_of(path) if path.suffix == ".json" else path
    if not path.is_file():
        raise absent(path)
    what = kind(path)
    if what == "torchscript" and not wishes.trust:
        load_torchscript(path)  # refuses, before a large data set is read
    card = _card(path)
    named = _named(card.get("data") or card.get("dataset"))
    if wishes.data is None and named["name"] is None:
        raise UserError(
            f"nothing says which data set {path.name} is for; give data: --data cifar10, in Python data='cifar10'"
        )
    if card and what not in ("onnx", "torchscript"):
        _refuse_foreign(wishes, f"{path.name} with its card")
    split = _split(named["name"] if wishes.data is None else wishes.data, wishes, _size(named, wishes))
    threat = _ball(wishes, card.get("threat"), split)
    checkpoint: dict[str, Any] = {"which": path.stem, "rule": "chosen by whoever gave the file", "file": path.name}
    if what in ("onnx", "torchscript"):
        model = OnnxClassifier(path) if what == "onnx" else load_torchscript(path, trust=wishes.trust)
        model, checkpoint["loaded"] = _normalised(model, wishes, split)
        weights = _sha256(path)
        if card and card["sha256"] != weights:
            raise UserError(f"{path} does not belong to its card: the sha256 differs. Was one of them replaced?")
        checkpoint["loaded"] = f"{path.name}: {what} program, {checkpoint['loaded']}"
    elif card:
        model = load_weights(path, model=_given(wishes, split, card))
        weights, checkpoint["epoch"] = card["sha256"], card.get("epoch")
    else:
        model, checkpoint["loaded"] = _foreign(path, wishes, split)
        weights = _sha256(path)
    out = path.parent / "evaluations" if wishes.out is None else Path(wishes.out)
    training = {"method": card.get("method"), "data": {"name": named["name"]} if card else None}
    return Case(path.stem, str(path), model, split, threat, checkpoint, weights, training, out)


def _foreign(path: Path, wishes: Wishes, split: Split) -> tuple[nn.Module, str]:
    """Somebody else's weights in the network that the caller named, and what became of them."""
    model = _given(wishes, split)
    if model is None:
        raise UserError(
            f"{path.name} does not say what network it is for; give model: --model resnet18, in Python model='resnet18'"
        )
    asked = wanted(wishes.normalize, split.images.info)
    report = load_foreign(path, model, normalize=_for_loading(asked, split))
    if report.normalization == "none":  # a network without such a layer gets one in front
        model, said = _normalised(model, wishes, split)
        return model, f"{report}; {said}"
    if report.normalization == "file" or asked is not None:
        return model, str(report)
    found, how = _chosen(model, wishes, split)
    return model, f"{load_foreign(path, model, normalize=_for_loading(found, split))}, {how}"


def _for_loading(chosen: Statistics | None, split: Split) -> str | Statistics:
    return "identity" if chosen is None or chosen == wanted("identity", split.images.info) else chosen


def _chosen(model: nn.Module, wishes: Wishes, split: Split) -> tuple[Statistics, str]:
    """The normalisation that was asked for, or that a few images tell; and how it was chosen."""
    asked = wanted(wishes.normalize, split.images.info)
    if asked is not None:
        return asked, "as asked for"
    best, tried = detect(model, split)
    warnings.warn(f"normalization detected: {best.name}, by clean accuracy: {tried}", stacklevel=2)
    return (best.mean, best.std), f"detected as {best.name} ({tried})"


def _normalised(model: nn.Module, wishes: Wishes, split: Split) -> tuple[nn.Module, str]:
    """A model behind the normalisation that was asked for or is found out, and that in words."""
    (mean, std), how = _chosen(model, wishes, split)
    if (mean, std) == wanted("identity", split.images.info):
        return model, f"normalization identity, {how}"
    shown = " and std ".join(", ".join(f"{number:.4g}" for number in numbers) for numbers in (mean, std))
    made = origin(model)
    model = Normalized(model, mean=mean, std=std, channels=len(mean))
    if made is not None:
        arguments = {**made.arguments, "mean": list(mean), "std": list(std)}
        model._instar_origin = replace(made, arguments=arguments)  # type: ignore[assignment]
    return model, f"normalization mean {shown}, {how}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(path: Path) -> dict[str, Any]:
    """The card of a file of ours; empty for anybody else's."""
    if not card_of(path).is_file():
        return {}
    try:
        return read_card(path)
    except UserError:
        return {}  # the JSON that somebody else keeps beside weights


def _module(model: nn.Module, wishes: Wishes) -> Case:
    if wishes.data is None:
        raise UserError("give data with a module: the name of a data set, images, a split, or a torch Dataset")
    split = _split(wishes.data, wishes, None)
    made = origin(model)
    checkpoint = {"which": "module", "rule": "a module given from Python"}
    if wishes.normalize != "identity":
        model, checkpoint["loaded"] = _normalised(model, wishes, split)
    out = None if wishes.out is None else Path(wishes.out)
    name = made.architecture.replace("/", "_").replace(":", "_") if made else type(model).__name__
    training: dict[str, Any] = {"method": None, "data": None}
    return Case("module", name, model, split, _ball(wishes, None, split), checkpoint, digest(model), training, out)


def _given(wishes: Wishes, split: Split, card: Mapping[str, Any] | None = None) -> nn.Module | None:
    """The network that the caller chose, or None to take the card's.

    One that the card names too is made as it was for training: with its normalisation, and the arguments of a user's
    own function, which no card may call by itself.
    """
    if wishes.model is None or isinstance(wishes.model, nn.Module):
        return wishes.model
    info = split.images.info
    arguments: dict[str, Any] = {"classes": len(split.classes), "channels": info.shape[0], "image_size": info.shape[1]}
    if card and card.get("architecture") == canonical(wishes.model):
        trained = card.get("arguments") or {}
        arguments = {**arguments, **{name: item for name, item in trained.items() if name != "pretrained"}}
    return create(wishes.model, **{**arguments, **(wishes.model_arguments or {})})


def _split(data: Any, wishes: Wishes, size: int | None) -> Split:
    """The images that were meant."""
    size = size if wishes.size is None else wishes.size
    if data == "custom":
        raise UserError("the run was trained on images given from Python: give the same kind of images as data")
    if isinstance(data, (str, Path)):
        return TestSplit(load(data, split="test", root=wishes.root, size=size))
    if isinstance(data, Split):
        return data
    if isinstance(data, Images):
        return TestSplit(data)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return TestSplit(from_dataset(torch.utils.data.TensorDataset(*data)))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return TestSplit(from_dataset(data))
    raise UserError(
        f"data must be the name of a data set, images, a split, a torch Dataset or a pair of tensors (x, y); got "
        f"{type(data).__name__}"
    )


def _ball(wishes: Wishes, known: Any, split: Split) -> Ball:
    """The threat model: what the caller said, else what the run was trained for, else the data set's usual one."""
    threat = known if isinstance(known, Mapping) else {}
    info = split.images.info
    usual = threat.get("norm") or info.norm
    norm = usual if wishes.norm is None else wishes.norm
    if wishes.eps is not None:
        return ball(norm, radius(wishes.eps))
    if ball(norm, 0.0).norm != ball(usual, 0.0).norm:
        raise UserError(f"eps is needed with norm {norm}: the usual eps here is for {usual}")
    return ball(norm, radius(threat.get("eps", info.eps)))


def radius(eps: float | str) -> float:
    """A radius as people write it.

    Args:
        eps: A number, or text such as ``"8/255"``.

    Returns:
        The number.

    Raises:
        UserError: Not a number.

    Example:
        >>> radius("8/255") == 8 / 255
        True
    """
    try:
        found = parse(eps) if isinstance(eps, str) else eps
    except UserError:
        found = None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise UserError(f"eps must be a number such as 8/255; got {eps!r}. Give eps if training used a schedule")
    return float(found)


def digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's tensors.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> digest(a) == digest(a), digest(a) == digest(b)
        (True, False)
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def described(split: Split) -> str:
    """Which images of which data set, in words.

    Args:
        split: The images.

    Returns:
        For example ``"first 1000 of the 10000 official test images of CIFAR-10"``.
    """
    info = split.images.info
    kind = {"TestSplit": "test", "SelectionSplit": "selection", "TrainSplit": "training"}[type(split).__name__]
    official = "official " if info.name in CATALOGUE and kind == "test" else ""
    count, total = len(split), len(split.images)
    first = torch.equal(split.indices, torch.arange(count))
    even = torch.equal(split.indices, torch.arange(count) * total // max(count, 1))
    if first and count == total:
        return f"all {total} {official}{kind} images of {info.title}"
    which = "first" if first else "evenly spread" if even else "chosen"
    return f"{which} {count} of the {total} {official}{kind} images of {info.title}"
