"""The machine around the training step: data in, steps, selection, records and checkpoints out. It knows no method.

Several processes run the same program on their shares of each batch and hold the same state; the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

import instar
from instar.attacks import Captured, Folded, FoldingError, accelerated, fold
from instar.checkpoint import PREVIOUS, DamagedError, State, load_state
from instar.config import (
    INDIFFERENT,
    Settings,
    build_method,
    build_network,
    choose_acceleration,
    choose_precision,
    find_recipe,
    learning_rate,
    read_value,
)
from instar.data import (
    CutMix,
    ExtraImages,
    Images,
    MixUp,
    SelectionSplit,
    TrainSplit,
    augmentation,
    batches,
    from_dataset,
    hold_out,
    load,
    mixed_batches,
    require_selection,
    steps_per_epoch,
)
from instar.data.indexed import as_float
from instar.description import describe, fingerprint_of, prepare_folder, setting, threat_of
from instar.devices import choose_device
from instar.errors import UserError
from instar.evidence import Batch
from instar.expression import assign, parse
from instar.guards import (
    Alarm,
    Health,
    Lookout,
    Probe,
    clip_gradients,
    deterministic,
    leave_out,
    left_out,
    skipped,
    watch,
)
from instar.instances import InstanceTable, everybody
from instar.interruption import Interrupted as Interrupted  # part of what this module offers
from instar.interruption import signal_name, stop_requests
from instar.method import Method
from instar.methods import Recipe
from instar.models import load_foreign, parameter_groups, save
from instar.models.batch_norm import average_running_statistics, normalised_by
from instar.parallel import Group, claim_gpu, launched
from instar.randomness import generator, key
from instar.room import check_disk, check_memory, sizes, within_memory
from instar.runs import onward, own_code, read_resumable, read_run
from instar.saving import Saves, keep_weights, kept_name, read_log, rewind, state_to_resume, write_log
from instar.schedules import Progress
from instar.selection import SELECTION_STEPS, selection_accuracy
from instar.sharding import Shards
from instar.step import Loss, check_divisible, check_shardable, training_step
from instar.storage import WriteError
from instar.weightspace.average import averaged_copy, reestimate_batch_norm


@dataclass(frozen=True)
class StepDone:
    """Event after an optimiser step; read its numbers lazily, since each read waits for the device.

    Of several processes the first one alone is told, of the instances of all.

    Attributes:
        epoch: Epoch, from 0.
        step: Step in the epoch, from 0.
        steps: Steps in an epoch.
        images: Instances in the step.
        loss: Per-instance losses (B,), detached.
        correct: Whether each adversarial image was classified correctly (B,).
    """

    epoch: int
    step: int
    steps: int
    images: int
    loss: Tensor
    correct: Tensor


@dataclass(frozen=True)
class EpochDone:
    """Event after an epoch: the line that ``log.jsonl`` got.

    Attributes:
        record: Field names and values of the line.
        epochs: Epochs in the run.
    """

    record: Mapping[str, Any]
    epochs: int


Event = StepDone | EpochDone


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: Its folder.
        log: The lines of ``log.jsonl``.
        best: Epoch and accuracies (in [0, 1]) of the best checkpoint on the selection split.
        model: The evaluation weights at the end of training; with ``shard="full"`` the whole network, on the CPU, in
            the first process, and a shard in each other one.
    """

    out: Path
    log: list[dict[str, Any]]
    best: dict[str, float]
    model: nn.Module


@dataclass(frozen=True)
class _Run:
    """All that stays the same while a run goes on."""

    method: Method
    settings: Settings
    out: Path
    train: TrainSplit
    extra: ExtraImages | None
    selection: SelectionSplit
    rows: int
    device: torch.device
    precision: torch.dtype
    acceleration: str
    saves: Saves
    on_event: Callable[[Event], None]
    note: Callable[[str], None]
    group: Group
    health: Health
    lookout: Lookout
    shards: Shards | None = None

    @property
    def steps(self) -> int:
        return steps_per_epoch(self.train, self.settings.batch_size, True)


