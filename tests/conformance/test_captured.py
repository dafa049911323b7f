"""Attacks that are recorded once and replayed: the same numbers, from wherever the weights and the batches are now.

On the CPU a recorder that remembers the work and does it again takes the place of CUDA graphs; where a GPU is at hand,
the same tests run on it with the graphs themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import instar as I
from instar.attacks import captured
from instar.attacks.captured import Captured, CudaGraphs, Recording, Work, accelerated, unfit
from instar.evidence import Batch
from instar.models import create
from instar.parallel import Group
from instar.schedules import Progress
from instar.signals import KL, CrossEntropy, Margin, Patience, Signal
from instar.threat import L1, L2, Linf

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


class Recorder:
    """Records as the device does it, and counts; on the CPU the work is done again, into the same tensors."""

    def __init__(self, device: torch.device) -> None:
        self.graphs = CudaGraphs(device) if device.type == "cuda" else None
        self.recorded = self.replayed = 0

    def __call__(self, work: Work) -> Recording:
        self.recorded += 1
        made = self.graphs(work) if self.graphs is not None else self._remembered(work)

        def replay() -> None:
            self.replayed += 1
            made.replay()

        return Recording(made.results, replay)

    def _remembered(self, work: Work) -> Recording:
        results = tuple(torch.full_like(found, 77) for found in work())  # a graph holds nothing before its first replay

        def replay() -> None:
            for held, found in zip(results, work(), strict=True):
                held.copy_(found)

        return Recording(results, replay)


def _network(device: torch.device, head: str = "linear") -> nn.Module:
    net = create("small_cnn", classes=3, channels=1, image_size=8, width=2, mean=[0.5], std=[0.3], seed=0, head=head)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.8, 2.0)
    return net.double().to(device)


def _batch(device: torch.device, number: int, count: int = 6, *, soft: bool = False) -> Batch:
    draws = torch.Generator().manual_seed(number)
    x = torch.rand(count, 1, 8, 8, generator=draws, dtype=torch.float64)
    target = torch.rand(count, 3, generator=draws, dtype=torch.float64).softmax(1).to(device) if soft else None
    return Batch(x.to(device), torch.randint(3, (count,), generator=draws).to(device), target=target)


def _draws(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _train(net: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(by)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.mul_(2 - by)


def _same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit; libraries of a GPU may add up in another order each time."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if found.device.type == "cpu" else 1e-9)


def _equal(found: I.Adversary, expected: I.Adversary) -> None:
    for name in ("x", "kappa", "inspected", "moves"):
        _same(getattr(found, name), getattr(expected, name))
    assert found.budget == expected.budget


ATTACKS = {
    "pgd": I.pgd_at(steps=3).attack,
    "trades": I.trades(steps=3).attack,
    "margin in L2": I.PGD(L2(0.5), Margin(), steps=3, step_size=0.2),
    "L1": I.PGD(L1(2.0), steps=2, step_size=0.5),
    "no step": I.PGD(steps=0),
    "a rule that stops nothing": I.p_sat(steps=2, bound=1.0).at(Progress(0, 1)).attack,
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_replays_follow_weights_batches_and_draws(name: str, head: str, device: torch.device) -> None:
    net, attack, record = _network(device, head), ATTACKS[name], Recorder(device)
    stand_in = Captured(I.Folded(net), record)
    for number in range(5):
        _train(net, 0.9)
        stand_in.refresh(net)
        batch = _batch(device, number, soft=name == "pgd")
        found = attack(stand_in, batch, generator=_draws(device, number))
        _equal(found, attack(I.Folded(net), batch, generator=_draws(device, number)))
    assert (record.recorded, record.replayed) == (1, 4)


def test_what_a_replay_found_stays_as_it_was_found(device: torch.device) -> None:
    net = _network(device)
    stand_in, attack = Captured(I.Folded(net), Recorder(device)), I.PGD(steps=2)
    found = [attack(stand_in, _batch(device, number), generator=_draws(device, number)) for number in range(4)]
    for number, one in enumerate(found):
        _equal(one, attack(I.Folded(net), _batch(device, number), generator=_draws(device, number)))


def test_a_form_is_recorded_when_it_comes_again(device: torch.device) -> None:
    record = Recorder(device)
    stand_in, attack = Captured(I.Folded(_network(device)), record), I.PGD(steps=2)
    sizes = [6, 6, 4, 6, 4, 4, 6]
    for number, size in enumerate(sizes):
        attack(stand_in, _batch(device, number, size), generator=_draws(device, number))
    assert (record.recorded, record.replayed) == (2, len(sizes) - 2)
    attack(stand_in, _batch(device, 0, soft=True))  # other targets are another form
    replace(attack, step_size=0.01)(stand_in, _batch(device, 0))
    assert record.recorded == 2
    replace(attack, start=I.Zero())(stand_in, _batch(device, 0))  # the start is drawn outside
    assert (record.recorded, record.replayed) == (2, len(sizes) - 1)


def test_numbers_that_change_at_every_step_are_never_recorded(device: torch.device) -> None:
    record = Recorder(device)
    stand_in = Captured(I.Folded(_network(device)), record)
    for number in range(2 * captured.IDLE):
        I.PGD(Linf(0.01 + number / 1000), steps=1)(stand_in, _batch(device, number))
    assert record.recorded == 0


def test_more_attacks_in_turn_than_are_held_are_not_recorded_again_and_again(device: torch.device) -> None:
    record = Recorder(device)
    stand_in = Captured(I.Folded(_network(device)), record)
    attacks = [I.PGD(steps=1, step_size=(k + 1) / 1000) for k in range(captured.HELD + 2)]
    for number in range(5):
        for attack in attacks:
            attack(stand_in, _batch(device, number))
    assert record.recorded == captured.HELD
    assert record.replayed == captured.HELD * 4
    for number in range(captured.IDLE + 2):  # the schedule has gone on: an old one gives way
        attacks[-1](stand_in, _batch(device, number))
    assert record.recorded == captured.HELD + 1


def test_a_network_that_has_moved_in_memory_is_recorded_anew(device: torch.device) -> None:
    net, record, attack = _network(device, "cosine"), Recorder(device), I.PGD(steps=2)
    folded = I.Folded(net)
    stand_in = Captured(folded, record)

    def check(recorded: int) -> None:
        for number in range(2):
            stand_in.refresh(net)
            found = attack(stand_in, _batch(device, number), generator=_draws(device, number))
            _equal(found, attack(I.Folded(net), _batch(device, number), generator=_draws(device, number)))
        assert record.recorded == recorded

    check(1)
    first = next(iter(dict(folded.named_parameters())))
    owner, _, key = first.rpartition(".")
    folded.get_submodule(owner)._parameters[key] = nn.Parameter(
        folded.get_parameter(first).detach().clone(), requires_grad=False
    )
    check(2)
    net.head.scale = torch.full_like(net.head.scale, 3.0)  # the model's own tensor, which objectives divide by
    check(3)


def test_refreshing_allocates_nothing(device: torch.device) -> None:
    net = _network(device)
    folded = I.Folded(net, dtype=torch.bfloat16)
    before = [t.data_ptr() for t in (*folded.parameters(), *folded.buffers())]
    _train(net, 0.5)
    folded.refresh(net)
    assert [t.data_ptr() for t in (*folded.parameters(), *folded.buffers())] == before


class Coupled(Signal):
    """A weight that every instance of the batch has a part in."""

    couples = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"adv"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return evidence.batchwide(lambda values: values / values.sum(), CrossEntropy()(evidence).detach())


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (I.fat(steps=3).at(Progress(0, 1)).attack, "stops instances"),
        (I.p_sat(steps=3, bound=0.0).at(Progress(0, 1)).attack, "stops instances"),
        (I.PGD(mode="train", steps=2), "mode 'train'"),
        (I.PGD(objective=Coupled() * CrossEntropy(), steps=2), "looks at the whole batch"),
    ],
    ids=["fat", "p_sat", "train", "coupled"],
)
def test_what_cannot_be_captured_runs_as_ever_and_says_so_once(attack: I.PGD, said: str, device: torch.device) -> None:
    net, record = _network(device), Recorder(device)
    notes: list[str] = []
    stand_in = Captured(I.Folded(net), record, notes.append)
    assert said in unfit(attack)
    for number in range(3):
        found = attack(stand_in, _batch(device, number), generator=_draws(device, number))
        _equal(found, attack(I.Folded(net), _batch(device, number), generator=_draws(device, number)))
    assert record.recorded == 0
    assert len(notes) == 1
    assert said in notes[0]


def test_a_bound_that_moves_is_told_of_once(device: torch.device) -> None:
    notes: list[str] = []
    stand_in = Captured(I.Folded(_network(device)), Recorder(device), notes.append)
    for number in range(3):
        attack = I.p_sat(steps=1, bound=number / 10).at(Progress(0, 1)).attack
        attack(stand_in, _batch(device, number))
    assert len(notes) == 1


def test_a_recording_that_fails_is_given_up_and_the_attack_goes_on_from_its_start(device: torch.device) -> None:
    net, tries = _network(device), []
    notes: list[str] = []

    def refuse(work: Work) -> Recording:
        tries.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    stand_in, attack = Captured(I.Folded(net), refuse, notes.append), I.PGD(steps=2)
    for number in range(4):
        found = attack(stand_in, _batch(device, number), generator=_draws(device, number))
        _equal(found, attack(I.Folded(net), _batch(device, number), generator=_draws(device, number)))
    assert len(tries) == 1
    assert notes == [
        "the attack cannot be captured and is launched step by step: operation not permitted when stream is capturing"
    ]


def test_processes_replay_their_shares_of_one_draw(device: torch.device) -> None:
    net, attack, whole = _network(device), I.PGD(steps=2), _batch(device, 0, 7)
    expected = attack(I.Folded(net), whole, generator=_draws(device, 5))
    record = Recorder(device)
    for rank, size in ((0, 4), (1, 3)):
        stand_in = Captured(I.Folded(net), record)
        share = whole.share(Group(rank, 2))
        assert len(share) == size
        for _ in range(3):
            found = attack(stand_in, share, generator=_draws(device, 5))
        torch.testing.assert_close(found.x, share.part.of(expected.x), rtol=0, atol=1e-12)
    assert (record.recorded, record.replayed) == (2, 4)


def test_attacks_within_attacks_are_captured_each(device: torch.device) -> None:
    net, record = _network(device), Recorder(device)
    stand_in = Captured(I.Folded(net), record)
    attack = I.Several(I.PGD(steps=2), (I.PGD(objective=Margin(), steps=2),))
    for number in range(3):
        found = attack(stand_in, _batch(device, number), generator=_draws(device, number))
        expected = attack(I.Folded(net), _batch(device, number), generator=_draws(device, number))
        _equal(found, expected)
        _equal(found.others[0], expected.others[0])
    assert (record.recorded, record.replayed) == (2, 4)


@pytest.mark.parametrize("method", [I.pgd_at(steps=3), I.trades(steps=3), I.gairat(steps=3), I.spat(steps=3)])
def test_a_training_step_on_a_captured_attack_is_the_training_step(method: I.Method, device: torch.device) -> None:
    nets = [_network(device, "cosine" if method.requires else "linear").train() for _ in range(2)]
    record = Recorder(device)
    stand_ins = [I.Folded(nets[0]), Captured(I.Folded(nets[1]), record)]
    for net, stand_in in zip(nets, stand_ins, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for number in range(4):
            stand_in.refresh(net)
            draws = _draws(device, number)
            I.training_step(
                net, method, _batch(device, number), optimizer, generator=draws, attacked=stand_in, accumulate=2
            )
    for ours, theirs in zip(nets[1].state_dict().values(), nets[0].state_dict().values(), strict=True):
        _same(ours, theirs)
    assert record.replayed > 0


class Unlike(Signal):
    """A user's objective that cannot be compared."""

    __hash__ = None  # type: ignore[assignment]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"adv"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return CrossEntropy()(evidence)


