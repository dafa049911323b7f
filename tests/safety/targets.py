"""All readers of foreign files and texts, each with sound inputs to mutate."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import scipy.io
import torch
from PIL import Image
from torch import nn

from instar.checkpoint import WITHOUT_CHECKSUM, State, load_state, save_state
from instar.cli import main
from instar.data import formats
from instar.data.catalogue import CATALOGUE
from instar.data.extra import ExtraImages
from instar.errors import UserError
from instar.evaluate import evaluate
from instar.evaluate.record import read as read_record
from instar.expression import parse
from instar.instances import InstanceTable, read_instances
from instar.methods import RECIPES
from instar.models import create, load_foreign
from instar.models import load as load_weights
from instar.models import save as save_weights
from instar.report import read as read_stored
from instar.runs import read_run
from instar.train import train
from tests.safety.fuzzing import INTERESTING, Target, sprung

WORDS = tuple(
    word.encode()
    for word in (
        *(
            "(",
            ")",
            "((",
            "))",
            ",",
            "'",
            '"',
            "*",
            "+",
            "-",
            "/",
            "**",
            "[",
            "]",
            "{",
            "}",
            ".",
            "=",
            ":=",
            "\\",
            "\n",
            "#",
        ),
        *(
            "lambda: 0",
            "__import__('os')",
            "sprung()",
            "__class__",
            "eval",
            "exec",
            "open",
            "for x in",
            "if",
            "else",
            "None",
            "True",
        ),
        *(
            "nan",
            "inf",
            "1e999",
            "-1",
            "0",
            "9" * 30,
            "0x",
            "8/255",
            "Linf",
            "PGD()",
            "KL()",
            "Ramp(0, 1, 0, 1)",
            "\u0000",
            "é",
            "∞",
        ),
        *("x" * 300, "(" * 100, "-" * 100, "KL()+" * 50),
    )
)
YAML_WORDS = (
    *WORDS,
    *(
        b": ",
        b"- ",
        b"\n  ",
        b"\n",
        b"&a ",
        b"*a",
        b"!!python/object/apply:tests.safety.fuzzing.sprung ['by YAML']",
        b"!!binary ",
        b"<<: *a",
        b"---",
        b"|",
        b">",
    ),
)
HOSTILE_SEEDS = {"file of torch.save": 1, "pickled CIFAR batch": 1}
"""How many of a target's seeds, at their end, are refused as they are: they would run code."""


class Code:
    """What an attacker would pickle: reading it would spring the trap."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Ask for a call of the trap."""
        return (sprung, ("by a pickle",))


def expressions() -> list[Target]:
    """The parser of expressions."""
    methods = [
        repr(recipe()) for name, recipe in RECIPES.items() if name != "kd_swa"
    ]  # which reads its teachers' files
    seeds = [*methods, "8/255", "Ramp(0, 0.4, 0.3, 0.7)", "Exceeds(ProbabilityGap(), 0.5)", "(1, 2.5, 'a', None, inf)"]
    return [
        Target(
            "expression",
            tuple(seed.encode() for seed in seeds),
            lambda text: parse(text.decode("utf-8", "replace")),
            WORDS,
        )
    ]


def configurations(folder: Path) -> list[Target]:
    """Configuration files of the command line."""
    path = folder / "config.yaml"
    changes = "set:\n- attack.steps=5\n- perturbation=AWP(5e-3)\n"
    written = f"recipe: trades\nbeta: 6.0\neps: 8/255\ndata: digits\nepochs: 3\n{changes}"
    seeds = (
        written,
        "data: cifar10\nepochs: 10\nlr: 0.1\n",
        "set: [attack.mode=train]\nwidth: 8\nema: 0.9\n",
        "drops: ((0.5, 0.1),)\n",
    )

    def read(content: bytes) -> None:
        path.write_bytes(content)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main(["train", "trades", "--config", str(path), "--print-config"])
        if status:
            complaint = said.getvalue().removesuffix("\n")
            assert status == 2, f"exit status {status}"
            assert complaint.count("\n") == 0, f"not one line: {complaint!r}"
            raise UserError(complaint)

    return [Target("configuration", tuple(seed.encode() for seed in seeds), read, YAML_WORDS)]


def files(folder: Path) -> list[Target]:
    """Weights, checkpoints, run folders, records, tables and data sets."""
    return [*_weights(folder), *_run(folder), *_data(folder)]