def train(
    recipe: str | Recipe | Method,
    *,
    out: str | Path,
    resume: bool = False,
    data: str | Images | Any = "digits",
    model: str | nn.Module | None = None,
    arguments: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
    group: Group | None = None,
    **settings: Any,
) -> Result:
    """Train a robust classifier and write everything that explains it into a folder.

    The folder gets ``run.json`` (the whole configuration), ``log.jsonl`` (a line an epoch), ``checkpoints/`` (``best``
    and ``last`` weights, and the state to resume from) and ``instances/`` (a row for every training instance, once an
    epoch). The best checkpoint is chosen by margin PGD-10 on images held out of the training set; test images are
    never touched.

    Started by ``torchrun``, the processes share each batch and write one folder, as one process would. After a restart
    (``--max-restarts``) they go on from the last save by themselves.

    Args:
        recipe: Name of a recipe, a function that returns a `Method`, or a method.
        out: Folder of the run. It must be empty or absent, unless `resume` is set.
        resume: Go on with the run in `out`, exactly as if it had not been interrupted.
        data: Name of a data set, `Images`, or any torch Dataset of pairs (image, label).
        model: Name of a network, or a module that maps images (B, C, H, W) in [0, 1] to logits (B, K).
        arguments: Arguments of the recipe.
        changes: Dotted paths into the method and their values: ``{"attack.eps": 4 / 255}``.
        on_event: Called after each step and each epoch.
        note: Called with a line that a user should see, such as what was taken from `init`.
        group: Processes that train together; None joins those that ``torchrun`` started, if it did. Of several, the
            first one alone calls `on_event` and `note`.
        **settings: Fields of `Settings`: ``epochs``, ``batch_size``, ``seed``, ...

    Returns:
        The finished run.

    Raises:
        UserError: A setting, file or value that cannot work; nothing is lost that was computed before.
        Interrupted: SIGINT or SIGTERM came to any of the processes; the state is saved and `resume` goes on from it.
        ProcessLost: Another process has gone; `resume` goes on from the last save.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> done = train("pgd_at", out=folder, epochs=1, width=4, batch_size=256, arguments={"steps": 1})
        >>> sorted(p.name for p in done.out.iterdir())
        ['checkpoints', 'instances', 'log.jsonl', 'run.json']
    """
    fields = {entry.name for entry in dataclasses.fields(Settings)}
    for name in settings:
        if name not in fields:
            raise instar.errors.unknown("setting", name, fields)
    named_data = data if isinstance(data, str) else "custom"
    named_model = model if isinstance(model, str) else None
    chosen = Settings(**{**settings, "data": named_data, "model": named_model})
    if chosen.device in ("auto", "cuda") and group is None:
        claim_gpu()
    joined = launched(choose_device(chosen.device)) if group is None else contextlib.nullcontext(group)
    fixed = deterministic(chosen.deterministic, device=chosen.device)
    with within_memory(Path(out), chosen), fixed, joined as together:
        quiet = not together.leads
        return _train_together(
            recipe,
            Path(out),
            chosen,
            resume=resume,
            data=data,
            model=model,
            arguments=arguments,
            changes=changes,
            on_event=_ignore if quiet or on_event is None else on_event,
            note=_ignore if quiet else note,
            group=together,
        )


def _ignore(told: object) -> None:
    """What nobody listens to."""


