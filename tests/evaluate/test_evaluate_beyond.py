"""Norms, radii and summaries beside the threat model."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.evaluate import AutoAttack, Record, Suite, beyond, evaluate, table
from instar.evaluate.beyond import eps_sweep, multinorm, union
from instar.threat import L1, L2, Ball, Linf

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]


def short(suite: Callable[[Ball], Suite], steps: int) -> Callable[[Ball], Suite]:
    """The same suite with fewer steps."""

    def build(ball: Ball) -> Suite:
        made = suite(ball)
        entries = []
        for entry in made.entries:
            assert isinstance(entry.attack, AutoAttack)
            entries.append(dataclasses.replace(entry, attack=dataclasses.replace(entry.attack, steps=steps)))
        return dataclasses.replace(made, entries=tuple(entries))

    return build


def test_other_norms_have_the_usual_radii_scaled_to_the_size_of_the_images() -> None:
    balls = [entry.attack.ball for entry in multinorm(Linf(4 / 255)).entries]
    assert balls == [Linf(4 / 255), L2(0.5), L1(12.0)]
    assert [entry.counts for entry in multinorm(Linf(4 / 255)).entries] == [True, False, False]
    assert [entry.attack.ball for entry in multinorm(L2(0.25)).entries] == [L2(0.25), Linf(8 / 255), L1(12.0)]
    # Four times as many values: the same root mean square and the same mean of the changes.
    larger = multinorm(Linf(8 / 255), shape=(3, 64, 64))
    assert [entry.attack.ball for entry in larger.entries] == [Linf(8 / 255), L2(1.0), L1(48.0)]
    assert [entry.title for entry in larger.entries][1:] == ["APGD at L2 1", "APGD at L1 48"]


def test_the_sweep_is_in_units_of_the_trained_radius_and_stays_in_the_box() -> None:
    found = eps_sweep(Linf(8 / 255)).entries
    assert [entry.attack.ball for entry in found] == [Linf(k / 255) for k in (4, 8, 12, 16)]
    assert [entry.name for entry in found] == [f"apgd_eps_{k}_255" for k in (4, 8, 12, 16)]
    assert [entry.counts for entry in found] == [True, True, False, False]
    assert [entry.title for entry in eps_sweep(L2(0.3)).entries] == [
        f"APGD at L2 {eps}" for eps in ("0.15", "0.3", "0.45", "0.6")
    ]
    assert [entry.attack.ball.radius for entry in eps_sweep(Linf(0.6)).entries] == [0.3, 0.6, 0.9]


def linear_task() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes on 6×6 images, with each point's distance from the boundary in the ℓ∞ norm."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    x = 0.4 + 0.2 * torch.rand(40, 1, 6, 6)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
        logits = net(x)
        y = logits.argmax(1)
        lead = (logits[:, 0] - logits[:, 1]).abs()
        distance = lead / (net[1].weight[0] - net[1].weight[1]).abs().sum()
    return net, x, y, distance


def test_on_a_linear_model_the_sweep_crosses_where_it_must() -> None:
    net, x, y, distance = linear_task()
    eps = float(distance.median()) * 0.9
    (record,) = evaluate(net, data=(x, y), suite=short(eps_sweep, 10), eps=eps)
    columns = [name for name in record.scores if name.startswith("apgd_eps")]
    assert len(columns) == 4
    for name, many in zip(columns, (0.5, 1, 1.5, 2), strict=True):
        expected = (distance > many * eps).numpy()
        assert 0 < expected.sum() < 40
        assert (record.instances[name].astype(bool) == expected).all()
    assert record.scores["worst_case"].correct == int((distance > eps).sum())


def test_the_union_is_each_images_and_of_all_norms(make_task: MakeTask) -> None:
    net, x, y = make_task(4, n=24)

    def small(ball: Ball) -> Suite:
        made = short(multinorm, 5)(ball)
        balls = (ball, L2(0.05), L1(0.2))
        entries = (
            dataclasses.replace(entry, attack=dataclasses.replace(entry.attack, ball=each))
            for entry, each in zip(made.entries, balls, strict=True)
        )
        return dataclasses.replace(made, entries=tuple(entries))

    (record,) = evaluate(net, data=(x, y), suite=small, eps=0.006)
    columns = [record.instances[f"apgd_{norm}"] for norm in ("linf", "l2", "l1")]
    score = union(record)
    assert score is not None
    assert score.correct == sum(all(row) for row in zip(*(column.tolist() for column in columns), strict=True))
    assert 0 < score.correct <= min(int(column.sum()) for column in columns)
    assert record.scores["worst_case"].correct == int(columns[0].sum())
    ((title, (cell,)),) = beyond.rows([record])
    assert title == "union of norms"
    assert cell.startswith(f"{100 * score.accuracy:.1f} (")
    chosen = {"apgd_linf": [1, 1, 0, 0], "apgd_l2": [1, 0, 1, 0], "apgd_l1": [1, 1, 1, 0]}
    rows = {name: np.array(verdicts, np.uint8) for name, verdicts in chosen.items()}
    below = union(dataclasses.replace(record, instances=rows))
    assert below is not None
    assert (below.correct, below.count) == (1, 4)
    assert union(dataclasses.replace(record, instances={"apgd_l2": rows["apgd_l2"]})) is None


def corruption_record() -> Record:
    """Chosen verdicts in some of the columns."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(30, 1, 8, 8)
    (record,) = evaluate(net, data=(x, net(x).argmax(1)), suite=short_corruptions, eps=0.01)
    return record


