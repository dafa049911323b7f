"""Kill an evaluation at random moments, resume it, and compare its record with that of an undisturbed one.

    python benchmarks/kill_evaluation.py --kills 20

A tiny network on the embedded digits is judged by PGD and AutoAttack in a process of its own, which SIGKILL ends at
random moments after it has begun to look at images, which is started again, and so on, in as many rounds as the kills
need. Prints one line a round: kills, whether record and rows are equal to the byte, and how many images the network saw
beside those of an undisturbed evaluation, against what the kills may cost at most. With ``--processes 2`` every attempt
is shared by two processes, which are killed together; the undisturbed evaluation is still that of one process.

Exit status 1 if a record differs or more was computed twice than one shard and one start a kill and process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from instar.data import load
from instar.data.indexed import as_float
from instar.models import create

IMAGES, SHARD, BATCH = 60, 20, 10
ATTACKS = (
    "PGD(Linf(0.1), steps=20, step_size=0.025)",
    "AutoAttack(Linf(0.1), steps=10, queries=300)",
)
NETWORK = '''
"""A small network that notes how many images it sees; it cannot be traced, so that no copy sees any."""

import os

import torch
from instar.models import create


class Counting(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net = create("small_cnn", classes=classes, channels=1, image_size=8, width=4, seed=0)

    def forward(self, x):
        if float(x.detach().sum()) < 0:
            raise AssertionError
        with open(os.environ["SEEN"], "ab") as file:
            file.write(b"%d\\n" % len(x))
        return self.net(x)


def make(classes, **rest):
    return Counting(classes)
'''


def main() -> int:
    """Run undisturbed, then with kills."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--kills", type=int, default=20)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--processes", type=int, default=1, help="processes that share every attempt")
    arguments = given.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="instar-kills-") as name:
        place = Path(name)
        (place / "counting_network.py").write_text(NETWORK)
        net = _trained()
        torch.save({f"net.{key}": tensor for key, tensor in net.state_dict().items()}, place / "weights.pt")
        whole, seconds = _undisturbed(place)
        # Computed already: what is left is what every start costs.
        again, _ = _undisturbed(place)
        start, all_of_it = again, whole - again
        # Shards are of one size; a quarter more for one whose images withstand more.
        shard = 1.25 * all_of_it * SHARD / IMAGES
        print(f"undisturbed: {whole} images seen in {seconds:.0f} s, {start} of them before the first attack")
        bad, kills, rounds = 0, 0, 0
        while kills < arguments.kills:
            rounds += 1
            out = place / f"killed-{rounds}"
            done = 0
            processes = arguments.processes
            while kills < arguments.kills and _killed(place, out, chance.uniform(0, seconds / 4), processes):
                kills, done = kills + 1, done + 1
            _finish(place, out, processes)
            equal = _record(out) == _record(place / "whole") and _rows(out) == _rows(place / "whole")
            # Each process has a shard at hand and looks at the clean images when it starts.
            extra, allowed = _seen(out) - whole, done * processes * (shard + start) + (processes - 1) * start
            print(f"round {rounds}: {done} kills, equal: {equal}, {extra} images seen twice of at most {allowed:.0f}")
            bad += not equal or extra > allowed
        print(f"{kills} kills in {rounds} rounds: {'all records equal' if not bad else f'{bad} rounds differ'}")
    return 1 if bad else 0


def _trained() -> torch.nn.Module:
    """A network that is right on most images, so that there is something to attack."""
    images = load("digits", split="train")
    x, y = as_float(images.fetch(torch.arange(len(images)))), images.labels
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def _command(place: Path, out: Path, processes: int = 1) -> list[str]:
    words = [sys.executable, "-m", "instar", "evaluate", str(place / "weights.pt")]
    words += ["--model", "counting_network:make", "--data", "digits", "--norm", "Linf", "--eps", "0.1"]
    words += [part for attack in ATTACKS for part in ("--attack", attack)]
    words += ["--n", str(IMAGES), "--shard-size", str(SHARD), "--batch-size", str(BATCH), "--device", "cpu"]
    return [*words, "--out", str(out), *(["--processes", str(processes)] if processes > 1 else [])]


def _environment(place: Path, out: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "SEEN": str(place / f"{out.name}.seen")}


def _undisturbed(place: Path) -> tuple[int, float]:
    """Evaluate to the end; images seen, and seconds from the first finished batch on."""
    out = place / "whole"
    before = _seen(out)
    _finish(place, out, 1)
    stored = sorted(file.stat().st_mtime for file in (out / "shards").glob("*.npz"))
    spent = sum(json.loads(_json(out).read_text())["run"]["seconds"].values())
    return _seen(out) - before, max(spent, stored[-1] - stored[0])


def _finish(place: Path, out: Path, processes: int) -> None:
    done = subprocess.run(
        _command(place, out, processes), env=_environment(place, out), cwd=place, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"the evaluation failed: {done.stderr.decode()}")


def _killed(place: Path, out: Path, delay: float, processes: int) -> bool:
    """Start an evaluation and kill it `delay` seconds after it began to see images; whether it was still at work."""
    before = _seen(out)
    running = subprocess.Popen(
        _command(place, out, processes),
        env=_environment(place, out),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while running.poll() is None and _seen(out) == before:
        time.sleep(0.01)
    time.sleep(delay)
    if running.poll() is not None:
        return False
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    return True


def _seen(out: Path) -> int:
    """Images that the network saw, over all attempts."""
    file = out.parent / f"{out.name}.seen"
    # A kill may leave the last line without its end.
    return sum(int(line) for line in file.read_bytes().split() if line) if file.exists() else 0


def _json(out: Path) -> Path:
    (found,) = out.glob("*.json")
    return found


def _record(out: Path) -> dict[str, object]:
    """All of a record but how it came about."""
    return {key: value for key, value in json.loads(_json(out).read_text()).items() if key != "run"}


def _rows(out: Path) -> bytes:
    return _json(out).with_suffix(".npz").read_bytes()


if __name__ == "__main__":
    sys.exit(main())