def _train_together(
    recipe: str | Recipe | Method,
    out: Path,
    chosen: Settings,
    *,
    resume: bool,
    data: str | Images | Any,
    model: str | nn.Module | None,
    arguments: Mapping[str, Any] | None,
    changes: Mapping[str, Any] | None,
    on_event: Callable[[Event], None],
    note: Callable[[str], None],
    group: Group,
) -> Result:
    """One process's part in training; see `train`."""
    images = _images(data, chosen)
    info = images.info
    if isinstance(recipe, Method):
        if arguments:
            raise UserError("arguments belong to a recipe; a Method has them already")
        method = recipe
        for path, item in (changes or {}).items():
            method = assign(method, path, item)
    else:
        found = find_recipe(recipe) if isinstance(recipe, str) else recipe
        method = build_method(found, arguments or {}, info=info, settings=chosen, changes=changes)
    for epoch in range(chosen.epochs):  # every number that a schedule will ever give is checked before the start
        method.at(Progress(epoch=epoch, epochs=chosen.epochs))
    check_divisible(method, processes=group.size, accumulate=chosen.accumulate)
    device = group.device(choose_device(chosen.device))
    precision = choose_precision(chosen.precision, device)
    acceleration = choose_acceleration(chosen.accelerate, device)
    network = _network(model, chosen, images, method)
    _check_requirement(method, network)
    sharded = chosen.shard == "full" and not group.alone
    if sharded:
        check_shardable(method)
        network = network.cpu()  # from where it is moved in shards
    else:
        network = network.to(device)
        network = network.to(memory_format=torch.channels_last) if chosen.channels_last else network
    if chosen.init:
        # Weights without normalisation of their own were trained on plain [0, 1] images; the report says what was done.
        note(str(load_foreign(chosen.init, network, new_head=True)))
    train_split, selection = hold_out(images, selection=chosen.held_out(len(images)), seed=chosen.seed)
    if steps_per_epoch(train_split, chosen.batch_size, True) == 0:
        raise UserError(f"batch_size must be at most the {len(train_split)} training images; got {chosen.batch_size}")
    if chosen.batch_size < group.size * chosen.accumulate:
        raise UserError(
            f"batch_size must be at least {group.size * chosen.accumulate}, an instance for each of the {group.size} "
            f"processes times accumulate = {chosen.accumulate}; got {chosen.batch_size}"
        )
    _note_what_sees_the_batch(network, chosen, group, note)
    extra = ExtraImages.open(chosen.extra, info=info, note=note) if chosen.extra else None
    described = describe(recipe, method, chosen, network, images, selection, device, precision, group)
    described["acceleration"] = acceleration
    if extra is not None:
        described["data"]["extra"] = {"images": len(extra), "labels": extra.digest()}
    fingerprint = fingerprint_of(described)

    needed = sizes(network, method, chosen, rows=len(images))

    def prepare() -> bytes:
        going_on = resume or _was_restarted(out, group)
        check_memory(needed.of_each(group.size) if sharded else needed, device)
        check_disk(needed, out, resume=going_on, note=note)
        prepare_folder(out, described, fingerprint, resume=going_on)
        return b"resume" if going_on else b""

    going_on = group.first(prepare) == b"resume"
    run = _Run(
        method=method,
        settings=chosen,
        out=out,
        train=train_split,
        extra=extra,
        selection=require_selection(selection),
        rows=len(images),
        device=device,
        precision=precision,
        acceleration=acceleration,
        saves=Saves(out, fingerprint=fingerprint, settings=chosen, note=note),
        on_event=on_event,
        note=note,
        group=group,
        health=Health(chosen.on_nan, chosen.loss_limit, len(info.classes)),
        lookout=Lookout(chosen.on_collapse, note, out),
    )
    group.equalise(list(network.state_dict().values()))  # a module that is given may have been drawn without a seed
    state = _fresh_state(run, network)
    if going_on:
        # The first process decides for all which state is whole. Killed before its first save, a run begins again.
        named = group.first(lambda: state_to_resume(out, note=note).encode()).decode()
        saved = out / "checkpoints" / named
        there = named != "" and saved.exists()
        if there:
            load_state(state, saved, fingerprint=fingerprint)
        if not group.agree(state.updates if there or not named else -1):
            raise UserError(
                f"not all processes find the same {saved}: --out must lie on a file system that all machines share"
            )
        fitted = group.first(lambda: json.dumps(rewind(out, state, epochs=chosen.epochs, note=note)).encode())
        state.best = json.loads(fitted)
    note(setting(described))
    if sharded:
        shards = Shards(state, group=group, device=device)
        run, state = dataclasses.replace(run, shards=shards), shards.state
    if chosen.clip_grad is not None:
        clip_gradients(state.optimizer, chosen.clip_grad)
    with contextlib.ExitStack() as layers:
        for part in (state.model, state.average):
            if part is not None:
                layers.enter_context(normalised_by(part, chosen.batch_norm, group))
        return _train(run, state)


def _was_restarted(out: Path, group: Group) -> bool:
    """Whether `torchrun` has started this run before, which then left its folder behind."""
    if not (out / "run.json").is_file():
        return False
    return group.restarts > 0 or (group.launch != "" and read_run(out).get("launch") == group.launch)


