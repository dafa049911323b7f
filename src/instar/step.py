"""One training step, the same for every method: it holds no method's name and no branch on one."""

from __future__ import annotations

from collections.abc import Mapping
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

END = Progress(epoch=1, epochs=1)
"""The end of any run, where every schedule has its last value."""


class Loss(NamedTuple):
    """What a training step computed before it changed anything.

    Attributes:
        loss: Per-instance loss (B,), with graph; the step backpropagates its mean.
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
    if method.requires is not None and (lacking := method.requires.lacking(model, look_at_scale=False)):
        raise UserError(f"this method needs a model with a cosine head: {lacking}")
    if adversary is None:
        # A stand-in has no weights to differentiate and no head to listen at.
        if attacked is None or method.attack.needs & {"features", "params"}:
            attacked = model
        adversary = method.attack(attacked, batch, generator=generator)
    adversary = _checked(adversary, batch)
    with forward_mode(model, "train"):
        offsets: dict[str, Tensor] = {}
        if method.perturbation is not None and method.perturbation.active:
            ascended = method.perturbation.objective or method.loss

            def loss_of(parameters: Mapping[str, Tensor]) -> Tensor:
                options: dict[str, Any] = {"weights": parameters, "generator": generator}
                seen = _gather(model, method, ascended.needs, batch, adversary, **options)
                return ascended(seen).mean()

            offsets = method.perturbation(_trainable(model), loss_of)
        evidence = _gather(
            model,
            method,
            method.loss.needs,
            batch,
            adversary,
            offsets=offsets,
            updates_bn=method.updates_bn,
            extra=method.needs - method.loss.needs,
            generator=generator,
        )
        loss = method.loss(evidence)
    if loss.shape != batch.y.shape:
        raise UserError(f"the loss must give one number an instance {tuple(batch.y.shape)}; got {tuple(loss.shape)}")
    return Loss(loss, adversary, evidence)


def training_step(
    model: nn.Module,
    method: Method,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
    attacked: nn.Module | None = None,
) -> tuple[Loss, dict[str, Tensor]]:
    """One optimiser step: attack, loss, gradient, update.

    Args:
        model: The network; its modes are left as found.
        method: What to train with.
        batch: The instances.
        optimizer: Over the model's parameters.
        progress: See `training_loss`.
        generator: See `training_loss`.
        attacked: See `training_loss`.

    Returns:
        The loss before the update, and the values (B,) of the method's remembered signals by name.

    Raises:
        UserError: As `training_loss`.
    """
    method = method.at(END if progress is None else progress)
    if method.step is not None:
        return method.step(model, method, batch, optimizer, progress=progress, generator=generator, attacked=attacked)
    computed = training_loss(model, method, batch, generator=generator, attacked=attacked)
    optimizer.zero_grad(set_to_none=True)
    if not computed.loss.requires_grad:
        raise UserError(f"the loss {method.loss!r} depends on no weight: all its coefficients are 0 at this point")
    computed.loss.mean().backward()
    _decay_at_perturbed_weights(model, optimizer, computed.evidence.offsets)
    optimizer.step()
    return computed, remembered(method, computed)


@torch.no_grad()
def remembered(method: Method, computed: Loss) -> dict[str, Tensor]:
    """The values (B,) of a method's remembered signals by name, after a step."""
    return {name: signal(computed.evidence) for name, signal in method.remember}


def _checked(adversary: Adversary, batch: Batch) -> Adversary:
    if adversary.x.shape != batch.x.shape:
        raise UserError(
            f"an adversary must have the shape of its batch {tuple(batch.x.shape)}; got {tuple(adversary.x.shape)}"
        )
    return adversary


def _trainable(model: nn.Module) -> dict[str, Tensor]:
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
    batch: Batch,
    adversary: Adversary,
    *,
    weights: Mapping[str, Tensor] | None = None,
    offsets: Mapping[str, Tensor] | None = None,
    updates_bn: tuple[str, ...] = (),
    extra: frozenset[str] = frozenset(),
    generator: torch.Generator | None = None,
) -> Evidence:
    """Compute what is needed, eagerly and in the order of `FORWARDS`, then the other adversaries.

    Args:
        model: In train mode.
        method: Whose step this is.
        needs: What the loss reads.
        batch: The instances.
        adversary: Their adversaries.
        weights: Parameters in place of the model's own.
        offsets: Perturbation added to the weights, but for the anchors.
        updates_bn: Forwards that may update BatchNorm's running statistics.
        extra: What only remembered signals read: computed without graph and without touching BatchNorm.
        generator: For signals that draw.
    """
    base = dict(weights) if weights is not None else (_trainable(model) if offsets else None)
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
    )
