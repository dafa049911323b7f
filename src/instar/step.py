"""One training step, the same for every method: it holds no method's name and no branch on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from instar.errors import UserError
from instar.evidence import Adversary, Batch, Evidence
from instar.method import FORWARDS, Method
from instar.models.heads import logit_scale
from instar.modes import captured_features, forward_mode, full
from instar.schedules import Progress
from instar.sharding import displaced, is_sharded, placed, reshard, sum_gradients
from instar.signals import Signal

END = Progress(epoch=1, epochs=1)
"""The end of any run, where every schedule has its last value."""


class Loss(NamedTuple):
    """What a training step computed before it changed anything.

    Attributes:
        loss: Per-instance loss (B,), with graph if it comes from `training_loss`; a step backpropagates its mean.
        adversary: The attacked batch.
        evidence: Everything the loss saw, the weight offsets included.
    """

    loss: Tensor
    adversary: Adversary
    evidence: Evidence


def training_loss(
    model: nn.Module,
    method: Method,
    batch: Batch,
    *,
    adversary: Adversary | None = None,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
    attacked: nn.Module | None = None,
) -> Loss:
    """The per-instance loss of a method, for people with a loop of their own.

    Attacks `batch` (unless `adversary` is given), perturbs the weights if the method does, and evaluates the loss with
    the model in train mode. The model's modes are left as found; nothing is written to ``.grad``.

    Args:
        model: Images (B, C, H, W) in [0, 1] → logits (B, K).
        method: What to train with.
        batch: The instances.
        adversary: A finished attack to use instead of running the method's.
        progress: Where the run stands, for schedules. None means the end of the run, where schedules have their last
            value.
        generator: Source of the attack's random start; None draws from PyTorch's global one.
        attacked: A stand-in for the model during the attack with the same logits (see `instar.attacks.Folded`).

    Returns:
        The loss (B,), the adversary and the evidence; unpacks like a triple.

    Raises:
        UserError: The method needs something that the model or the batch lacks.

    Example:
        >>> from instar.methods import pgd_at
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> batch = Batch(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))
        >>> loss, adversary, evidence = training_loss(net, pgd_at(steps=2), batch)
        >>> loss.shape, adversary.budget
        (torch.Size([3]), 2)
        >>> loss.mean().backward()
    """
    method = method.at(END if progress is None else progress)
    _check_model(model, method)
    if is_sharded(model) and method.perturbation is not None:
        raise UserError("perturbed weights of a sharded network exist within training_step only, not in training_loss")
    if adversary is None:
        piece = _attack(model, method, batch, generator, attacked)
    else:
        piece = _Piece(batch, _checked(adversary, batch), generator)
    with forward_mode(model, "train"):
        offsets = _offsets(model, method, [piece])
        return _loss(method, piece, _evidence(model, method, piece, offsets))


def training_step(
    model: nn.Module,
    method: Method,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
    attacked: nn.Module | None = None,
    accumulate: int = 1,
) -> tuple[Loss, dict[str, Tensor]]:
    """One optimiser step: attack, loss, gradient, update.

    In several processes each is given its share of the batch (`Batch.share`), and all make the same update. In several
    pieces each is attacked; then the coefficients of the loss that look at the whole batch are computed, without
    gradient, which costs the loss's forward passes once more; then each piece's gradient is taken.

    Args:
        model: The network; its modes are left as found.
        method: What to train with.
        batch: The instances.
        optimizer: Over the model's parameters.
        progress: See `training_loss`.
        generator: See `training_loss`. With a share of a batch, or in pieces, it must be given, equal for all.
        attacked: See `training_loss`.
        accumulate: Pieces that the batch is treated in, one after the other, to save memory. The update is that of the
            whole batch, but for layers that look at the batch themselves (BatchNorm, Dropout).

    Returns:
        The loss before the update, detached, and the values (B,) of the method's remembered signals by name.

    Raises:
        UserError: As `training_loss`, or a method that cannot be treated in pieces.
    """
    method = method.at(END if progress is None else progress)
    check_divisible(method, processes=batch.part.group.size, accumulate=accumulate)
    if method.step is not None:
        options: Any = {"progress": progress, "generator": generator, "attacked": attacked, "accumulate": accumulate}
        return method.step(model, method, batch, optimizer, **options)
    _check_model(model, method)
    pieces = [_attack(model, method, piece, generator, attacked) for piece in batch.split(accumulate)]
    optimizer.zero_grad(set_to_none=True)
    done = []
    with forward_mode(model, "train"):
        offsets = _offsets(model, method, pieces)
        with displaced(model, offsets):
            told = _coefficients(
                method.loss, pieces, lambda piece: _evidence(model, method, piece, offsets, final=False)
            )
            for piece, tell in zip(pieces, told, strict=True):
                computed = _loss(method, piece, tell(_evidence(model, method, piece, offsets)))
                if not computed.loss.requires_grad:
                    raise UserError(
                        f"the loss {method.loss!r} depends on no weight: all its coefficients are 0 at this point"
                    )
                piece.batch.part.mean(computed.loss).backward()
                done.append(detached(computed))
    sum_gradients(model, batch.part.group)
    _decay_at_perturbed_weights(model, optimizer, offsets)
    optimizer.step()
    whole = joined(done, batch)
    return whole, remembered(method, whole)


@torch.no_grad()
def remembered(method: Method, computed: Loss) -> dict[str, Tensor]:
    """The values (B,) of a method's remembered signals by name, after a step."""
    return {name: signal(computed.evidence) for name, signal in method.remember}