def _note_what_sees_the_batch(
    network: nn.Module, settings: Settings, group: Group, note: Callable[[str], None]
) -> None:
    """Say it where the network itself stands in the way of the number of parts changing no result."""
    if group.size * settings.accumulate == 1:
        return
    modules = list(network.modules())
    if settings.accumulate > 1 and settings.batch_norm != "frozen" and any(isinstance(m, _BatchNorm) for m in modules):
        note(f"BatchNorm sees each of the {settings.accumulate} pieces of a batch by itself, and results depend on it")
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in modules):
        note("Dropout draws for each part of a batch by itself: results depend on the number of processes and pieces")


def resume(
    out: str | Path,
    *,
    on_event: Callable[[Event], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
    trust: bool = False,
    **where: Any,
) -> Result:
    """Go on with the run in a folder, which knows its own configuration.

    Args:
        out: The run's folder.
        on_event: See `train`.
        note: See `train`.
        trust: Whether a method or model in a file or module of your own, which the run names, may be run.
        **where: `root`, `device`, `accelerate`, `accumulate`, `shard`, `save_every`, `save_steps`, `keep_every`,
            `keep_newest` and what the guards do (`on_nan`, `loss_limit`, `on_collapse`, `probe_every`,
            `deterministic`) may differ from those of the interrupted run, as may the number of processes.

    Returns:
        The finished run.

    Raises:
        UserError: The folder holds no run, or one whose data set or model only Python code can give.
        Interrupted: As `train`.
    """
    stored = read_resumable(out)
    for name in where:
        if name not in INDIFFERENT:
            raise instar.errors.unknown("setting that may differ at a resume", name, INDIFFERENT)
    kept: dict[str, Any] = stored["training"] | {name: item for name, item in where.items() if item is not None}
    if kept["data"] == "custom" or (kept["model"] is None and stored["model"].get("arguments") is None):
        raise UserError(
            f"the data set or model of {out} was given in Python: call instar.train.train(..., resume=True)"
        )
    code = own_code(stored)
    if code and not trust:
        raise UserError(
            f"going on with {out} runs the code that it names, {' and '.join(code)}; if you trust it, {onward(out)}"
        )
    if ":" in stored["recipe"]:
        find_recipe(stored["recipe"])  # imports the user's signals, which the method's expression names
    for entry in dataclasses.fields(Settings):
        if isinstance(kept.get(entry.name), str) and "float" in str(entry.type):
            kept[entry.name] = read_value(kept[entry.name])
    method = parse(stored["method"])
    return train(method, out=out, resume=True, on_event=on_event, note=note, **kept)


def _images(data: Any, settings: Settings) -> Images:
    if isinstance(data, str):
        return load(data, split="train", root=settings.root, size=settings.size)
    return data if isinstance(data, Images) else from_dataset(data)


def _network(model: str | nn.Module | None, settings: Settings, images: Images, method: Method) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    name = settings.model or ("small_cnn" if images.shape[1] < 32 else "resnet18")
    return build_network(method, images, model=name, width=settings.width, seed=settings.seed, stem=settings.stem)


def _check_requirement(method: Method, network: nn.Module) -> None:
    if method.requires is not None and (lacking := method.requires.lacking(network)):
        raise UserError(
            f"this method needs a model with a cosine head: {lacking}. Name one of Instar's models, or give yours "
            f"instar.models.heads.Cosine(..., scale={method.requires.scale:g}) as its attribute `head`"
        )


def _fresh_state(run: _Run, network: nn.Module) -> State:
    settings = run.settings
    groups = parameter_groups(network, settings.weight_decay, decay_norm=settings.decay_norm)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        counted = settings.on_nan == "skip" and run.device.type == "cuda"  # where the decision to skip is made
        betas = (settings.momentum, 0.999)
        optimizer = torch.optim.AdamW(groups, lr=settings.top_lr, betas=betas, capturable=counted)
    else:
        nesterov = settings.nesterov and settings.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=settings.top_lr, momentum=settings.momentum, nesterov=nesterov)
    remembered = tuple(name for name, _ in run.method.remember)
    return State(
        model=network,
        optimizer=optimizer,
        table=InstanceTable(run.rows, remembered=remembered, device=run.device),
        average=averaged_copy(network) if run.method.average is not None else None,
    )