def short_corruptions(ball: Ball) -> Suite:
    made = beyond.corruptions(ball)
    return dataclasses.replace(made, entries=tuple(e for e in made.entries if e.name.startswith(("fog", "contrast"))))


def test_corruptions_are_summed_up_by_name_by_severity_and_over_all() -> None:
    record = corruption_record()
    summary = beyond.corrupted(record)
    assert summary is not None
    cells = {name: record.instances[name].mean() for name in record.scores if beyond.is_cell(name)}
    assert len(cells) == 10
    assert summary.mean == pytest.approx(np.mean(list(cells.values())))
    assert summary.by_corruption["fog"] == pytest.approx(np.mean([cells[f"fog_{k}"] for k in range(1, 6)]))
    assert summary.by_severity[3] == pytest.approx((cells["fog_3"] + cells["contrast_3"]) / 2)
    assert (summary.clean, summary.count) == (1.0, 30)
    # The sample is of images: its error is that of the images' shares, not of 300 independent verdicts.
    shares = np.mean([record.instances[name] for name in cells], axis=0)
    half = 2.0452 * shares.std(ddof=1) / np.sqrt(30)
    assert summary.high - summary.mean == pytest.approx(half, rel=1e-3) or summary.high == 1
    assert summary.mean - summary.low == pytest.approx(half, rel=1e-3)


def test_the_table_of_corruptions_has_severities_across_and_means_at_its_ends() -> None:
    record = corruption_record()
    summary = beyond.corrupted(record)
    assert summary is not None
    heading, *body = beyond.grid(record)
    assert heading == ["accuracy, %", *(f"severity {level}" for level in range(1, 6)), "mean"]
    assert [row[0] for row in body] == ["fog", "contrast", "mean"]
    assert body[0][3] == f"{100 * record.scores['fog_3'].accuracy:.1f}"
    assert body[1][-1] == f"{100 * summary.by_corruption['contrast']:.1f}"
    assert body[2][2] == f"{100 * summary.by_severity[2]:.1f}"
    assert body[2][-1] == f"{100 * summary.mean:.1f}"
    text = beyond.markdown(record)
    assert text.count("\n| ") == 4
    assert f"Mean of 10 corruptions and severities {100 * summary.mean:.1f} %" in text
    ((title, (cell,)),) = beyond.rows([record])
    assert (title, cell.split()[0]) == ("mean of corruptions", f"{100 * summary.mean:.1f}")
    titles = [title for title, _ in table.rows([record])]
    assert "mean of corruptions" in titles
    assert "worst case" not in titles  # no attack counts in it: it would be the clean accuracy


def test_the_stand_in_is_said_where_frost_was_computed_and_only_there() -> None:
    record = corruption_record()
    assert not any("stand-in" in line for line in beyond.notes(record))
    protocol = {**record.protocol, "attacks": {"frost_1": {"expression": "Corruption('frost', 1)"}}}
    assert any("frost is a stand-in" in line for line in beyond.notes(dataclasses.replace(record, protocol=protocol)))
    protocol = {**record.protocol, "attacks": {"frost_1": {"expression": "PublishedCorruption('frost', 1)"}}}
    assert not any("stand-in" in line for line in beyond.notes(dataclasses.replace(record, protocol=protocol)))


def test_records_without_such_columns_have_no_such_rows() -> None:
    net, x, y, _ = linear_task()
    (record,) = evaluate(net, data=(x, y), suite="quick", eps=0.01)
    assert (union(record), beyond.corrupted(record), beyond.rows([record]), beyond.notes(record)) == (
        None,
        None,
        [],
        [],
    )
    with pytest.raises(UserError, match="has no corruptions"):
        beyond.grid(record)
