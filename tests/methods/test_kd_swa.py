"""KD+SWA: the distillation term by its formula, teachers that are who they say they are, and a run with one."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import instar as I
from instar.methods.kd_swa import Distillation, file_hash
from instar.models import create, load, save
from instar.passes import Passes, passes
from instar.train import Event, Interrupted, StepDone, resume, train

MODULE = importlib.import_module("instar.methods.kd_swa")  # the package's attribute of that name is the recipe
SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 2, "precision": "float32"}
SIZE, CLASSES = 6, 10


def _network(seed: int, classes: int = CLASSES) -> nn.Module:
    made = create("small_cnn", classes=classes, channels=1, image_size=8, width=4, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2, generator=draws)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=draws)
        for name, parameter in made.named_parameters():
            if name.startswith("head"):
                parameter.mul_(5)
    return made


@pytest.fixture
def robust(tmp_path: Path) -> Path:
    path = tmp_path / "robust.safetensors"
    save(_network(1), path, {})
    return path


@pytest.fixture
def standard(tmp_path: Path) -> Path:
    path = tmp_path / "standard.safetensors"
    save(_network(2), path, {})
    return path


@pytest.fixture
def batch() -> I.Batch:
    return I.Batch(torch.rand(SIZE, 1, 8, 8), torch.arange(SIZE) % CLASSES)


@pytest.fixture
def evidence(batch: I.Batch) -> I.Evidence:
    x_adv = (batch.x + 0.2 * torch.randn_like(batch.x)).clamp(0, 1)
    logits = torch.randn(SIZE, CLASSES, dtype=torch.float64, requires_grad=True)
    return I.Evidence(x=batch.x, y=batch.y, x_adv=x_adv, adv=logits)


@pytest.fixture(autouse=True)
def forgotten_teachers() -> Iterator[None]:
    """Every test opens its teachers anew, as another process would."""
    MODULE._teacher.cache_clear()
    yield
    MODULE._teacher.cache_clear()


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance)


def _taught(path: Path, x: Tensor) -> Tensor:
    with torch.no_grad():
        return load(path)(x).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_distillation_is_the_scaled_divergence_from_what_the_teacher_says_of_the_adversary(
    robust: Path, evidence: I.Evidence, temperature: float
) -> None:
    teacher, logits = _taught(robust, evidence.x_adv), evidence.adv
    expected = []
    for t, z in zip(teacher.tolist(), logits.tolist(), strict=True):
        p, q = ([math.exp(v / temperature) for v in row] for row in (t, z))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = Distillation(str(robust), temperature=temperature)(evidence)
    _near(found, torch.tensor(expected, dtype=torch.float64), 1e-10)
    assert min(expected) > 1e-2
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    _near(gradient, temperature * ((logits / temperature).softmax(1) - (teacher / temperature).softmax(1)), 1e-10)
    of_clean = replace(evidence, x_adv=None)  # where there is no adversary, the image itself
    assert not torch.allclose(Distillation(str(robust), temperature=temperature)(of_clean), found)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(robust: Path, evidence: I.Evidence) -> None:
    logits = _taught(robust, evidence.x_adv).requires_grad_()
    found = Distillation(str(robust))(replace(evidence, adv=logits))
    _near(found, torch.zeros(SIZE, dtype=torch.float64), 1e-14)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    _near(gradient, torch.zeros_like(gradient), 1e-14)


def test_a_teacher_is_frozen_in_eval_mode_and_gets_no_gradient(
    robust: Path, batch: I.Batch, evidence: I.Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[nn.Module] = []

    def watched(path: str) -> nn.Module:
        opened.append(load(path).train())
        return opened[-1]

    monkeypatch.setattr(MODULE, "load", watched)
    method, student = I.kd_swa(robust=str(robust), steps=2), _network(0).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        I.training_step(student, method, batch, optimizer)
    assert len(opened) == 1, "a teacher is read once, not once a step"
    teacher = opened[0]
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    kept = load(robust).state_dict()
    assert all(torch.equal(t, kept[name]) for name, t in teacher.state_dict().items())
    whole = Distillation(str(robust))(evidence)
    for i in range(SIZE):
        alone = replace(evidence, x_adv=evidence.x_adv[i : i + 1], adv=evidence.adv[i : i + 1])
        _near(Distillation(str(robust))(alone)[0], whole[i], 1e-6)


def test_images_get_no_gradient_through_a_teacher(robust: Path, evidence: I.Evidence) -> None:
    x = evidence.x_adv.clone().requires_grad_()
    logits = (x.sum((1, 2, 3), keepdim=True).flatten(1) * torch.arange(CLASSES)).double()
    (through,) = torch.autograd.grad(Distillation(str(robust))(replace(evidence, x_adv=x, adv=logits)).sum(), x)
    (alone,) = torch.autograd.grad(
        Distillation(str(robust))(
            replace(evidence, x_adv=x.detach(), adv=(x.sum((1, 2, 3)).unsqueeze(1) * torch.arange(CLASSES)).double())
        ).sum(),
        x,
    )
    assert torch.equal(through, alone)


def test_a_teacher_answers_in_float32_while_the_student_runs_in_bfloat16(robust: Path, evidence: I.Evidence) -> None:
    usual = Distillation(str(robust))(evidence)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Distillation(str(robust))(evidence), usual)


def _one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(I.UserError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_a_teacher_whose_file_was_changed_is_refused(robust: Path, evidence: I.Evidence) -> None:
    loss = I.kd_swa(robust=str(robust)).loss
    save(_network(3), robust, {})
    _one_line(lambda: loss(evidence), "is another file than the run began with: sha256 [0-9a-f]{12}…")
    save(_network(1), robust, {})
    assert bool(loss(evidence).isfinite().all())


def test_a_teacher_that_is_missing_damaged_or_a_folder_is_refused(
    robust: Path, evidence: I.Evidence, tmp_path: Path
) -> None:
    missing = str(tmp_path / "nobody.safetensors")
    _one_line(lambda: I.kd_swa(robust=missing), r"cannot read the teacher .*nobody.safetensors: No such file")
    _one_line(lambda: Distillation(missing)(evidence), "cannot read the teacher")
    _one_line(lambda: I.kd_swa(robust=str(tmp_path)), "cannot read the teacher .*directory")
    robust.write_bytes(robust.read_bytes()[:-50])
    _one_line(lambda: I.kd_swa(robust=str(robust)).loss(evidence), "robust.safetensors")


def test_a_teacher_of_other_classes_is_refused(evidence: I.Evidence, tmp_path: Path) -> None:
    path = tmp_path / "three.safetensors"
    save(_network(1, classes=3), path, {})
    _one_line(lambda: I.kd_swa(robust=str(path)).loss(evidence), "knows 3 classes, the model 10")


def test_without_any_teacher_it_is_refused() -> None:
    _one_line(I.kd_swa, "needs a teacher: --standard WEIGHTS, --robust WEIGHTS, or both")


@pytest.mark.parametrize(
    "weights",
    [
        {"standard_weight": 0.5, "robust_weight": 0.6},
        {"standard_weight": -0.1},
        {"robust_weight": 1.1, "standard_weight": 0.0},
        {"robust_weight": -0.1},
    ],
)
def test_weights_outside_of_the_simplex_are_refused(robust: Path, standard: Path, weights: dict[str, float]) -> None:
    _one_line(lambda: I.kd_swa(robust=str(robust), standard=str(standard), **weights), "lie in .0, 1. together")


def test_a_temperature_that_is_not_positive_is_refused(robust: Path) -> None:
    for temperature in (0.0, -1.0, math.nan):
        _one_line(lambda t=temperature: I.kd_swa(robust=str(robust), temperature=t), "must be positive")


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        (("standard", "robust"), (0.3, 0.1, 0.6)),
        (("robust",), (0.4, 0.0, 0.6)),
        (("standard",), (0.9, 0.1, 0.0)),
    ],
    ids=["both", "robust", "standard"],
)
def test_the_terms_have_the_published_weights_and_the_cross_entropy_what_is_left(
    standard: Path, robust: Path, evidence: I.Evidence, teachers: tuple[str, ...], expected: tuple[float, ...]
) -> None:
    paths = {"standard": standard, "robust": robust}
    loss = I.kd_swa(**{name: str(paths[name]) for name in teachers}).loss
    plain = F.cross_entropy(evidence.adv, evidence.y, reduction="none")
    terms = [Distillation(str(path), temperature=2.0)(evidence) for path in (standard, robust)]
    hand = expected[0] * plain + expected[1] * terms[0] + expected[2] * terms[1]
    _near(loss(evidence), hand)
    assert float((terms[0] - terms[1]).detach().abs().min()) > 1e-3, "two teachers that agree would show nothing"


def test_the_paths_may_hold_quotes_and_the_method_reads_back_as_it_was_printed(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "one" \\ teacher é'
    folder.mkdir()
    path = folder / "last.safetensors"
    save(_network(1), path, {})
    method = I.kd_swa(standard=str(path), robust=str(path), temperature=3.0, begin=0.5, eps=0.1)
    text = repr(method)
    assert I.parse(text) == method
    assert repr(I.parse(text)) == text
    assert text.count(file_hash(path)) == 2
    assert method.average == I.SWA(0.5)
    assert I.kd_swa(robust=str(path)).average == I.SWA(55 / 200)


def test_with_both_weights_zero_it_is_pgd_at_with_swa_bit_for_bit(robust: Path, batch: I.Batch) -> None:
    states = []
    method = I.kd_swa(robust=str(robust), standard_weight=0.0, robust_weight=0.0, steps=3)
    robust.unlink()  # a term of weight 0 does not even ask its teacher
    for each in (method, I.pgd_at(steps=3)):
        net = copy.deepcopy(_network(0)).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for update in range(2):
            I.training_step(net, each, batch, optimizer, generator=torch.Generator().manual_seed(update))
        states.append(list(net.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_teachers_cost_no_pass_of_the_student(robust: Path, batch: I.Batch) -> None:
    student, method = _network(0).train(), I.kd_swa(robust=str(robust))
    forwards: list[int] = []
    student.register_forward_pre_hook(lambda *_: forwards.append(1))
    I.training_loss(student, method, batch)
    assert len(forwards) == passes(I.pgd_at()).forward == 11
    assert passes(replace(method, loss=I.CrossEntropy())) == Passes(11, 10, 1)


def _interrupting(at: int) -> Callable[[Event], None]:
    """Ask to stop after the step with this number in the run, as Ctrl-C does."""
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        if isinstance(event, StepDone):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGINT)

    return watch


def test_a_run_learns_from_its_teacher_knows_its_hash_and_resumes_with_no_other(tmp_path: Path) -> None:
    train("pgd_at", out=tmp_path / "teacher", arguments={"steps": 1}, **SMALL | {"epochs": 1, "ema": 0.0})
    path = tmp_path / "teacher" / "checkpoints" / "last.safetensors"
    arguments = {"robust": str(path), "steps": 1, "begin": 0.0}
    done = train("kd_swa", out=tmp_path / "run", arguments=arguments, seed=1, **SMALL)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert file_hash(path) in stored["method"]
    assert I.parse(stored["method"]).average == I.SWA(0.0)
    assert [line["epoch"] for line in done.log] == [0, 1]

    # The loss that was logged is that of the terms: without its teacher the same first step has another one.
    losses: dict[str, list[float]] = {"with": [], "without": []}
    for name, weight in (("with", 0.6), ("without", 0.0)):
        events: list[Event] = []
        chosen = arguments | {"robust_weight": weight}
        train("kd_swa", out=tmp_path / name, arguments=chosen, seed=1, on_event=events.append, **SMALL | {"epochs": 1})
        losses[name] = [float(e.loss.mean()) for e in events if isinstance(e, StepDone)]
    assert abs(losses["with"][0] - losses["without"][0]) > 1e-2

    with pytest.raises(Interrupted):
        train("kd_swa", out=tmp_path / "parts", arguments=arguments, seed=1, on_event=_interrupting(7), **SMALL)
    right = path.read_bytes()
    MODULE._teacher.cache_clear()
    path.write_bytes((tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes())
    _one_line(lambda: resume(tmp_path / "parts"), "another file than the run began with")
    path.write_bytes(right)
    resume(tmp_path / "parts")
    for file in ("state", "last"):
        a, b = (load_file(tmp_path / run / "checkpoints" / f"{file}.safetensors") for run in ("run", "parts"))
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