def _stand_in(run: _Run, network: nn.Module) -> Folded | Captured | None:
    """The copy that eval-mode attacks run on, or None where the model or the method does not allow one."""
    asked = run.settings.accelerate if run.settings.accelerate != "auto" else "none"
    if not run.settings.fold or getattr(run.method.attack, "mode", None) != "eval":
        if asked != "none":
            run.note(f"accelerate={asked} is not used: the attack does not run in eval mode, on a folded copy")
        return None
    if run.shards is not None:
        run.note("the attack runs on the sharded model itself, which is slower than on a folded copy (--fold)")
        return None
    half = None if run.precision == torch.float32 else run.precision
    images = as_float(run.train.images.fetch(run.train.indices[:4])).to(run.device)
    try:
        stand_in = fold(network, images, dtype=half, channels_last=run.settings.channels_last)
    except FoldingError as error:
        run.note(f"the attack runs on the model itself, which is slower: it cannot be folded ({error})")
        return None
    return accelerated(stand_in, run.acceleration, run.device, run.note if asked != "none" else _ignore)


def _train(run: _Run, state: State) -> Result:
    stand_in = _stand_in(run, state.model)
    log = read_log(run.out / "log.jsonl", before=state.epoch)
    with stop_requests(patient=not run.group.alone) as requested:
        if run.settings.on_nan == "rollback" and state.updates == 0:
            _save(run, state)  # what there is to go back to
        while state.epoch < run.settings.epochs and not _out_of_patience(run, state):
            if not _epoch(run, state, stand_in, requested, log):
                continue
            record, alarms = _finish_epoch(run, state, log, requested)
            run.on_event(EpochDone(record=record, epochs=run.settings.epochs))
            run.lookout(alarms)
            number = _stop_signal(run, requested)
            if number and state.epoch < run.settings.epochs:
                raise Interrupted(
                    f"{signal_name(number)}: saved at the end of epoch {record['epoch']}; {onward(run.out)}", number
                )
        run.group.any(False)  # nobody leaves while the first process is still writing
    return Result(out=run.out, log=log, best=state.best, model=_evaluated(_whole(run, state) or state))


def _out_of_patience(run: _Run, state: State) -> bool:
    """Whether the best checkpoint is so old that the run ends; a run that is resumed then ends again."""
    patience = run.settings.patience
    if not patience or not state.best or state.epoch - 1 - state.best["epoch"] < patience:
        return False
    run.note(f"no better checkpoint in {patience} epochs: the run ends after {state.epoch} of {run.settings.epochs}")
    return True


def _evaluated(state: State) -> nn.Module:
    """The weights that are selected, saved and evaluated: the average where there is one."""
    return state.average if state.average is not None else state.model


def _epoch(
    run: _Run,
    state: State,
    stand_in: Folded | Captured | None,
    requested: list[int],
    log: list[dict[str, Any]],
) -> bool:
    """Train from ``state.step`` to the end of the epoch; False where the run went back to the last save instead."""
    settings, epoch = run.settings, state.epoch
    state.model.train()
    updates = run.steps * settings.epochs
    passed_over = left_out(state)
    started = time.monotonic()
    counted = state.seconds
    for batch in _stream(run, epoch, first_step=state.step):
        step = state.step
        if state.updates in passed_over:
            state.step, state.updates = step + 1, state.updates + 1
            continue
        rate = learning_rate(settings, update=state.updates, updates=updates)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        rows = _step(run, state, stand_in, batch, Progress(epoch, settings.epochs, step, run.steps))
        state.step, state.updates = step + 1, state.updates + 1
        state.seconds = counted + time.monotonic() - started
        run.on_event(StepDone(epoch, step, run.steps, len(rows["loss"]), rows["loss"], rows["correct"].bool()))
        number = _stop_signal(run, requested)
        probing = settings.probe_every and state.updates % settings.probe_every == 0 and state.step < run.steps
        if (number or probing or run.health.due(state.updates)) and not _well(run, state, log):
            return False
        if number:
            raise _interrupted(run, state, number)
        if probing and (probed := _probe(run, state)) is not None:
            if probed.alarms and settings.on_collapse == "stop":
                _save(run, state)
            run.lookout(probed.alarms)
        # Where the first process decides alone, all of them read at the next step that is due.
        if _everybody_saves(run, run.group.leads and run.saves.due(state)) and run.health.sound(state):
            whole = _whole(run, state)
            if run.group.leads:
                run.saves.attempt(whole or state)
    return _well(run, state, log)