def _file(name: str, path: Path, seeds: tuple[bytes, ...], read: Callable[[Path], Any]) -> Target:
    path.parent.mkdir(parents=True, exist_ok=True)

    def from_bytes(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return Target(
        name,
        seeds,
        from_bytes,
        (
            *INTERESTING,
            b'"',
            b"numpy",
            b"descr",
            b"PK\x03\x04",
            b"__reduce__",
            b"ctests.safety.fuzzing\nsprung\n",
            b"(S'x'\ntR.",
        ),
    )


def _net() -> nn.Module:
    return create("small_cnn", classes=10, channels=1, image_size=8, width=2)


def _weights(folder: Path) -> list[Target]:
    place = folder / "weights"
    place.mkdir(parents=True)
    net = _net()
    ours = place / "ours.safetensors"
    save_weights(net, ours, {"data": "digits"})
    buffer, wrapped, hostile = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(net.state_dict(), buffer)
    torch.save({"state_dict": {f"module.{key}": entry for key, entry in net.state_dict().items()}, "epoch": 3}, wrapped)
    torch.save({"state_dict": net.state_dict(), "trap": Code()}, hostile)
    card = ours.with_suffix(".json").read_bytes()
    plain = ours.read_bytes()

    def with_card(content: bytes) -> None:
        ours.with_suffix(".json").write_bytes(content)
        load_weights(ours)

    return [
        Target("card of weights", (card,), with_card),
        _file("safetensors", place / "plain.safetensors", (plain,), lambda path: load_foreign(path, _net())),
        _file(
            "file of torch.save",
            place / "foreign.pt",
            (buffer.getvalue(), wrapped.getvalue(), hostile.getvalue()),
            lambda path: load_foreign(path, _net()),
        ),
    ]


def _run(folder: Path) -> list[Target]:
    run = folder / "run"
    settings: dict[str, Any] = {"width": 2, "epochs": 2, "batch_size": 512, "arguments": {"steps": 2}}
    train("gairat", out=run, **settings)
    evaluate(run, suite="quick", n=8, checkpoint="best")
    seeds = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    record = "evaluations/quick-best.json"

    def state() -> State:
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        return State(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), InstanceTable(4), average=None)

    saved = folder / "state.safetensors"
    save_state(state(), saved, fingerprint="a run")
    with safetensors.safe_open(str(saved), framework="pt") as file:  # the older format has no checksum to stop at
        numbers = json.loads(file.metadata()["state"]) | {"format": WITHOUT_CHECKSUM}
    older = safetensors.torch.save(safetensors.torch.load_file(saved), metadata={"state": json.dumps(numbers)})

    def replaced(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def from_copy(path: Path) -> Any:
            shutil.copyfile(path, run / name)
            return read(run)

        return from_copy

    table = InstanceTable(30)
    table.save(folder / "table.npz")
    return [
        _file(
            "checkpoint",
            folder / "fuzzed" / "state.safetensors",
            (saved.read_bytes(), older, older),
            lambda path: load_state(state(), path, fingerprint="a run"),
        ),
        _file(
            "instance table", folder / "fuzzed" / "table.npz", ((folder / "table.npz").read_bytes(),), read_instances
        ),
        _file(
            "description of a run", folder / "fuzzed" / "run.json", (seeds["run.json"],), replaced("run.json", read_run)
        ),
        _file(
            "run for a report", folder / "fuzzed" / "run2.json", (seeds["run.json"],), replaced("run.json", read_stored)
        ),
        _file(
            "record",
            folder / "fuzzed" / "record.json",
            (seeds[record],),
            replaced(record, lambda path: read_record(path / record)),
        ),
    ]


def _data(folder: Path) -> list[Target]:
    place = folder / "data"
    place.mkdir(parents=True)
    images = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)
    labels = [3, 1, 4, 1]
    idx = struct.pack(">4B3I", 0, 0, 8, 3, 2, 4, 4) + bytes(32)
    pickled = tuple(pickle.dumps({"data": images, "labels": labels}, protocol=number) for number in (2, 4))
    binary = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, images, strict=True))
    mat, png, packed, stored = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    scipy.io.savemat(
        mat, {"X": images.reshape(4, 3, 32, 32).transpose(2, 3, 1, 0), "y": np.array([[1], [10], [3], [4]], np.uint8)}
    )
    Image.fromarray(images.reshape(4, 1024, 3)).save(png, "PNG")
    small = images[:, :64].reshape(4, 8, 8, 1)
    np.savez_compressed(packed, image=small, label=np.array(labels))
    np.savez(stored, image=small, label=np.array(labels))

    def extra(path: Path) -> Any:
        opened = ExtraImages.open(path, info=CATALOGUE["digits"], cache=place / "cache")
        return opened.fetch(torch.arange(len(opened)))

    return [
        _file("IDX", place / "images-idx3-ubyte", (idx, gzip.compress(idx)), formats.read_idx),
        _file(
            "pickled CIFAR batch",
            place / "batch",
            (*pickled, pickle.dumps({"data": Code()})),
            lambda path: formats.read_cifar_pickle(path, count=4, classes=10),
        ),
        _file(
            "binary CIFAR batch",
            place / "batch.bin",
            (binary,),
            lambda path: formats.read_cifar_binary(path, count=4, classes=10),
        ),
        _file("MATLAB file", place / "test_32x32.mat", (mat.getvalue(),), lambda path: formats.read_mat(path, count=4)),
        _file("PNG of rows", place / "batch.png", (png.getvalue(),), lambda path: formats.read_row_png(path, count=4)),
        _file(
            "picture",
            place / "picture.png",
            (png.getvalue(),),
            lambda path: formats.read_picture(path, height=8, width=8),
        ),
        _file(
            "JSON labels",
            place / "labels.json",
            (json.dumps(labels).encode(),),
            lambda path: formats.read_json_labels(path, count=4, classes=10),
        ),
        _file("extra images", place / "extra.npz", (packed.getvalue(), stored.getvalue()), extra),
    ]


def everything(folder: Path) -> list[Target]:
    """All targets; what they read lies in a folder."""
    return [*expressions(), *configurations(folder), *files(folder)]
