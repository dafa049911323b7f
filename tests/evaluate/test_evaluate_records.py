import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD
from instar.data import TestSplit, hold_out, load
from instar.errors import UserError
from instar.evaluate import AutoAttack, Entry, Record, Suite, evaluate, margin_pgd, mcnemar, pgd, quick, read
from instar.models import create, save
from instar.threat import Ball, Linf

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]


def small(ball: Ball, *, name: str = "small") -> Suite:
    few = AutoAttack(ball, steps=5, queries=10)
    return Suite(name, (pgd(ball, steps=5), margin_pgd(ball, steps=5), Entry("few", "few", few)))


def one(ball: Ball) -> Suite:
    return Suite("one", (pgd(ball, steps=5),))


def lasting(record: Record) -> dict[str, Any]:
    """All of a record but when, how fast and from which parts it was made."""
    return {key: value for key, value in record.to_json().items() if key != "run"}


def forwards(net: nn.Module) -> list[int]:
    """Counts the batches that a network sees; folded copies of it are counted as well, since hooks are copied."""
    seen: list[int] = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


def test_verdicts_are_combined_for_each_image(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=24, seed=2)

    def weak_last(ball: Ball) -> Suite:  # else the last column would be the worst case by itself
        return Suite("weak_last", (*small(ball).entries, Entry("noise", "noise", PGD(ball, steps=0))))

    (record,) = evaluate(net, data=(x, y), suite=weak_last, eps=0.006, batch_size=7, shard_size=10)
    rows = record.instances
    columns = [rows[name].astype(bool) for name in ("pgd_5", "margin_pgd_5", "few", "noise")]
    assert columns[3].sum() > columns[2].sum()
    assert rows["clean"].astype(bool).tolist() == [False] + [True] * 23
    assert all((column <= rows["clean"].astype(bool)).all() for column in columns)
    assert (rows["worst_case"].astype(bool) == np.logical_and.reduce(columns)).all()
    assert rows["broken_by"][0] == "clean"
    assert set(rows["broken_by"][rows["worst_case"] == 1]) == {""}
    for number, name in enumerate(("pgd_5", "margin_pgd_5", "few", "noise")):
        first = rows["clean"].astype(bool) & ~columns[number]
        for earlier in columns[:number]:
            first &= earlier
        assert ((rows["broken_by"] == name) == first).all()
    assert ((rows["few_by"] != "") == (rows["clean"].astype(bool) & ~columns[2])).all()
    assert rows["index"].tolist() == list(range(24))
    assert rows["label"].tolist() == y.tolist()
    assert ((rows["clean_margin"] > 0) == rows["clean"].astype(bool)).all()
    for name, score in record.scores.items():
        assert score.correct == rows[name].sum()
        assert score.count == 24
    assert record.scores["worst_case"].correct < record.scores["clean"].correct