def _well(run: _Run, state: State, log: list[dict[str, Any]]) -> bool:
    """Read what the steps noted, all processes alike; False if the run went back to the last save for one of them."""

    def where(update: int) -> str:
        rate = learning_rate(run.settings, update=update, updates=run.steps * run.settings.epochs)
        return f"in epoch {update // run.steps}, step {update % run.steps} of {run.steps} (learning rate {rate:g})"

    trouble = run.health.read(state, note=run.note, where=where)
    if trouble is None:
        return True
    seconds, numbers = state.seconds, (*left_out(state), trouble.update)
    _go_back(run, state, log)
    leave_out(state, numbers)
    state.seconds = seconds
    if not run.group.agree(state.updates):  # also: nobody still reads what the first process writes now
        raise UserError("the processes went back to different saves; instar train --resume goes on from the last one")
    _save(run, state)
    run.note(
        f"{trouble.text} {where(trouble.update)}: back to epoch {state.epoch}, step {state.step}, to go on without "
        f"that batch ({len(left_out(state))} left out so far)"
    )
    return False


def _go_back(run: _Run, state: State, log: list[dict[str, Any]]) -> None:
    """Load the newest save that is whole and whose weights are numbers: the last one, or the one before it.

    Raises:
        UserError: There is none.
    """
    checkpoints = run.saves.path.parent
    named = run.group.first(lambda: state_to_resume(run.out, note=run.note).encode()).decode()
    for name in dict.fromkeys((named, PREVIOUS)):
        saved = checkpoints / name
        if not name or not saved.exists():
            continue
        load = functools.partial(load_state, path=saved, fingerprint=run.saves.fingerprint)
        try:
            if run.shards is not None:
                run.shards.restore(load)
            else:
                state.optimizer.state.clear()
                load(state)
        except DamagedError as error:
            run.note(str(error))
            continue
        if not run.health.sound(state):
            run.note(f"the weights in {saved} are not finite numbers: it is passed over")
            continue
        if saved != run.saves.path:  # it may be of an epoch before, and what was written since is computed again
            log[:] = [record for record in log if record["epoch"] < state.epoch]
            fitted = run.group.first(
                lambda: json.dumps(rewind(run.out, state, epochs=run.settings.epochs, note=run.note)).encode()
            )
            state.best = json.loads(fitted)
        return
    raise UserError(
        f"no state in {checkpoints} is whole and of finite numbers, so that there is nothing to go back to. Start "
        f"again into another --out; with --init {checkpoints / 'best.safetensors'} it begins from the best weights"
    )


def _save(run: _Run, state: State) -> None:
    """Save what the run cannot do without; all processes wait for it."""
    whole = _whole(run, state)

    def write() -> bytes:
        run.saves.write(whole or state)
        return b""

    run.group.first(write)


def _probe(run: _Run, state: State) -> Probe | None:
    if run.shards is not None:
        return None
    return watch(
        run.method,
        state.model,
        run.selection,
        progress=Progress(state.epoch, run.settings.epochs),
        table=state.table,
        seed=run.settings.seed,
        train_images=len(run.train),
        group=run.group,
    )


def _stream(run: _Run, epoch: int, *, first_step: int = 0) -> Iterator[Batch]:
    """This process's share of the training batches of an epoch: augmented, with their extra images, and mixed."""
    settings, images = run.settings, run.train.images
    usual: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "epoch": epoch,
        "seed": settings.seed,
        "shuffle": True,
        "drop_last": True,
        "augment": augmentation(settings.augment, images.info),
        "device": run.device,
        "first_step": first_step,
    }
    if run.extra is None and settings.mix == "none":
        yield from batches(run.train, group=run.group, **usual)
        return
    # Partners and extra images come from anywhere in the batch: every process reads all of it.
    if run.extra is None:
        stream = batches(run.train, **usual)
    else:
        mixture: dict[str, Any] = {"fraction": settings.extra_fraction, "smoothing": settings.extra_smoothing}
        stream = mixed_batches(run.train, run.extra, **mixture, **usual)
    if settings.mix == "none":
        yield from (batch.share(run.group) for batch in stream)
        return
    mix = CutMix() if settings.mix == "cutmix" else MixUp()
    for step, batch in enumerate(stream, start=first_step):
        draws = generator(settings.seed, epoch=epoch, step=step, purpose="mix", device=run.device)
        yield mix(batch, len(images.classes), draws).share(run.group)


