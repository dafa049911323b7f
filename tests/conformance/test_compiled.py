"""The folded copy, compiled by PyTorch: the same iterates, weights refreshed in place, and one line if it fails."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

import instar as I
from instar import config
from instar.attacks.captured import accelerated
from instar.config import Settings, choose_acceleration
from instar.errors import UserError
from instar.evidence import Batch


class Tiny(nn.Module):
    """So small that it is compiled in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(32, 3)
        self.norm.running_mean.uniform_(-0.2, 0.2)
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).relu().flatten(1))
        return logits


CPU = torch.device("cpu")
METHODS = [I.pgd_at(steps=4), I.gairat(steps=4), I.trades(steps=4)]


def _batch(count: int) -> Batch:
    return Batch(torch.rand(count, 1, 6, 6, dtype=torch.float64), torch.arange(count) % 3)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="there is no C++ compiler")
def test_compiled_attacks_have_the_iterates_of_uncompiled_ones_also_after_a_refresh() -> None:
    net, notes = Tiny().double(), []
    compiled = accelerated(I.Folded(net), choose_acceleration("compile", CPU), CPU, notes.append)
    ran = []
    assert isinstance(compiled, I.Folded)
    of_torch = compiled._compiled
    assert of_torch is not None
    compiled._compiled = lambda x: ran.append(x.shape) or of_torch(x)  # type: ignore[func-returns-value]
    torch._dynamo.utils.counters.clear()
    for number in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.2)
        compiled.refresh(net)
        for method in METHODS:
            batch = _batch(5)
            found, expected = (
                method.attack(stand_in, batch, generator=torch.Generator().manual_seed(number))
                for stand_in in (compiled, I.Folded(net))
            )
            torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-10)
            assert torch.equal(found.kappa, expected.kappa)
    # The first pass that goes backward, 4 of each attack, and TRADES' clean logits.
    assert ran == [torch.Size([5, 1, 6, 6])] * (1 + 2 * (3 * 4 + 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # with a gradient and without, once each
    rest = _batch(3)
    torch.testing.assert_close(compiled(rest.x), net.eval()(rest.x), rtol=0, atol=1e-12)
    assert len(ran) == 27  # another shape is not compiled
    assert notes == []


def test_a_network_that_cannot_be_compiled_is_attacked_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("LoweringException: no kernel for it\nand a page of details")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    net, notes = Tiny().double(), []
    stand_in = accelerated(I.Folded(net), "compile", CPU, notes.append)
    for _ in range(2):
        batch = _batch(4)
        found, expected = (
            I.PGD(steps=2)(model, batch, generator=torch.Generator().manual_seed(0)) for model in (stand_in, net.eval())
        )
        torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-12)
    assert notes == ["PyTorch cannot compile this network, which runs uncompiled: LoweringException: no kernel for it"]


def test_a_backward_pass_that_cannot_be_compiled_is_noticed_before_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3].clone()

        @staticmethod
        def backward(ctx: object, upstream: Tensor) -> Tensor:
            raise RuntimeError("no gradient of it")

    monkeypatch.setattr(torch, "compile", lambda function, **options: Fails.apply)
    notes: list[str] = []
    stand_in = accelerated(I.Folded(Tiny().double()), "compile", CPU, notes.append)
    I.PGD(steps=2)(stand_in, _batch(4))
    assert notes == ["PyTorch cannot compile this network, which runs uncompiled: no gradient of it"]


@pytest.fixture(name="forgetful")
def _forgetful() -> None:
    config._check_compiler.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_a_machine_without_a_compiler_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **options: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler such as g\+\+ .*\(InvalidCxxCompiler: .* found\)"):
        choose_acceleration("compile", CPU)
    config._check_compiler.cache_clear()


@pytest.mark.parametrize("name", ["graphs", "both"])
def test_graphs_need_a_gpu(name: str) -> None:
    with pytest.raises(UserError, match=f"accelerate={name} captures CUDA graphs, which need a GPU"):
        choose_acceleration(name, CPU)


def test_auto_takes_graphs_on_a_gpu_alone() -> None:
    assert choose_acceleration("auto", torch.device("cuda")) == "graphs"
    assert choose_acceleration("graphs", torch.device("cuda")) == "graphs"
    assert choose_acceleration("auto", CPU) == choose_acceleration("none", CPU) == "none"


@pytest.mark.parametrize("name", ["compile", "graphs", "both"])
def test_what_is_accelerated_is_the_folded_copy(name: str) -> None:
    with pytest.raises(UserError, match="folded copy"):
        Settings(accelerate=name, fold=False)  # type: ignore[arg-type]
    Settings(accelerate="auto", fold=False)