def test_the_model_is_left_as_it_was_found(make_task: MakeTask) -> None:
    net, x, y = make_task(4)
    net[1].eval()
    net[0].weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    asks = [parameter.requires_grad for parameter in net.parameters()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    evaluate(net, data=(x, y), suite=small, eps=0.02)
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == asks
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    (wide,) = evaluate(net.double(), data=(x, y), suite="quick", eps=0.02)
    assert net[0].weight.dtype == torch.float64
    assert wide.protocol["precision"] == "float32"


def test_the_record_states_its_protocol(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(5)
    (record,) = evaluate(net, data=(x, y), suite="quick", eps="4/255", n=12, seed=7, out=tmp_path)
    protocol = record.protocol
    assert (protocol["norm"], protocol["eps"], protocol["eps_value"]) == ("Linf", "4/255", 4 / 255)
    assert (protocol["n"], protocol["seed"], protocol["bn_mode"], protocol["precision"]) == (12, 7, "eval", "float32")
    assert protocol["images"] == "first 12 of the 16 test images of custom"
    assert protocol["attacks"]["pgd_10"] == {
        "title": "PGD-10",
        "expression": repr(pgd(Linf(4 / 255), steps=10).attack),
        "budget": {"steps": 10, "restarts": 1, "forwards": 21},
    }
    assert protocol["versions"]["torch"] == torch.__version__
    assert len(protocol["weights_sha256"]) == 64
    written = json.loads((tmp_path / "quick-module.json").read_text())
    assert written == json.loads(json.dumps(record.to_json()))
    assert written["eps"] == "4/255"
    assert written["clean_acc"] == f"{100 * 11 / 12:.2f}"
    assert "autoattack_acc" not in written
    again = read(tmp_path / "quick-module.json")
    assert lasting(again) == lasting(record)
    assert {name: column.tolist() for name, column in again.instances.items()} == {
        name: column.tolist() for name, column in record.instances.items()
    }


def test_a_kill_at_any_moment_is_resumed_to_the_same_record(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=24, seed=2)
    options: dict[str, Any] = {"data": (x, y), "suite": small, "eps": 0.006, "batch_size": 5, "shard_size": 12}
    whole_calls: list[str] = []
    (whole,) = evaluate(net, **options, out=tmp_path / "whole", progress=lambda *said: whole_calls.append(said[0]))

    class Kill(BaseException):
        pass

    def kill_after(count: int) -> Callable[..., None]:
        left = [count]

        def progress(*said: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Kill

        return progress

    total = len(whole_calls)
    for moment in (1, total // 2, total - 3):
        out = tmp_path / f"killed-{moment}"
        with pytest.raises(Kill):
            evaluate(net, **options, out=out, progress=kill_after(moment))
        assert not list(out.glob("*.json"))
        (resumed,) = evaluate(net, **options, out=out)
        assert lasting(resumed) == lasting(whole)
        assert (out / "small-module.npz").read_bytes() == (tmp_path / "whole" / "small-module.npz").read_bytes()
        assert not list(out.rglob("*.tmp"))


def test_finished_parts_are_not_computed_again_and_the_record_says_so(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    seen = forwards(net)
    evaluation = partial(evaluate, net, data=(x, y), eps=0.006, batch_size=5, shard_size=6, out=tmp_path)
    (first,) = evaluation(suite=one)
    assert first.run["reused"] == []
    seen.clear()
    (again,) = evaluation(suite=one)
    clean_only = len(seen)
    assert again.run["reused"] == ["pgd_5"]
    assert lasting(again) == lasting(first)
    assert again.run["seconds"]["pgd_5"] == first.run["seconds"]["pgd_5"]
    # A larger suite repeats nothing of the smaller one.
    (larger,) = evaluation(suite=small)
    assert larger.run["reused"] == ["pgd_5"]
    seen.clear()
    (complete,) = evaluation(suite=small)
    assert complete.run["reused"] == ["pgd_5", "margin_pgd_5", "few"]
    assert len(seen) == clean_only
    # A shard that is lost is computed alone.
    lost = sorted((tmp_path / "shards").glob("autoattack-0001-*"))
    assert len(lost) == 1
    lost[0].write_bytes(lost[0].read_bytes()[:40])
    (mended,) = evaluation(suite=small)
    assert mended.run["reused"] == ["pgd_5", "margin_pgd_5"]
    assert lasting(mended) == lasting(larger)


@pytest.mark.parametrize(
    "change",
    [{"eps": 0.007}, {"seed": 1}, {"batch_size": 4}, {"data": "one image"}],
    ids=lambda change: next(iter(change)),
)
def test_what_was_computed_under_other_conditions_is_not_taken_over(
    make_task: MakeTask, tmp_path: Path, change: dict[str, Any]
) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    given: dict[str, Any] = {"data": (x, y), "suite": one, "eps": 0.006, "batch_size": 5}
    evaluate(net, **given, out=tmp_path)
    if change == {"data": "one image"}:  # the last, so that only the images tell, not the logits of the first
        change = {"data": (torch.cat([x[:-1], x[-1:].flip(-1)]), y)}
    (changed,) = evaluate(net, **(given | change), out=tmp_path)
    assert changed.run["reused"] == []


def test_equal_weights_under_another_scale_are_another_model(make_task: MakeTask, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, net: nn.Module, scale: float) -> None:
            super().__init__()
            self.net, self.scale = net, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    net, x, y = make_task(10, n=12)
    evaluation = partial(evaluate, data=(x, y), suite=one, eps=0.006, out=tmp_path)
    evaluation(Scaled(net, 1))
    assert evaluation(Scaled(net, 100))[0].run["reused"] == []
    assert evaluation(Scaled(net, 100))[0].run["reused"] == ["pgd_5"]


def test_a_record_of_another_protocol_is_kept(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=12)
    for n in (12, 6, 6):
        evaluate(net, data=(x, y), suite=one, eps=0.01, n=n, out=tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert names[0].startswith("one-module-Linf-0.01-n12-")
    assert names[1:] == ["one-module.json"]
    assert read(tmp_path / names[0]).n == 12
    assert read(tmp_path / names[1]).n == 6


def test_random_starts_depend_on_the_seed_alone(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=24, seed=2)

    def noise(ball: Ball) -> Suite:  # no step: the start decides
        return Suite("noise", (Entry("noise", "noise", PGD(ball, steps=0)),))

    evaluation = partial(evaluate, net, data=(x, y), suite=noise, eps=0.2)
    columns = [evaluation(seed=seed)[0].instances["noise"].tolist() for seed in (0, 0, 1)]
    torch.manual_seed(123)
    assert evaluation(seed=0)[0].instances["noise"].tolist() == columns[0] == columns[1] != columns[2]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run as training writes it, whose best and last checkpoints differ."""
    folder = tmp_path / "run"
    for name, epoch in (("best", 1), ("last", 3)):
        net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=epoch)
        card = {"dataset": "digits", "threat": {"norm": "Linf", "eps": "0.1"}, "epoch": epoch, "weights": "average"}
        save(net, folder / "checkpoints" / f"{name}.safetensors", card)
    run = {
        "method": "Method(PGD(Linf(0.1)), CrossEntropy())",
        "data": {"name": "digits", "path": "digits", "size": 8, "train_images": 1294},
        "threat": {"norm": "Linf", "eps": "0.1"},
        "selection": {"n": 143, "rule": "margin PGD-10"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_a_run_is_evaluated_as_it_was_trained_best_and_last(run_folder: Path) -> None:
    best, last = evaluate(run_folder, suite=one, n=20)
    assert (best.checkpoint, last.checkpoint) == ("best", "last")
    assert best.path == run_folder / "evaluations" / "one-best.json"
    assert best.protocol["eps"] == "0.1"
    assert best.protocol["checkpoint"]["epoch"] == 1
    assert best.protocol["checkpoint"]["rule"] == ("best by margin PGD-10 on 143 images held out of the training set")
    assert last.protocol["checkpoint"]["rule"] == "last epoch"
    assert best.protocol["images"] == "first 20 of the 360 official test images of Digits (8×8)"
    assert best.protocol["training"]["data"]["train_images"] == 1294
    assert best.protocol["weights_sha256"] != last.protocol["weights_sha256"]
    (chosen,) = evaluate(run_folder, suite=one, n=20, checkpoint="last", eps=0.05)
    assert chosen.protocol["eps"] == "0.05"
    # The same run through the path of its weights.
    (same,) = evaluate(run_folder / "checkpoints" / "best.safetensors", suite=one, n=20)
    assert lasting(same) == lasting(best)
    assert same.run["reused"] == ["pgd_5"]


def test_a_run_with_one_checkpoint_is_evaluated_on_that_one(run_folder: Path) -> None:
    for file in (run_folder / "checkpoints").glob("best.*"):
        file.unlink()
    (record,) = evaluate(run_folder, suite=one, n=10)
    assert record.checkpoint == "last"
    with pytest.raises(UserError, match="has no checkpoint best"):
        evaluate(run_folder, suite=one, checkpoint="best")


def test_weights_of_ours_bring_their_data_and_threat_model(run_folder: Path, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"mine{suffix}").write_bytes((run_folder / "checkpoints" / f"best{suffix}").read_bytes())
    (record,) = evaluate(tmp_path / "mine.safetensors", suite=one, n=10)
    assert record.path == tmp_path / "evaluations" / "one-mine.json"
    assert (record.protocol["eps"], record.protocol["data"]["name"]) == ("0.1", "digits")


def test_foreign_weights_need_a_network_and_data(tmp_path: Path) -> None:
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=1)
    file = tmp_path / "foreign.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items() if "normalize" not in k}}, file)
    with pytest.raises(UserError, match="give data"):
        evaluate(file)
    with pytest.raises(UserError, match="give model"):
        evaluate(file, data="digits")
    with pytest.raises(UserError, match="does not fit small_cnn"):
        evaluate(file, data="digits", model="small_cnn", model_arguments={"width": 8})
    out = tmp_path / "out"
    evaluation = partial(evaluate, file, data="digits", model="small_cnn", model_arguments={"width": 4}, out=out)
    (plain,) = evaluation(suite=one, n=30)
    (normalised,) = evaluation(suite=one, n=30, normalize="dataset")
    assert plain.path == out / "one-foreign.json"
    direct = evaluate(net, data="digits", suite=one, n=30)[0]
    # What comes from a file is laid out as NHWC, which rounds otherwise.
    assert plain.instances["clean_margin"] == pytest.approx(direct.instances["clean_margin"], abs=1e-5)
    assert normalised.instances["clean_margin"] != pytest.approx(direct.instances["clean_margin"], abs=1e-2)
    assert normalised.run["reused"] == []


def test_a_quick_suite_is_what_it_says() -> None:
    assert [entry.name for entry in quick(Linf(8 / 255)).entries] == ["pgd_10", "margin_pgd_20"]
    assert {entry.attack.step_size for entry in quick(Linf(8 / 255)).entries} == {2 / 255}  # type: ignore[union-attr]


def test_images_of_other_splits_are_named(make_task: MakeTask) -> None:
    images = load("digits")
    _, selection = hold_out(images, selection=20, seed=0)
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    (record,) = evaluate(net, data=selection, suite=one)
    assert record.protocol["images"] == "chosen 20 of the 1437 selection images of Digits (8×8)"
    assert record.instances["index"].tolist() == selection.indices.tolist()
    (record,) = evaluate(net, data=TestSplit(load("digits", split="test")), suite=one, n=5)
    assert record.n == 5
    with pytest.raises(UserError, match="TestSplit got train images"):
        evaluate(net, data=images)


class Returns(nn.Module):
    """A model that returns what a function makes of the images."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def logits_of(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :3] * 4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: logits_of(x).softmax(1), "returns probabilities; logits are needed"),
        (lambda x: logits_of(x) * float("nan"), "returns NaN or infinity on clean images"),
        (lambda x: logits_of(x)[:, 0], r"must return logits of shape \(12, K\) .* got \(12,\)"),
        (lambda x: logits_of(x)[:5], r"got \(5, 3\)"),
        (lambda x: logits_of(x)[:, :1], r"got \(12, 1\)"),
        (lambda x: (logits_of(x), x), "got tuple"),
        (lambda x: x @ torch.zeros(3, 3), "the model failed on images of shape"),
        (lambda x: logits_of(x)[:, :2], "2 outputs, but custom has 3 classes"),
    ],
)
def test_a_model_that_cannot_be_judged_is_one_line(function: Callable[[Tensor], Any], message: str) -> None:
    pairs = torch.rand(12, 1, 5, 5), torch.arange(12) % 3
    with pytest.raises(UserError, match=message) as caught:
        evaluate(Returns(function), data=pairs, suite="quick")
    assert "\n" not in str(caught.value)


def test_a_later_image_on_which_the_model_returns_nan_is_named() -> None:
    x, y = torch.rand(12, 1, 5, 5), torch.arange(12) % 3
    x[9, 0, 0, 0] = 0.0

    def broken(images: Tensor) -> Tensor:
        return logits_of(images) + torch.log(images[:, 0, :1, 0] * 0 + (images[:, 0, :1, 0] > 0))

    with pytest.raises(UserError, match="NaN or infinity on clean image 9"):
        evaluate(Returns(broken), data=(x, y), batch_size=4, suite="quick")


def test_a_model_that_raises_midway_keeps_what_was_finished(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=12)
    broken = [False]

    def sometimes(images: Tensor) -> Tensor:
        if broken[0]:
            raise RuntimeError("the device\nis gone")
        return net(images)

    model = Returns(sometimes)
    net.eval()

    def progress(attack: str, done: int, total: int, robust: int) -> None:
        broken[0] = attack == "margin_pgd_5"

    with pytest.raises(
        UserError, match="margin PGD-5 stopped at images 0 to 11: RuntimeError: the device is gone; what"
    ):
        evaluate(model, data=(x, y), suite=small, eps=0.01, out=tmp_path, progress=progress)
    broken[0] = False
    (record,) = evaluate(model, data=(x, y), suite=small, eps=0.01, out=tmp_path)
    assert record.run["reused"] == ["pgd_5"]


def test_nan_on_attacked_images_is_one_line() -> None:
    x, y = torch.full((6, 1, 5, 5), 0.5), torch.zeros(6, dtype=torch.int64)

    def shattered(images: Tensor) -> Tensor:
        away = (images - 0.5).abs().amax((1, 2, 3)) > 0.004
        logits = torch.stack([images.flatten(1).mean(1), 0.3 * torch.ones(len(images))], 1)
        return torch.where(away[:, None], torch.full_like(logits, float("nan")), logits)

    with pytest.raises(UserError, match="NaN or infinity on attacked images"):
        evaluate(Returns(shattered), data=(x, y), suite=one, eps=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "standrad"}, "unknown suite 'standrad'. Did you mean 'standard'"),
        ({"checkpoint": "bset"}, "unknown checkpoint 'bset'. Did you mean 'best'"),
        ({"eps": 8}, "eps of Linf must be in .* got 8. Did you mean 8/255"),
        ({"eps": "eight"}, "must be a number such as 8/255; got 'eight'"),
        ({"norm": "L3", "eps": 1}, "unknown norm 'L3'"),
        ({"norm": "L2"}, "eps is needed with norm L2"),
        ({"n": 0}, "number of images must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"device": "gpu9"}, "device 'gpu9' cannot be used here"),
        ({"data": 3}, "data must be the name of a data set"),
        ({"data": None}, "give data with a module"),
        ({"data": (torch.rand(4, 1, 5, 5) * 255, torch.arange(4) % 3)}, r"must lie in \[0, 1\]"),
        ({"data": (torch.rand(4, 1, 5, 5), torch.arange(4) - 1)}, "label"),
        ({"data": "digits"}, "3 outputs, but Digits .* has 10 classes"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"data": (torch.rand(12, 1, 5, 5), torch.arange(12) % 3), "suite": "quick"}
    with pytest.raises(UserError, match=message) as caught:
        evaluate(Returns(logits_of), **(given | options))
    assert "\n" not in str(caught.value)


def test_targets_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder or weights file"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        evaluate(tmp_path)
    with pytest.raises(UserError, match="cannot read the evaluation record"):
        read(tmp_path / "nothing.json")


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(tmp_path: Path, make_task: MakeTask) -> None:
    net, x, y = make_task(3)
    (tmp_path / "file").write_text("")
    seen = forwards(net)
    with pytest.raises(UserError, match="cannot make the folder"):
        evaluate(net, data=(x, y), out=tmp_path / "file" / "below")
    assert not seen


def test_a_data_set_that_changes_between_readings_is_refused() -> None:
    class Restless(torch.utils.data.Dataset[tuple[Tensor, int]]):
        targets = tuple(range(3)) * 4

        def __len__(self) -> int:
            return 12

        def __getitem__(self, position: int) -> tuple[Tensor, int]:
            return torch.rand(1, 5, 5), self.targets[position]

    with pytest.raises(UserError, match="changed while they were evaluated"):
        evaluate(Returns(logits_of), data=Restless(), suite="quick")


def test_a_model_that_cannot_be_traced_is_attacked_itself(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=24, seed=2)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images) if float(images.detach().sum()) >= 0 else self.net(-images)

    (traced,) = evaluate(net, data=(x, y), suite=small, eps=0.006)
    (itself,) = evaluate(Branching(), data=(x, y), suite=small, eps=0.006)
    assert (traced.protocol["folded"], itself.protocol["folded"]) == (True, False)
    assert mcnemar(traced.instances["worst_case"], itself.instances["worst_case"]).p_value == 1


def test_a_model_that_is_always_wrong_has_nothing_to_attack(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=12)
    (record,) = evaluate(net, data=(x, 9 - y), suite=small, eps=0.01, n=1, shard_size=1)
    (nothing,) = evaluate(net, data=(x, torch.where(y == 3, 4, 3)), suite=small, eps=0.01, shard_size=5)
    assert {score.correct for score in nothing.scores.values()} <= {0, 1}
    assert record.n == 1


def test_some_images_of_a_data_set_that_is_sorted_by_class_are_of_all_classes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.rand(60, 1, 2, 2), torch.arange(60) // 20
    (record,) = evaluate(net, data=(images, labels), suite="quick", eps=0.05, n=12, out=tmp_path / "sorted")
    assert sorted(set(record.instances["label"].tolist())) == [0, 1, 2]
    assert record.protocol["images"].startswith("evenly spread 12 of the 60")
    (record,) = evaluate(net, data=(images, labels.flip(0)), suite="quick", eps=0.05, n=12, out=tmp_path / "not")
    assert record.protocol["images"].startswith("first 12 of the 60")