def check_divisible(method: Method, *, processes: int, accumulate: int) -> None:
    """Refuse a method whose step cannot be divided among processes or into pieces.

    Raises:
        UserError: With the part of the method and the reason.
    """
    if processes * accumulate > 1 and method.step is not None and not method.step.divides:
        raise UserError(
            f"{type(method.step).__name__} makes steps of its own and does not say that it can divide a batch (divides "
            "= True): train in one process with accumulate=1"
        )
    if accumulate == 1:
        return
    for signal in _signals(method.attack):
        if signal.coupling:
            raise UserError(
                f"{signal!r} looks at the whole batch at every step of the attack, which pieces are attacked one after "
                "the other: set accumulate=1, or use more processes"
            )


def check_shardable(method: Method) -> None:
    """Refuse a method whose step cannot be made on a sharded network.

    Raises:
        UserError: With the part of the method and the reason.
    """
    if method.step is not None:
        raise UserError(
            f"{type(method.step).__name__} makes steps of its own, on whole weights: train with --shard none"
        )
    seen = [method.loss, *(signal for _, signal in method.remember), *_signals(method.attack)]
    perturbed = method.perturbation is not None
    if method.perturbation is not None and method.perturbation.objective is not None:
        seen.append(method.perturbation.objective)
    for signal in seen:
        if "params" in signal.needs:
            raise UserError(f"{signal!r} computes with the weights themselves: train with --shard none")
        if "forward" in signal.needs:
            raise UserError(
                f"{signal!r} queries the network again, which a sharded one does not allow: train with --shard none"
            )
        if perturbed and signal.needs & {"anchor", "anchor_adv"}:
            raise UserError(
                f"{signal!r} needs weights with and without {type(method.perturbation).__name__} at the same time, of "
                "which a sharded network holds one: train with --shard none"
            )


def detached(computed: Loss) -> Loss:
    """Without graph, whose memory the next piece needs."""
    seen = computed.evidence
    names = (*FORWARDS, "features")
    logits: Any = {name: None if (z := getattr(seen, name)) is None else z.detach() for name in names}
    others = tuple(z.detach() for z in seen.others)
    return Loss(computed.loss.detach(), computed.adversary, replace(seen, **logits, others=others))


def joined(done: Sequence[Loss], batch: Batch) -> Loss:
    """What was computed of the pieces of `batch`, in one."""
    if len(done) == 1:
        return done[0]
    evidences = [computed.evidence for computed in done]
    adversary = _one_adversary([computed.adversary for computed in done])
    first = evidences[0]
    rows: Any = {name: _one([getattr(evidence, name) for evidence in evidences]) for name in (*FORWARDS, "features")}
    same: Any = ("x", "y", "index", "memory", "target", "labelled", "source", "part")
    evidence = replace(
        first,
        **rows,
        **{name: getattr(batch, name) for name in same},
        x_adv=adversary.x,
        kappa=adversary.kappa,
        inspected=adversary.inspected,
        others=tuple(torch.cat(logits) for logits in zip(*(e.others for e in evidences), strict=True)),
        batchwide=batch.part.batchwide,
    )
    return Loss(torch.cat([computed.loss for computed in done]), adversary, evidence)


