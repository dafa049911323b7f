"""What the pictures show is what the files say: numbers are read back from the axes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from instar import UserError
from instar.data import load
from instar.evaluate import wilson
from instar.evaluate.record import Record
from instar.report import (
    evaluation_bars,
    gallery,
    instance_curves,
    learning_curves,
    read,
    survival,
    survival_counts,
    top_share,
    unevenness,
)
from instar.report.style import DPI, png


def panel(figure: Figure, label: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_label() == label]
    return found


def drawn(axes: Axes, gid: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if line.get_gid() == gid]
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def stacks(axes: Axes) -> dict[str, np.ndarray]:
    """Heights of the stacked bars by label."""
    bars = [item for item in axes.containers if isinstance(item, BarContainer)]
    return {str(item.get_label()): np.array([patch.get_height() for patch in item]) for item in bars}


def test_curves_are_the_logged_numbers_by_epoch_from_1(run: Path) -> None:
    figure = learning_curves(run)
    assert drawn(panel(figure, "robust"), "held-out robust: GAIRAT") == ([1, 2, 3, 4], [0.1, 0.3, 0.3, 0.2])
    assert drawn(panel(figure, "robust"), "training robust: GAIRAT")[1] == [0.05, 0.15, 0.15, 0.1]
    assert drawn(panel(figure, "clean"), "held-out clean: GAIRAT")[1] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert drawn(panel(figure, "loss"), "loss: GAIRAT")[1] == [2.0, 1.75, 1.5, 1.25]
    assert drawn(panel(figure, "rate"), "rate: GAIRAT")[1] == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])


def test_the_best_checkpoint_is_the_first_epoch_with_the_highest_held_out_robust_accuracy(run: Path) -> None:
    figure = learning_curves(run)
    assert drawn(panel(figure, "robust"), "best robust: GAIRAT") == ([2], [0.3])
    assert drawn(panel(figure, "clean"), "best clean: GAIRAT") == ([2], [0.6])
    assert "30.0\N{NO-BREAK SPACE}% robust and 60.0\N{NO-BREAK SPACE}% clean" in figure.get_suptitle().replace(
        "\n", " "
    )


def test_the_band_around_held_out_accuracy_is_wilsons_interval_of_its_images(run: Path) -> None:
    axes = panel(learning_curves(run), "robust")
    (band,) = [item for item in axes.collections if item.get_gid() == "interval robust: GAIRAT"]
    corners = band.get_paths()[0].vertices
    ends = sorted(set(corners[corners[:, 0] == 2][:, 1]))
    assert ends == pytest.approx(wilson(30, 100))


def test_the_end_of_the_burn_in_is_marked_where_the_method_changes(run: Path) -> None:
    assert [epoch for epoch, _ in read(run).changes] == [2]
    assert drawn(panel(learning_curves(run), "loss"), "change: 2")[0] == [2.5, 2.5]
    assert "from epoch 3 on" in "".join(text.get_text() for text in survival(run).texts).replace("\n", " ")


def test_a_method_that_changes_in_every_epoch_marks_nothing(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    ramp = "Method(PGD(steps=4), Ramp(0, 6, 0.0, 1.0) * KL())"
    assert read(new_run(tmp_path / "ramp", method=ramp, robust=[0.1] * 6)).changes == ()


def test_runs_are_told_apart_by_what_differs(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    first = new_run(tmp_path / "a")
    second = new_run(tmp_path / "b", training={"epochs": 4, "seed": 7})
    third = new_run(tmp_path / "c", recipe="pgd_at")
    axes = panel(learning_curves([first, second, third]), "loss")
    named = {str(line.get_gid()) for line in axes.lines}
    assert {"loss: GAIRAT, seed 3", "loss: GAIRAT, seed 7", "loss: PGD-AT, seed 3"} <= named
    with pytest.raises(UserError, match="7 runs apart at most; got 8"):
        learning_curves([first] * 8)


def test_the_stack_shows_the_share_of_each_kappa_among_images_of_the_epoch(run: Path) -> None:
    axes = panel(survival(run), "survival")
    heights = stacks(axes)
    assert list(heights) == ["κ = 0", "κ = 1", "κ = 2", "κ = 3", "κ = 4"]
    assert heights["κ = 0"] == pytest.approx([3 / 7] * 4)
    assert heights["κ = 3"] == pytest.approx([0.0] * 4)
    assert heights["κ = 4"] == pytest.approx([2 / 7] * 4)  # the third κ of 4 is of an image that was never trained on
    assert sum(heights.values()) == pytest.approx([1.0] * 4)
    tops = sorted(
        bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() < 1 < bar.get_x() + bar.get_width()
    )
    assert tops == pytest.approx([3 / 7, 4 / 7, 5 / 7, 5 / 7, 1.0])


def test_rows_of_earlier_epochs_do_not_count(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    tables = [
        {"kappa": [0, 4], "loss": [1, 1], "seen": [0, 0]},
        {"kappa": [4, 0], "loss": [1, 1], "seen": [1, 0]},
    ]
    found = survival_counts(new_run(tmp_path / "run", tables=tables))
    assert found.n.tolist() == [2, 1]
    assert found.guarded.tolist() == [0.5, 1.0]
    assert found.attackable.tolist() == [0.5, 0.0]
    assert found.mean.tolist() == [2.0, 4.0]


def test_guarded_means_the_steps_of_the_attack_and_not_the_largest_kappa_seen(
    tmp_path: Path, new_run: Callable[..., Path]
) -> None:
    table = {"kappa": [3, 3, 0], "loss": [1, 1, 1]}
    known = survival_counts(new_run(tmp_path / "known", tables=[table]))
    assert (known.steps.tolist(), known.guarded.tolist(), known.known) == ([4], [0.0], True)
    foreign = new_run(tmp_path / "foreign", tables=[table], method="Method(MyAttack(), CrossEntropy())")
    unknown = survival_counts(foreign)
    assert (unknown.steps.tolist(), unknown.known) == ([3], False)
    assert unknown.guarded.tolist() == pytest.approx([2 / 3])
    assert any("largest κ seen" in text.get_text() for text in survival(foreign).texts)


def test_where_the_steps_change_kappa_is_shown_in_tenths_of_them(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(
        tmp_path / "run",
        robust=[0.1, 0.2],
        method="Method(PGD(steps=Steps(2, changes=((0.5, 8),))), CrossEntropy())",
        tables=[{"kappa": [0, 1, 2, 2], "loss": [1] * 4}, {"kappa": [0, 3, 7, 8], "loss": [1] * 4}],
    )
    heights = stacks(panel(survival(folder), "survival"))
    assert heights["κ = K"].tolist() == [0.5, 0.25]
    assert heights["κ = ≤ 0.5 K"].tolist() == [0.25, 0.0]
    assert heights["κ = ≤ 0.4 K"].tolist() == [0.0, 0.25]
    assert heights["κ = ≤ 0.9 K"].tolist() == [0.0, 0.25]
    assert sum(heights.values()) == pytest.approx([1.0, 1.0])


def test_kappa_beyond_the_steps_of_the_attack_is_refused(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(tmp_path / "run", tables=[{"kappa": [0, 9], "loss": [1, 1]}])
    with pytest.raises(UserError, match=r"at most 4, the steps of the attack; epoch 0 .* has 9"):
        survival(folder)


def test_equal_losses_give_the_hardest_tenth_exactly_a_tenth() -> None:
    for n in (1, 7, 10, 1280):
        assert top_share(np.full(n, 0.3)) == pytest.approx(0.1, abs=1e-12)
    assert top_share(np.array([0.0] * 19 + [1.0])) == 1.0
    assert top_share(np.array([1.0] * 9 + [11.0])) == pytest.approx(11 / 20)
    assert math.isnan(top_share(np.zeros(5)))


def test_the_share_of_the_hardest_tenth_is_drawn_by_epoch(run: Path) -> None:
    x, y = drawn(panel(unevenness(run), "share"), "share")
    # Seven images: the hardest tenth is 0.7 of the one with a loss of 4.
    assert (x, y) == ([1, 2, 3, 4], pytest.approx([0.7 * 4 / 10.875] * 4))


def test_a_tenth_of_each_ridge_is_coloured_as_hardest(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    loss = np.exp(np.linspace(-1, 1.5, 5000) ** 3)
    folder = new_run(tmp_path / "run", tables=[{"kappa": [0] * 5000, "loss": loss}] * 3)
    axes = panel(unevenness(folder), "loss")
    for epoch in (1, 2, 3):
        area = {}
        for patch in axes.patches:
            if str(patch.get_gid()).endswith(f": {epoch}"):
                values, edges, foot = patch.get_data()
                area[str(patch.get_gid())] = float(((values - foot) * np.diff(np.log10(edges))).sum())
        assert area[f"hardest: {epoch}"] / sum(area.values()) == pytest.approx(0.1, abs=1e-9)
        assert drawn(axes, f"median: {epoch}")[0][0] == pytest.approx(np.median(loss.astype(np.float32)))
        assert drawn(axes, f"mean: {epoch}")[0][0] == pytest.approx(loss.mean(), rel=1e-6)


def test_losses_of_zero_are_drawn_at_the_floor_and_counted(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    figure = unevenness(new_run(tmp_path / "run", tables=[{"kappa": [4] * 3, "loss": [0.0, 0.0, 1.0]}]))
    assert any("2 values below 1e-06" in text.get_text() for text in figure.texts)
    assert panel(figure, "loss").get_xlim()[0] < 1e-6


def test_a_single_finished_epoch_is_enough_for_every_picture(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(tmp_path / "run", robust=[0.2], epochs=9, tables=[{"kappa": [0, 2, 4], "loss": [2, 1, 0.5]}])
    assert drawn(panel(learning_curves(folder), "robust"), "held-out robust: GAIRAT") == ([1], [0.2])
    assert stacks(panel(survival(folder), "survival"))["κ = 2"] == pytest.approx([1 / 3])
    assert drawn(panel(unevenness(folder), "share"), "share")[0] == [1]


def test_several_runs_show_their_guarded_and_attackable_images_side_by_side(
    run: Path, tmp_path: Path, new_run: Callable[..., Path]
) -> None:
    other = new_run(tmp_path / "pgd", recipe="pgd_at", tables=[{"kappa": [0, 4, 4, 4], "loss": [1, 1, 1, 1]}])
    figure = instance_curves([run, other])
    assert drawn(panel(figure, "guarded"), "GAIRAT") == ([1, 2, 3, 4], pytest.approx([2 / 7] * 4))
    assert drawn(panel(figure, "guarded"), "PGD-AT") == ([1], [0.75])
    assert drawn(panel(figure, "attackable"), "PGD-AT")[1] == [0.25]
    assert drawn(panel(figure, "share"), "PGD-AT")[1] == pytest.approx([0.1])


def test_bars_are_accuracies_and_whiskers_their_wilson_intervals(record: Callable[..., Record]) -> None:
    counts = {"clean": 160, "pgd_20": 90, "autoattack": 60, "worst_case": 59}
    axes = panel(evaluation_bars([record(counts=counts, gap=(0.15, 0.025))], labels=["GAIRAT"]), "accuracy")
    heights = {str(bar.get_gid()): bar.get_height() for bar in axes.patches}
    assert heights == {
        "clean: GAIRAT (best)": 0.8,
        "pgd_20: GAIRAT (best)": 0.45,
        "autoattack: GAIRAT (best)": 0.3,
    }
    assert drawn(axes, "interval pgd_20: GAIRAT (best)")[1] == pytest.approx(wilson(90, 200))


def test_the_gap_is_shown_in_points_with_its_paired_interval(record: Callable[..., Record]) -> None:
    counts = {"clean": 160, "pgd_20": 90, "autoattack": 60, "worst_case": 60}
    figure = evaluation_bars([record(counts=counts, gap=(0.15, 0.025))], labels=["GAIRAT"])
    axes = panel(figure, "gap")
    assert drawn(axes, "gap: GAIRAT (best)")[0] == [15.0]
    assert drawn(axes, "interval gap: GAIRAT (best)")[0] == pytest.approx([15 - 4.9, 15 + 4.9], abs=1e-3)
    assert "overstates this by 15.0" in figure.get_suptitle().replace("\n", " ")
    assert [patch.get_gid() for patch in axes.patches] == ["usual"]  # known for CIFAR-10 at 8/255, and only there
    elsewhere = record(counts=counts, gap=(0.15, 0.025), eps="4/255")
    assert not panel(evaluation_bars([elsewhere], labels=["GAIRAT"]), "gap").patches


def test_a_gap_that_may_be_chance_is_no_headline(record: Callable[..., Record]) -> None:
    counts = {"clean": 160, "pgd_20": 62, "autoattack": 60, "worst_case": 60}
    figure = evaluation_bars([record(counts=counts, gap=(0.01, 0.007))], labels=["GAIRAT"])
    assert "overstates" not in figure.get_suptitle()


def test_without_autoattack_the_worst_case_stands_in_its_place(record: Callable[..., Record]) -> None:
    figure = evaluation_bars([record(counts={"clean": 160, "pgd_20": 90, "worst_case": 80})], labels=["TRADES"])
    assert [axes.get_label() for axes in figure.axes] == ["accuracy"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["clean", "PGD-20", "worst case"]


def test_the_last_checkpoint_is_paler_than_the_best_one_of_its_model(record: Callable[..., Record]) -> None:
    counts = {"clean": 160, "pgd_20": 90, "autoattack": 60, "worst_case": 60}
    shown = [record(counts=counts, checkpoint=name) for name in ("best", "last")]
    bars = {str(bar.get_gid()): bar for bar in panel(evaluation_bars(shown, labels=["A", "A"]), "accuracy").patches}
    best, last = bars["clean: A (best)"], bars["clean: A (last)"]
    assert best.get_edgecolor() == last.get_edgecolor()
    assert best.get_facecolor() == best.get_edgecolor()
    assert sum(last.get_facecolor()) > sum(best.get_facecolor())


def test_evaluations_of_different_images_or_radii_do_not_share_a_picture(record: Callable[..., Record]) -> None:
    counts = {"clean": 160, "pgd_20": 90, "autoattack": 60, "worst_case": 60}
    with pytest.raises(UserError, match=r"must share norm, eps and images; got Linf 8/255, .* and Linf 4/255"):
        evaluation_bars([record(counts=counts), record(counts=counts, eps="4/255")])
    with pytest.raises(UserError, match="instar evaluate"):
        evaluation_bars([])


def test_the_gallery_shows_the_images_with_smallest_and_largest_kappa(
    tmp_path: Path, new_run: Callable[..., Path]
) -> None:
    kappa, loss = [4, 0, 0, 2, 4, 1], [0.1, 1.0, 3.0, 0.5, 0.01, 0.7]
    figure = gallery(new_run(tmp_path / "run", tables=[{"kappa": kappa, "loss": loss}]))
    labels = [str(axes.get_label()) for axes in figure.axes]
    assert labels == ["hardest 2", "hardest 1", "hardest 5", "easiest 4", "easiest 0", "easiest 3"]
    images = load("digits")
    first = figure.axes[0]
    shown = np.asarray(first.images[0].get_array()).squeeze()
    assert shown == pytest.approx(images.fetch(torch.tensor([2]))[0, 0].numpy() / 255)
    assert [text.get_text() for text in first.texts] == [images.classes[int(images.labels[2])], "κ 0 · 3.0"]


def test_a_gallery_of_another_data_set_is_refused(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(tmp_path / "run", tables=[{"kappa": [0] * 2000, "loss": [1.0] * 2000}])
    with pytest.raises(UserError, match=r"at least 2000 images; Digits .* has 1437"):
        gallery(folder)


def test_figures_leave_the_users_matplotlib_as_it_was(run: Path) -> None:
    before = dict(matplotlib.rcParams)
    learning_curves(run)
    survival(run)
    assert dict(matplotlib.rcParams) == before


def test_png_of_a_drawing_keeps_the_colours_of_small_areas() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.imshow(np.linspace(0, 1, 10_000).reshape(100, 100), cmap="twilight")  # far more than 256 colours
    dots = ["#D55E00", "#D56E10", "#53A0CB", "#5BA8C0", "#E09245", "#E6A216"]
    for place, colour in enumerate(dots):
        axes.add_patch(Rectangle((10 * place, 10), 3, 3, color=colour, linewidth=0))
    with Image.open(io.BytesIO(png(figure))) as drawn:
        assert drawn.mode == "P"
        pixels = np.asarray(drawn.convert("RGB"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as drawn:
        full = np.asarray(drawn.convert("RGB"))
    assert len(np.unique(full.reshape(-1, 3), axis=0)) > 256
    assert np.abs(pixels.astype(int) - full).max() <= 16
    for colour in dots:
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert (full == wanted).all(-1).sum() > 20
        assert ((full == wanted).all(-1) == (pixels == wanted).all(-1)).all()