def test_an_objective_without_a_hash_is_not_captured() -> None:
    record, notes = Recorder(torch.device("cpu")), []
    stand_in = Captured(I.Folded(_network(torch.device("cpu"))), record, notes.append)
    for number in range(3):
        I.PGD(objective=Unlike(), steps=1)(stand_in, _batch(torch.device("cpu"), number))
    assert record.recorded == 0
    assert "cannot be compared" in notes[0]


def test_a_captured_stand_in_is_a_stand_in() -> None:
    net = _network(torch.device("cpu"), "cosine")
    folded = I.Folded(net)
    stand_in, x = Captured(folded, Recorder(torch.device("cpu"))), _batch(torch.device("cpu"), 0).x
    assert torch.equal(stand_in(x), folded(x))
    assert stand_in.logit_scale is net.head.scale
    assert accelerated(folded, "none", torch.device("cpu")) is folded
    assert isinstance(accelerated(folded, "graphs", torch.device("cpu")), Captured)
    twin: Callable[[Tensor], Tensor] = copy.deepcopy(folded)
    assert torch.equal(twin(x), folded(x))


def test_the_rule_that_can_stop_nothing_is_none() -> None:
    assert I.PGD().rule is None
    assert I.PGD(stop=Patience(0)).rule == Patience(0)
    assert ATTACKS["a rule that stops nothing"].stop is not None
    assert ATTACKS["a rule that stops nothing"].rule is None
    assert unfit(I.PGD(objective=KL(), start=I.Gaussian(0.001))) == ""