def _one(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def _one_adversary(parts: Sequence[Adversary]) -> Adversary:
    rows: Any = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("x", "kappa", "inspected", "moves")
    }
    others = tuple(_one_adversary(others) for others in zip(*(part.others for part in parts), strict=True))
    return replace(parts[0], **rows, others=others)


class _Piece(NamedTuple):
    """A piece of a process's share of the batch, attacked; mostly all of it."""

    batch: Batch
    adversary: Adversary
    generator: torch.Generator | None


def _attack(
    model: nn.Module,
    method: Method,
    batch: Batch,
    generator: torch.Generator | None,
    attacked: nn.Module | None,
) -> _Piece:
    if not batch.part.whole:
        if generator is None:
            raise UserError("a part of a batch needs a generator, by which all parts draw from the same numbers")
        # Every piece draws the numbers of the whole batch, from the same state on.
        generator = _copy(generator) if batch.part.piece else generator
    # A stand-in has no weights to differentiate and no head to listen at.
    if attacked is None or method.attack.needs & {"features", "params"}:
        attacked = model
    return _Piece(batch, _checked(method.attack(attacked, batch, generator=generator), batch), generator)


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(device=generator.device)
    copy.set_state(generator.get_state())
    return copy


def _offsets(model: nn.Module, method: Method, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    """Where the weights are perturbed to, by the gradient of the global batch; nowhere without a perturbation."""
    if method.perturbation is None or not method.perturbation.active:
        return {}
    ascended = method.perturbation.objective or method.loss

    def look(piece: _Piece, parameters: Mapping[str, Tensor]) -> Evidence:
        return _gather(model, method, ascended.needs, piece, weights=parameters)

    def loss_of(parameters: Mapping[str, Tensor]) -> Tensor:
        if is_sharded(model):
            return _loss_of_shards(model, ascended, pieces, look, parameters)
        if pieces[0].batch.part.whole:
            return ascended(look(pieces[0], parameters)).mean()
        return _loss_of_all(ascended, pieces, look, parameters)

    return method.perturbation(_trainable(model), loss_of)


def _loss_of_all(
    signal: Signal,
    pieces: Sequence[_Piece],
    look: Callable[[_Piece, Mapping[str, Tensor]], Evidence],
    parameters: Mapping[str, Tensor],
) -> Tensor:
    """The mean loss over all pieces of all processes, with its gradient: both are known before anybody asks."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    told = _coefficients(signal, pieces, lambda piece: look(piece, leaves))
    total: Tensor | None = None
    sums: dict[int, Tensor] = {}
    for piece, tell in zip(pieces, told, strict=True):
        with torch.enable_grad():
            loss = piece.batch.part.mean(signal(tell(look(piece, leaves))))
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        total = loss.detach() if total is None else total + loss.detach()
        for place, gradient in enumerate(found):
            if gradient is not None:
                sums[place] = sums[place] + gradient if place in sums else gradient.contiguous()
    assert total is not None
    pieces[0].batch.part.group.add_up([total, *sums.values()])
    known: Tensor = _Known.apply(total, sums, *parameters.values())
    return known


def _loss_of_shards(
    model: nn.Module,
    signal: Signal,
    pieces: Sequence[_Piece],
    look: Callable[[_Piece, Mapping[str, Tensor]], Evidence],
    parameters: Mapping[str, Tensor],
) -> Tensor:
    """As `_loss_of_all`, of a sharded network: it computes with the parameters in the place of its own."""
    group, own = pieces[0].batch.part.group, _trainable(model)
    total: Tensor | None = None
    with placed(model, parameters):
        told = _coefficients(signal, pieces, lambda piece: look(piece, {}))
        for piece, tell in zip(pieces, told, strict=True):
            with torch.enable_grad():
                loss = piece.batch.part.mean(signal(tell(look(piece, {}))))
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
    sum_gradients(model, group)
    assert total is not None
    found = {place: own[name].grad for place, name in enumerate(parameters)}
    sums = {place: gradient for place, gradient in found.items() if gradient is not None}
    for parameter in own.values():
        parameter.grad = None
    known: Tensor = _Known.apply(group.total(total), sums, *parameters.values())
    return known


class _Known(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Mapping[int, Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.count = gradients, len(parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = (ctx.gradients.get(place) for place in range(ctx.count))
        return (None, None, *(None if gradient is None else upstream * gradient for gradient in found))


def _coefficients(
    signal: Signal, pieces: Sequence[_Piece], look: Callable[[_Piece], Evidence]
) -> list[Callable[[Evidence], Evidence]]:
    """For each piece a function that adds the answers of `Evidence.batchwide` to its evidence.

    One piece asks the other processes while its loss is computed. Several cannot wait for one another in the middle of
    a loss, which would keep the graphs of all of them: their values are computed first, without gradient.

    Args:
        signal: What will be computed of each piece.
        pieces: This process's share.
        look: The evidence of a piece.
    """
    if len(pieces) == 1 or not signal.coupling:
        return [lambda evidence: evidence] * len(pieces)
    states = [piece.generator.get_state() for piece in pieces if piece.generator is not None]
    with torch.no_grad():
        evidences = [look(piece) for piece in pieces]
        answers: list[list[Tensor]] = [[] for _ in pieces]
        # Signals within signals get their answers first: one more level is right after each round.
        for _ in range(signal.coupling):
            asked: list[list[_Question]] = [[] for _ in pieces]
            for evidence, questions, known, piece, state in zip(evidences, asked, answers, pieces, states, strict=True):
                assert piece.generator is not None
                piece.generator.set_state(state)
                signal(_asking(evidence, questions, known))
            answers = _answers(asked, [piece.batch for piece in pieces])
    for piece, state in zip(pieces, states, strict=True):
        assert piece.generator is not None
        piece.generator.set_state(state)  # the loss draws the same numbers again
    return [_telling(known) for known in answers]


class _Question(NamedTuple):
    """A call of `Evidence.batchwide`."""

    function: Callable[[Tensor], Tensor]
    values: Tensor


def _asking(evidence: Evidence, questions: list[_Question], known: Sequence[Tensor]) -> Evidence:
    """The evidence, whose `batchwide` answers what is known and keeps what was asked."""

    def batchwide(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        place = len(questions)
        questions.append(_Question(function, values))
        return known[place] if place < len(known) else function(values)

    return replace(evidence, batchwide=batchwide)


def _telling(answers: Sequence[Tensor]) -> Callable[[Evidence], Evidence]:
    """Gives evidence a `batchwide` with these answers, in the order in which they were asked for."""

    def tell(evidence: Evidence) -> Evidence:
        left = iter(answers)
        return replace(evidence, batchwide=lambda function, values: next(left))

    return tell


def _answers(asked: Sequence[Sequence[_Question]], batches: Sequence[Batch]) -> list[list[Tensor]]:
    """For each piece, its rows of every function of the whole batch."""
    if len({len(questions) for questions in asked}) != 1:
        raise UserError("a signal calls batchwide() for some instances and not for others")
    part = batches[0].part
    answers: list[list[Tensor]] = [[] for _ in asked]
    for questions in zip(*asked, strict=True):
        share = torch.cat([question.values for question in questions])
        everybody = questions[0].function(part.group.gather(share, part.size(share)))
        for found, batch in zip(answers, batches, strict=True):
            found.append(batch.part.of(everybody))
    return answers


def _evidence(
    model: nn.Module, method: Method, piece: _Piece, offsets: Mapping[str, Tensor], *, final: bool = True
) -> Evidence:
    """What the loss sees; when it is not the final look, nothing is updated and nothing else is computed."""
    return _gather(
        model,
        method,
        method.loss.needs,
        piece,
        offsets=offsets,
        updates_bn=method.updates_bn if final else (),
        extra=method.needs - method.loss.needs if final else frozenset(),
    )


def _loss(method: Method, piece: _Piece, evidence: Evidence) -> Loss:
    loss = method.loss(evidence)
    if loss.shape != piece.batch.y.shape:
        raise UserError(
            f"the loss must give one number an instance {tuple(piece.batch.y.shape)}; got {tuple(loss.shape)}"
        )
    return Loss(loss, piece.adversary, evidence)


def _signals(part: Any) -> Iterator[Signal]:
    """The signals that an attack is made of."""
    if isinstance(part, Signal):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _signals(item)
    elif is_dataclass(part):
        for entry in fields(part):
            yield from _signals(getattr(part, entry.name))


def _check_model(model: nn.Module, method: Method) -> None:
    if method.requires is not None and (lacking := method.requires.lacking(model, look_at_scale=False)):
        raise UserError(f"this method needs a model with a cosine head: {lacking}")


def _checked(adversary: Adversary, batch: Batch) -> Adversary:
    if adversary.x.shape != batch.x.shape:
        raise UserError(
            f"an adversary must have the shape of its batch {tuple(batch.x.shape)}; got {tuple(adversary.x.shape)}"
        )
    return adversary


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _decay_at_perturbed_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, offsets: Mapping[str, Tensor]
) -> None:
    """Published AWP codes let weight decay see w + v: add its difference, decay · v, to the gradients.

    Exact for SGD, whose decay is part of the gradient; optimisers with decoupled decay shrink w itself.
    """
    if not offsets or not isinstance(optimizer, torch.optim.SGD):
        return
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name in offsets and parameter.grad is not None and decay.get(id(parameter)):
            parameter.grad.add_(offsets[name], alpha=decay[id(parameter)])


def _gather(
    model: nn.Module,
    method: Method,
    needs: frozenset[str],
    piece: _Piece,
    *,
    weights: Mapping[str, Tensor] | None = None,
    offsets: Mapping[str, Tensor] | None = None,
    updates_bn: tuple[str, ...] = (),
    extra: frozenset[str] = frozenset(),
) -> Evidence:
    """Compute what is needed, eagerly and in the order of `FORWARDS`, then the other adversaries.

    Args:
        model: In train mode.
        method: Whose step this is.
        needs: What the loss reads.
        piece: The instances and their adversaries.
        weights: Parameters in place of the model's own.
        offsets: Perturbation added to the weights, but for the anchors.
        updates_bn: Forwards that may update BatchNorm's running statistics.
        extra: What only remembered signals read: computed without graph and without touching BatchNorm.
    """
    batch, adversary, generator = piece
    # The weights of a sharded network are in their place already: they can be handed over to no call.
    in_place = is_sharded(model)
    base = None if in_place else dict(weights) if weights is not None else (_trainable(model) if offsets else None)
    moved = (
        {name: p + offsets[name] if name in offsets else p for name, p in base.items()} if base and offsets else base
    )

    def forward(x: Tensor, parameters: Mapping[str, Tensor] | None = moved, *, update: bool = False) -> Tensor:
        if parameters is None and update:
            return full(model(x))
        buffers = {} if update else {name: buffer.clone() for name, buffer in model.named_buffers()}
        return full(functional_call(model, {**(parameters or {}), **buffers}, (x,)))

    logits: dict[str, Tensor] = {}
    with captured_features(model, wanted="features" in needs | extra) as captured:
        for name in FORWARDS:
            if name not in needs | extra:
                continue
            captured.clear()
            x = adversary.x if name.endswith("adv") else batch.x
            parameters = base if name.startswith("anchor") else moved
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in needs):
                logits[name] = forward(x, parameters, update=name in updates_bn and name in needs)
        features = captured[-1] if captured else None
        others = tuple(forward(other.x) for other in adversary.others) if "others" in needs else ()
    return Evidence(
        x=batch.x,
        y=batch.y,
        clean=logits.get("clean"),
        adv=logits.get("adv"),
        anchor=logits.get("anchor"),
        anchor_adv=logits.get("anchor_adv"),
        x_adv=adversary.x,
        kappa=adversary.kappa,
        inspected=adversary.inspected,
        budget=adversary.budget,
        index=batch.index,
        memory=batch.memory,
        target=batch.target,
        labelled=batch.labelled,
        source=batch.source,
        others=others,
        features=features,
        params=moved or _trainable(model) if "params" in needs | extra else None,
        ball=getattr(method.attack, "ball", None),
        scale=logit_scale(model),
        shared=batch.shared,
        offsets=offsets or {},
        generator=generator,
        forward=forward,
        batchwide=batch.part.batchwide,
        part=batch.part,
    )