def _step(
    run: _Run, state: State, stand_in: Folded | Captured | None, batch: Batch, progress: Progress
) -> dict[str, Tensor]:
    """One optimiser step with its average and instance table; random numbers are keyed by where the run stands.

    Returns:
        What the table got of every instance of the global batch, (B,) by name.
    """
    where = {"epoch": progress.epoch, "step": progress.step}
    seed, index = run.settings.seed, batch.index
    assert index is not None
    # Dropout and the like draw from the global generator; processes must not drop the same places of their shares.
    torch.manual_seed(key(seed, purpose="model" if run.group.leads else f"model/{run.group.rank}", **where))
    if stand_in is not None:
        stand_in.refresh(state.model)
    kept = run.health.before(state)
    half = run.precision != torch.float32
    usual: Any = {"dtype": run.precision if half else torch.bfloat16, "cache_enabled": run.shards is None}
    with torch.autocast(run.device.type, enabled=half, **usual):
        computed, remembered = training_step(
            state.model,
            run.method,
            dataclasses.replace(batch, memory=state.table.rows(index), shared=state.table.shared),
            state.optimizer,
            progress=progress,
            generator=generator(seed, purpose="attack", device=run.device, **where),
            attacked=stand_in,
            accumulate=run.settings.accumulate,
        )
    if run.settings.batch_norm == "local":
        average_running_statistics(state.model, run.group)
    if state.average is not None and run.method.average is not None:
        run.method.average.update(state.average, state.model, progress)
    rows = everybody(batch.part, {"index": index, **remembered, **_known(batch, computed, progress.epoch)})
    wanted = run.health.after(state, rows, kept)
    state.table.write(wanted["index"], {name: row for name, row in wanted.items() if name != "index"})
    return rows


def _known(batch: Batch, computed: Loss, epoch: int) -> dict[str, Tensor]:
    """What is known of an instance in every run, (B,) by column of the instance table."""
    evidence = computed.evidence
    logits = evidence.adv if evidence.adv is not None else evidence.clean
    correct = torch.zeros_like(batch.y, dtype=torch.bool) if logits is None else logits.argmax(1) == batch.y
    return {
        "seen": torch.full_like(batch.y, epoch),
        "kappa": computed.adversary.kappa,
        "loss": computed.loss.detach(),
        "correct": correct,
    }