def test_graphs_are_recorded_after_a_rehearsal_beside_and_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls that CUDA graphs want, to a GPU that is not there."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: object = "beside") -> None:
            self.name = name if isinstance(name, str) else "beside"

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def noted(begin: str, end: str) -> Iterator[None]:
        calls.append(begin)
        yield
        calls.append(end)

    cuda = {
        "device": lambda device: nullcontext(),
        "Stream": Stream,
        "current_stream": lambda device: Stream("current"),
        "stream": lambda stream: noted(f"on {stream.name}", "back"),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: calls.append("pool") or "one pool",
        "graph": lambda graph, pool, capture_error_mode: noted(f"capture in {pool}, {capture_error_mode}", "captured"),
    }
    for name, item in cuda.items():
        monkeypatch.setattr(torch.cuda, name, item)
    record = CudaGraphs(torch.device("cuda"))

    def work() -> tuple[Tensor, ...]:
        calls.append("work" + " that remembers casts" * torch.is_autocast_cache_enabled())
        return (torch.ones(1),)

    made = record(work)
    rehearsal = ["beside waits for current", "on beside", "work", "back", "current waits for beside"]
    capture = ["capture in one pool, thread_local", "work", "captured"]
    assert calls == [*rehearsal, "pool", *capture]
    calls.clear()
    made.replay()
    record(work)
    assert calls == ["replay", *rehearsal, *capture]
    assert torch.is_autocast_cache_enabled()
