"""Models whose gradients are known to be masked are caught, plain adversarial training is not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import instar
from instar.cli.evaluate import run
from instar.evaluate import Entry, Record, Suite, evaluate, margin_pgd, pgd
from instar.evaluate.adaptive import adaptive, sanity
from instar.evaluate.finding import Finding
from instar.evaluate.sanity import CHECKS, findings
from instar.evaluate.shards import Outcome
from instar.evaluate.verdict import conclude
from instar.models import create, save
from instar.threat import Ball, Linf

EPS = 0.1
SANITY = partial(sanity, steps=10, queries=50)
ADAPTIVE = partial(adaptive, steps=6, short=6, restarts=1, queries=40, searches=1)


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(found.target)))
    return torch.tensor(found.images / 16, dtype=torch.float32)[order, None], torch.tensor(found.target)[order]


def fitted(method: instar.Method | None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )
    x, y = digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(5):
        for rows in torch.randperm(1000).split(64):
            if method is None:
                loss = F.cross_entropy(net(x[rows]), y[rows])
            else:
                loss = instar.training_loss(net, method, instar.Batch(x[rows], y[rows]))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def adversarial() -> nn.Module:
    return fitted(instar.pgd_at(eps=EPS, step_size=EPS / 2, steps=3))


@pytest.fixture(scope="module")
def trades() -> nn.Module:
    return fitted(instar.trades(eps=EPS, step_size=EPS / 2, steps=3, beta=3.0))


@pytest.fixture(scope="module")
def natural() -> nn.Module:
    return fitted(None)


def judged(net: nn.Module, suite: str | Callable[[Ball], Suite], n: int = 50) -> Record:
    x, y = digits()
    return evaluate(net, data=(x[1300:1500], y[1300:1500]), suite=suite, eps=EPS, n=n)[0]


class Around(nn.Module):
    """A network with something done to its images or its logits."""

    def __init__(self, net: nn.Module, *, before: Callable[[Tensor], Tensor] | None = None, after: object = None):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x if self.before is None else self.before(x))
        return self.after(logits) if callable(self.after) else logits


def decoy(logits: Tensor) -> Tensor:
    """An eleventh logit just below the best, whose gradient leads nowhere: it can never win, and PGD aims at it."""
    best = logits.amax(1, keepdim=True)
    lure = 100 * (logits.square().sum(1, keepdim=True) - 3 * logits.sum(1, keepdim=True))
    return torch.cat([logits, best.detach() - 0.1 + lure - lure.detach()], 1)


def worst(record: Record, check: str) -> str:
    return next(finding.verdict for finding in record.findings if finding.check == check)


@pytest.mark.parametrize("suite", ["quick", SANITY, ADAPTIVE], ids=["quick", "sanity", "adaptive"])
@pytest.mark.parametrize("name", ["adversarial", "trades"])
def test_plain_adversarial_training_is_sound(
    name: str, suite: str | Callable[[Ball], Suite], request: pytest.FixtureRequest
) -> None:
    record = judged(request.getfixturevalue(name), suite)
    assert record.verdict.word == "sound", record.verdict.line
    assert 0 < record.scores["worst_case"].correct < record.scores["clean"].correct


def test_logits_too_small_for_cross_entropy_are_caught_by_every_suite(adversarial: nn.Module) -> None:
    masked = Around(adversarial, after=lambda z: 1e-3 * z)
    for suite in ("quick", SANITY):
        record = judged(masked, suite, 100)
        assert record.verdict.word in ("suspect", "overestimated"), record.verdict.line
        assert worst(record, "pgd_minus_margin") == "suspect"
    assert worst(record, "logit_scale") != "normal"


def test_flat_logits_as_after_reweighting_are_caught(adversarial: nn.Module) -> None:
    """Every point gets logits of the same small size, so that all of them look equally near to all classes."""
    masked = Around(adversarial, after=lambda z: 0.02 * z / z.norm(dim=1, keepdim=True).detach())
    record = judged(masked, "quick", 200)
    assert record.verdict.word != "sound"
    assert worst(record, "pgd_minus_margin") == "suspect"


@pytest.mark.parametrize("suite", ["quick", SANITY], ids=["quick", "sanity"])
def test_logits_too_large_for_cross_entropy_are_overestimated(
    adversarial: nn.Module, suite: str | Callable[[Ball], Suite]
) -> None:
    record = judged(Around(adversarial, after=lambda z: 1e3 * z), suite)
    assert record.verdict.word == "overestimated"
    if suite is SANITY:
        assert worst(record, "zero_gradient_ce") == "suspect"
        assert worst(record, "zero_gradient_margin") == "normal"
        assert worst(record, "loss_along_steps") == "suspect"


def test_a_low_temperature_saturates_and_is_overestimated(natural: nn.Module) -> None:
    record = judged(Around(natural, after=lambda z: z / 0.01), SANITY)
    assert record.verdict.word == "overestimated"
    assert record.scores["pgd_10"].correct > record.scores["worst_case"].correct + 10


def test_quantised_images_have_no_gradient_and_are_overestimated(adversarial: nn.Module) -> None:
    record = judged(Around(adversarial, before=lambda x: torch.round(8 * x) / 8), SANITY)
    assert record.verdict.word == "overestimated"
    for check in ("whole_box", "zero_gradient_margin"):
        assert worst(record, check) == "overestimated"
    for check in ("black_box", "zero_gradient_ce", "loss_along_steps"):
        assert worst(record, check) == "suspect"


def test_a_layer_that_shatters_gradients_is_caught(adversarial: nn.Module) -> None:
    masked = Around(adversarial, before=lambda x: x + 0.02 * torch.sin(400 * x))
    record = judged(masked, SANITY, 100)
    assert record.verdict.word in ("suspect", "overestimated")
    assert worst(record, "iterative_minus_single_step") == "suspect"
    assert worst(record, "loss_along_steps") != "normal"


def test_a_defence_against_pgd_only_is_caught(adversarial: nn.Module) -> None:
    masked = Around(adversarial, after=decoy)
    record = judged(masked, SANITY)
    assert record.verdict.word in ("suspect", "overestimated"), record.verdict.line
    record = judged(masked, ADAPTIVE, 40)
    assert record.verdict.word in ("suspect", "overestimated"), record.verdict.line
    assert record.scores["multi_targeted"].correct < record.scores["margin_pgd_30"].correct
    assert worst(record, "pgd_minus_autoattack") == "suspect"


def test_a_model_that_answers_differently_each_time_is_suspect(adversarial: nn.Module) -> None:
    masked = Around(adversarial, before=lambda x: x + 0.3 * torch.randn_like(x))
    record = judged(masked, SANITY)
    assert worst(record, "eps_zero") == "suspect"
    assert record.verdict.word != "sound"


def outcomes(n: int = 1000, **robust: int) -> dict[str, Outcome]:
    """Of n points the first ones withstand each attack."""
    none = np.full(n, -1, np.int8)
    return {name: Outcome(np.arange(n) < count, none) for name, count in robust.items()}


QUICK = (pgd(Linf(EPS), steps=10), margin_pgd(Linf(EPS), steps=20))


@pytest.mark.parametrize(
    ("lost", "word"), [(20, "sound"), (60, "sound"), (61, "overestimated"), (200, "overestimated")]
)
def test_without_autoattack_pgd_may_be_beaten_by_as_much_as_on_sound_models(lost: int, word: str) -> None:
    stronger = Entry("stronger", "stronger", pgd(Linf(EPS), steps=7).attack, role="gradient")
    verdict = conclude(findings((QUICK[0], stronger), outcomes(pgd_10=500, stronger=500 - lost)))
    assert verdict.word == word
    assert ("PGD-10 overestimates, quote the worst case" in verdict.line) == (word == "overestimated")


@pytest.mark.parametrize(
    ("n", "lost", "word"),
    [
        (10_000, 50, "sound"),
        (10_000, 100, "overestimated"),
        (200, 1, "sound"),
        (200, 2, "suspect"),
        (200, 8, "overestimated"),
    ],
)
def test_autoattack_may_be_beaten_by_half_a_point_and_its_error(n: int, lost: int, word: str) -> None:
    entries = tuple(entry for entry in adaptive(Linf(EPS)).entries if entry.name in ("autoattack", "multi_targeted"))
    found = findings(entries, outcomes(n, autoattack=n // 2, multi_targeted=n // 2 - lost))
    assert conclude(found).word == word
    if word == "overestimated":
        assert "AutoAttack overestimates, quote the worst case" in conclude(found).line
        assert "MultiTargeted-100" in conclude(found).line


def test_a_column_outside_of_the_threat_model_beats_no_headline() -> None:
    beyond = Entry("beyond", "beyond", pgd(Linf(4 * EPS), steps=10).attack, counts=False)
    found = findings((*QUICK, beyond), outcomes(pgd_10=500, margin_pgd_20=490, beyond=0))
    assert conclude(found).word == "sound"


def sweep_outcomes(accuracies: dict[float, int]) -> tuple[tuple[Entry, ...], dict[str, Outcome]]:
    entries = tuple(entry for entry in sanity(Linf(8 / 255)).entries if entry.kind in ("sweep", "unbounded"))
    radii = {entry.name: getattr(entry.attack, "ball").radius * 255 for entry in entries}  # noqa: B009
    counts = {
        name: int(np.interp(radius, list(accuracies), list(accuracies.values()))) for name, radius in radii.items()
    }
    return entries, outcomes(**counts)


@pytest.mark.parametrize(
    ("name", "accuracies", "objecting"),
    [
        ("PGD-AT", {0: 820, 4: 680, 8: 510, 16: 180, 32: 10, 64: 0, 255: 0}, set()),
        ("natural", {0: 950, 2: 100, 4: 0, 255: 0}, set()),
        ("tiny eps for it", {0: 820, 64: 300, 255: 0}, {"far_eps"}),
        ("plateau", {0: 900, 8: 500, 16: 470, 64: 400, 255: 0}, {"robust_at_twice_eps", "far_eps"}),
        ("never zero", {0: 900, 8: 500, 16: 200, 64: 0, 255: 100}, {"whole_box"}),
        ("rises", {0: 900, 8: 500, 10: 560, 16: 200, 64: 0, 255: 0}, {"monotone_in_eps"}),
    ],
)
def test_the_course_of_accuracy_over_eps_is_judged(
    name: str, accuracies: dict[float, int], objecting: set[str]
) -> None:
    entries, found = sweep_outcomes(accuracies)
    correct = np.arange(1000) < accuracies[0]
    verdicts = {finding.check: finding.verdict for finding in findings(entries, found, correct=correct)}
    assert {check for check, verdict in verdicts.items() if verdict in ("suspect", "overestimated")} == objecting
    assert verdicts["eps_zero"] == "normal"


def test_every_finding_states_figure_thresholds_meaning_and_source(adversarial: nn.Module) -> None:
    record = judged(adversarial, ADAPTIVE, 20)
    assert len(record.findings) >= 14
    for finding in record.findings:
        assert -1 <= finding.value <= 1
        assert finding.normal <= finding.suspect
        assert ": " in finding.text or finding.check == "monotone_in_eps"
        assert len(finding.source) > 10
        assert finding.error is None or finding.error >= 0
    assert {finding.check for finding in record.findings if finding.error is None} == {"eps_zero"}
    untested = {CHECKS["transfer"], CHECKS["noise_against_attack"], CHECKS["robust_at_twice_eps"]}
    assert CHECKS["transfer"] in record.verdict.missing
    assert set(record.verdict.missing) <= untested  # the others need more points than 20


def test_the_worst_finding_decides_and_the_reasons_are_told() -> None:
    levels = ("normal", "high", "suspect", "overestimated")
    each = [Finding(f"check{k}", level, 0.1, 0.0, 0.0, 0.0, f"text {k}", "source") for k, level in enumerate(levels)]
    assert conclude(each[:1]).line == "sound, as far as this suite can tell (0 of 15 checks made)"
    assert conclude(each[:2]).line.endswith("higher than usual: text 1")
    assert conclude(each[:3]).line == "suspect (0 of 15 checks made): text 2"
    assert conclude(each).line == "overestimated (0 of 15 checks made): text 3; text 2"
    assert conclude(each).word == "overestimated"


def test_strict_ends_with_status_3_where_a_number_is_overestimated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4)
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:]:
            parameter *= 1e6  # saturated: cross-entropy has no gradient
    save(net, tmp_path / "net.safetensors", {"dataset": "digits", "threat": {"norm": "Linf", "eps": "0.3"}})
    words = [str(tmp_path / "net.safetensors"), "--suite", "quick", "--n", "200", "--device", "cpu"]
    relaxed, strict = run(words), run([*words, "--strict"])
    text = capsys.readouterr().out
    assert ("Verdict on net: overestimated, 2 of 15 checks made (more: --suite sanity)." in text) == (strict == 3)
    assert (relaxed, strict) == (0, 3)