def _finish_epoch(
    run: _Run, state: State, log: list[dict[str, Any]], requested: list[int]
) -> tuple[dict[str, Any], tuple[Alarm, ...]]:
    """Measure on the selection split, move on to the next epoch, and write all that belongs to the one that ended.

    Returns:
        Its line, which `log` got, and what a probe has to alarm about.

    Raises:
        UserError: The loss is not finite, or the disk did not take the files; the state before is kept.
        Interrupted: The run was asked to stop while it waited for the disk.
    """
    epoch = state.epoch
    loss = state.table.mean("loss", epoch=epoch)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss became {loss} in epoch {epoch}: the learning rate {run.settings.top_lr:g} may be too high. "
            f"Checkpoints up to epoch {epoch - 1} are kept in {run.out / 'checkpoints'}"
        )
    average = run.method.average
    again = average is not None and average.batch_norm == "reestimate" and run.settings.batch_norm != "frozen"
    if state.average is not None and again:
        reestimate_batch_norm(state.average, (batch.x for batch in _stream(run, epoch)))
        if run.settings.batch_norm == "local":
            average_running_statistics(state.average, run.group)
    _check_equal(run, state)
    evaluated = _evaluated(state)
    clean, robust = selection_accuracy(
        run.method, evaluated, run.selection, seed=run.settings.seed, device=run.device, group=run.group
    )
    rate = learning_rate(run.settings, update=state.updates - 1, updates=run.steps * run.settings.epochs)
    record = {
        "epoch": epoch,
        "lr": rate,
        "train_loss": loss,
        "train_robust": state.table.mean("correct", epoch=epoch),
        "train_kappa": state.table.mean("kappa", epoch=epoch),
        "selection_clean": clean,
        "selection_robust": robust,
        "skipped": skipped(state),
        "seconds": round(state.seconds, 3),
    }
    probed = _probe(run, state)
    record |= probed.record() if probed is not None else {}
    card = {"epoch": epoch, "selection": {"clean": clean, "robust": robust, "rule": f"margin PGD-{SELECTION_STEPS}"}}
    checkpoints = run.out / "checkpoints"
    context = _card(run, evaluated) | card
    better = not state.best or robust > state.best["robust"]
    if better:
        state.best = {"epoch": epoch, "clean": clean, "robust": robust}
    state.epoch, state.step = epoch + 1, 0
    log.append(record)

    whole = _whole(run, state)
    weights = evaluated if whole is None else _evaluated(whole)

    def write() -> None:
        if better:
            save(weights, checkpoints / "best.safetensors", context | {"checkpoint": "best"})
        save(weights, checkpoints / "last.safetensors", context | {"checkpoint": "last"})
        keep_weights(weights, checkpoints, context, run.settings)
        state.table.save(run.out / "instances" / f"{kept_name(epoch)}.npz")
        write_log(run.out / "log.jsonl", log)
        run.saves.write(whole or state)  # last: what a kill leaves unfinished is computed again from the state before

    if run.group.first(lambda: b"" if run.saves.insist(write, stopped=lambda: bool(requested)) else b"stopped"):
        number = _stop_signal(run, requested)
        raise Interrupted(
            f"{signal_name(number)}: the disk did not take the end of epoch {epoch}, which will be computed again from "
            f"the state before it; {onward(run.out)}",
            number,
        )
    return record, probed.alarms if probed is not None else ()


def _check_equal(run: _Run, state: State) -> None:
    """Make sure that all processes still hold the same network.

    Raises:
        UserError: They do not: some part of the method ignores that it sees only a share of the batch.
    """
    if run.group.alone:
        return
    digest = hashlib.blake2b(digest_size=7)
    sharded = run.shards is not None  # then the parameters differ
    same: Iterable[Tensor] = state.model.buffers() if sharded else state.model.state_dict().values()
    for tensor in same:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if not run.group.agree(int.from_bytes(digest.digest(), "big")):
        raise UserError(
            f"the processes hold different weights after epoch {state.epoch}: something in the method or model differs "
            "between them, such as random numbers of its own. The last save is of the epoch before"
        )


def _card(run: _Run, network: nn.Module) -> dict[str, Any]:
    info = run.train.images.info
    return {
        "dataset": info.name,
        "class_names": list(info.classes),
        "method": repr(run.method),
        "threat": threat_of(run.method, run.settings.epochs),
        "seed": run.settings.seed,
        "weights": "average" if run.method.average is not None else "online",
    }


def _stop_signal(run: _Run, requested: list[int]) -> int:
    """The signal by which any process was asked to stop, so that all do after the same step; 0 if none was."""
    return run.group.largest(requested[0] if requested else 0)


def _everybody_saves(run: _Run, due: bool) -> bool:
    """Whether it is time to save: of a sharded run, whose processes gather their shards, the first one decides."""
    return due if run.shards is None else run.group.any(due)


def _whole(run: _Run, state: State) -> State | None:
    """The state as one process would hold it, for files; None in a process that has a shard of it only."""
    return state if run.shards is None else run.shards.gather()


def _interrupted(run: _Run, state: State, number: int) -> Interrupted:
    """Save, and say it."""
    said = f"{signal_name(number)}: saved at epoch {state.epoch}, step {state.step} of {run.steps}"
    whole = _whole(run, state)
    try:
        if run.group.leads:
            run.saves.write(whole or state)
    except WriteError as error:
        said = f"{signal_name(number)}: {error} The state that was saved before is whole"
    return Interrupted(f"{said}; {onward(run.out)}", number)
