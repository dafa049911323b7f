"""Disturb training and evaluation at random moments, let them go on, and compare what they leave with undisturbed ones.

    python benchmarks/chaos.py --moments 100 --out docs/results/chaos

Tiny networks on the embedded digits, trained by seven methods with 1, 2 and 4 processes, and evaluations. A moment is
one of these, while the program is at work:

    kill        SIGKILL to a process (of several, a random one)
    terminate   SIGTERM to a process
    full disk   no byte can be written for a while; then there is room again, and the program goes on by itself
    cut short   SIGKILL, and the newest state (of an evaluation: the newest finished part) loses its end
    bit flip    SIGKILL, and one bit of it changes

Whatever has stopped is started again by the command that a user would give, until it is complete: a round. Then every
file is compared byte for byte with that of an undisturbed program of as many processes; times aside, which are no
result. Prints one line a moment. Begun again, it goes on with the round that was interrupted.

Processes are started as ``torchrun`` starts them, with its variables, but forked from one that has imported PyTorch;
with ``--torchrun`` there are rounds of ``torchrun`` itself, which restarts what was killed. The disk is a small one in
memory where this program may mount one, else the limit of a file's size.

Exit status 1 if anything differs, hangs, or stops by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import instar
import instar.cli
import instar.cli.evaluate
import instar.cli.train
from instar.checkpoint import NEWEST, PREVIOUS

KINDS = ("kill", "terminate", "full disk", "cut short", "bit flip")
MOST = 5
"""Moments in a round."""
DISK = 24 * 2**20
"""Bytes of the small disk."""
LIMIT = 8 * 2**10
"""Bytes that a file may have where there is no small disk to fill; states and weights have more."""
HANGS = 300.0
"""Seconds after which a program that does not end counts as hanging."""
ALONE, GRACE = 5.0, 30.0
"""When one of several processes has ended, the others have so many seconds to notice it. Then they are stopped as by
torchrun: SIGTERM, and so many seconds later SIGKILL."""
TRAINING = ["--data", "digits", "--device", "cpu", "--precision", "float32", "--model", "small_cnn", "--width", "4"]
TRAINING += ["--batch-size", "128", "--epochs", "3", "--selection", "50", "--save-steps", "2", "--keep-every", "1"]
METHODS = {
    "pgd_at": ["--steps", "2"],
    "trades": ["--steps", "2"],
    "gairat": ["--steps", "3", "--burn_in", "0.3"],
    "p_sat": ["--steps", "3"],
    "iseat": ["--steps", "2"],
    "trades_awp": ["--steps", "2"],
    "free_at": ["--replays", "2"],
}
ATTACKS = ["--attack", "PGD(Linf(0.1), steps=10, step_size=0.025)"]
ATTACKS += ["--attack", "AutoAttack(Linf(0.1), steps=5, queries=50)"]
EVALUATION = [*ATTACKS, "--data", "digits", "--device", "cpu", "--n", "60", "--shard-size", "10", "--batch-size", "10"]


@dataclass(frozen=True)
class Scenario:
    """What is disturbed.

    Attributes:
        name: The recipe, or ``"evaluate"``.
        processes: How many.
        launch: ``"fork"`` or ``"torchrun"``.
    """

    name: str
    processes: int
    launch: str = "fork"

    @property
    def trains(self) -> bool:
        """Whether it is a training run."""
        return self.name != "evaluate"

    def __str__(self) -> str:
        several = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.name}, {several}{', torchrun' if self.launch == 'torchrun' else ''}"


@dataclass
class Moment:
    """One disturbance, and whether the round that it belongs to ended like an undisturbed program."""

    number: int
    round: int
    scenario: str
    processes: int
    launch: str
    kind: str
    seconds: float
    equal: bool | None = None

    def __str__(self) -> str:
        return f"moment {self.number}: {self.scenario}, {self.processes}: {self.kind} after {self.seconds:.2f} s"


class Running:
    """A program that was started, of one or several processes.

    Args:
        words: Its words behind ``instar``.
        scenario: How many processes, and who starts them.
        log: File that gets all it says.
    """

    def __init__(self, words: list[str], scenario: Scenario, log: Path) -> None:
        self.log, self.scenario = log, scenario
        self.began = time.monotonic()
        self.statuses: dict[int, int | None] = {}
        self.launcher: subprocess.Popen[bytes] | None = None
        if scenario.launch == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "99"]
            command += ["--nproc-per-node", str(scenario.processes), "--monitor-interval", "0.1", "-m", "instar"]
            with log.open("ab") as stream:
                self.launcher = subprocess.Popen([*command, *words], stdout=stream, stderr=stream)
            self.statuses[self.launcher.pid] = None
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        for rank in range(scenario.processes):
            pid = os.fork()
            if pid == 0:
                _become(words, scenario.processes, rank, port, log)
            self.statuses[pid] = None

    def alive(self) -> list[int]:
        """Its processes that have not ended."""
        for pid, status in self.statuses.items():
            if status is None:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(code)
        return [pid for pid, status in self.statuses.items() if status is None]

    def at_work(self) -> list[int]:
        """Its processes that train: those of ``torchrun`` are its children."""
        if self.launcher is None:
            return self.alive()
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text()
            return [int(pid) for pid in children.split()]
        return []

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        until = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)
        return True

    def ended_together(self, target: int) -> None:
        """Wait until a process has ended, and end the others if they do not, as a launcher does."""
        until = time.monotonic() + HANGS
        while target in self.alive() and time.monotonic() < until:
            time.sleep(0.005)
        if not self.wait(ALONE):
            for pid in self.alive():
                os.kill(pid, signal.SIGTERM)
            if not self.wait(GRACE):
                self.end()

    def end(self) -> None:
        """Kill what is left of it."""
        for pid in {*self.at_work(), *self.alive()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(HANGS)

    @property
    def status(self) -> list[int]:
        """Exit statuses of all processes that have ended."""
        return [status for status in self.statuses.values() if status is not None]


def _become(words: list[str], processes: int, rank: int, port: int, log: Path) -> None:
    """In a fork: run a command and exit with its status."""
    status = 99
    try:
        if processes > 1:
            os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        status = instar.cli.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


class Disk:
    """A place that can be full.

    Args:
        folder: Where it is.
        mounted: Whether it is a small disk of its own; else files are limited in size while it is "full".
    """

    def __init__(self, folder: Path, *, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted

    @contextlib.contextmanager
    def full(self, running: Running) -> Iterator[None]:
        """While this lasts, nothing more can be written."""
        if self.mounted:
            filler = self.folder / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for portion in (1 << 16, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(portion))
            yield
            filler.unlink()
            return
        former = {}
        for pid in running.at_work():
            with contextlib.suppress(OSError):
                former[pid] = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (LIMIT, former[pid][1]))
        yield
        for pid, limits in former.items():
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def small_disk(place: Path, *, limit: bool) -> Iterator[Disk]:
    """A disk in memory, if this program may mount one and is not told to limit files instead."""
    place.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(place):  # of an earlier attempt that was killed
        subprocess.run(["umount", str(place)], check=False, capture_output=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    try:
        mounted = not limit and subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield Disk(place, mounted=mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=False)
        shutil.rmtree(place, ignore_errors=True)


@dataclass
class Chaos:
    """All rounds, and what came of them."""

    work: Path
    disk: Disk
    seed: int
    moments: list[Moment] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def undisturbed(self, scenario: Scenario) -> tuple[Path, float]:
        """The folder of an undisturbed program, and how many seconds it takes; kept for all rounds."""
        forked = Scenario(scenario.name, scenario.processes)
        place = self.work / f"whole-{forked.name}-{forked.processes}"
        note = place / "seconds"
        if not note.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            running = Running(self.words(forked, place / "out"), forked, place / "log")
            if not running.wait(HANGS) or any(running.status):
                running.end()
                sys.exit(f"{forked} fails undisturbed:\n{(place / 'log').read_text()}")
            note.write_text(str(time.monotonic() - running.began))
        return place / "out", float(note.read_text())

    def weights(self) -> Path:
        """The network that evaluations judge."""
        whole, _ = self.undisturbed(Scenario("pgd_at", 1))
        return whole / "checkpoints" / "last.safetensors"

    def words(self, scenario: Scenario, out: Path) -> list[str]:
        """The command that a user would give now: the first one, or the one that goes on."""
        if not scenario.trains:
            return ["evaluate", str(self.weights()), *EVALUATION, "--out", str(out)]
        if (out / "run.json").exists():
            return ["train", "--resume", "--out", str(out)]
        return ["train", scenario.name, *METHODS[scenario.name], *TRAINING, "--out", str(out)]

    def round(self, number: int, scenario: Scenario, most: int) -> None:
        """Start a program, disturb it until it has ended or had enough, and compare."""
        whole, seconds = self.undisturbed(scenario)
        chance = random.Random(f"{self.seed}-{number}")
        out, log = self.disk.folder / f"round-{number}", self.work / f"round-{number}.log"
        log.unlink(missing_ok=True)
        done: list[Moment] = []
        idle = 0
        while True:
            running = Running(self.words(scenario, out), scenario, log)
            before = len(done)
            self._disturb(running, scenario, out, chance, done, number, seconds, most)
            if not running.wait(HANGS):
                running.end()
                self.failures.append(f"round {number} ({scenario}) hangs, see {log}")
                break
            if not any(running.status):
                break
            idle = 0 if len(done) > before else idle + 1
            if idle == 2:  # once may be the echo of a moment, such as a disk that was full at the start
                said = " ".join(log.read_text().split()[-40:])
                self.failures.append(f"round {number} ({scenario}) stops by itself, {running.status}: {said}")
                break
        else_differs = difference(out, whole, trains=scenario.trains) if not any(running.status) else ["it did not end"]
        for moment in done:
            moment.equal = not else_differs
        if else_differs and done:
            self.failures.append(f"round {number} ({scenario}): {', '.join(else_differs[:5])}")
        print(f"round {number}: {scenario}: {len(done)} moments, {'equal' if not else_differs else else_differs[:3]}")
        self.moments += done
        if not else_differs:
            log.unlink()
            shutil.rmtree(out)

    def _disturb(
        self,
        running: Running,
        scenario: Scenario,
        out: Path,
        chance: random.Random,
        done: list[Moment],
        number: int,
        seconds: float,
        most: int,
    ) -> None:
        """Do what one attempt suffers: full disks, as long as it goes on by itself, and in the end a signal."""
        kinds = KINDS if scenario.launch == "fork" else ("kill", "terminate")
        while len(done) < most:
            delay = chance.uniform(0, 0.5 * seconds)
            if scenario.launch == "torchrun":  # measured from the moment at which the processes have begun to save
                begun = time.monotonic()
                while not running.wait(0.1) and time.monotonic() - begun < HANGS:
                    if (out / "checkpoints").exists() and len(running.at_work()) == scenario.processes:
                        break
            if running.wait(delay):
                return
            kind = chance.choice(kinds)
            kind = self._apply(kind, running, scenario, out, chance)
            if not kind:
                return
            moment = Moment(
                len(self.moments) + len(done) + 1,
                number,
                scenario.name,
                scenario.processes,
                scenario.launch,
                kind,
                round(time.monotonic() - running.began, 3),
            )
            done.append(moment)
            print(moment, flush=True)
            if kind != "full disk" and not (scenario.launch == "torchrun" and kind == "kill"):
                return

    def _apply(self, kind: str, running: Running, scenario: Scenario, out: Path, chance: random.Random) -> str:
        """Do it; what was done in the end, or nothing if the program had ended before."""
        if kind == "full disk":
            with self.disk.full(running):
                running.wait(chance.uniform(0.05, 1.5))
            return kind
        targets = running.at_work()
        if kind == "terminate" and running.launcher is not None:
            targets = [running.launcher.pid]
        if not targets:
            return ""
        target = chance.choice(targets)
        try:
            os.kill(target, signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
        except ProcessLookupError:
            return ""
        if scenario.launch == "torchrun" and kind == "kill":
            return kind
        if scenario.processes > 1 and running.launcher is None:
            running.ended_together(target)
        elif not running.wait(HANGS):
            return kind  # it hangs, and the round says so
        if kind == "terminate":
            expected = 143 if scenario.trains and running.launcher is None else None
            ended = running.statuses[target]
            if expected is not None and ended not in (expected, 0, -signal.SIGTERM):
                self.failures.append(f"SIGTERM to {scenario} ended with status {ended}, not {expected}")
            return kind
        if kind == "kill":
            return kind
        victim = _newest(out, trains=scenario.trains)
        if victim is None:
            return "kill"
        damage(victim, kind, chance)
        return kind


def _newest(out: Path, *, trains: bool) -> Path | None:
    """The file that is damaged next, if what remains is enough to go on from."""
    if trains:
        newest, previous = (out / "checkpoints" / name for name in (NEWEST, PREVIOUS))
        return newest if newest.exists() and previous.exists() else None
    parts = sorted(out.glob("shards/*.npz"), key=lambda path: path.stat().st_mtime_ns)
    return parts[-1] if parts else None


def damage(path: Path, kind: str, chance: random.Random) -> None:
    """Cut a file short, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if kind == "cut short":
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.unlink()  # it may be the same file as the one that is to be fallen back on, by another name
    path.write_bytes(content)


def difference(run: Path, whole: Path, *, trains: bool) -> list[str]:
    """What a disturbed program left otherwise than an undisturbed one."""
    if not trains:
        return _differing_records(run, whole)
    names = {_name(file, whole) for file in whole.rglob("*") if file.is_file()}
    there = {_name(file, run) for file in run.rglob("*") if file.is_file()}
    # The state before the last one depends on when saves succeeded; damaged ones are kept on purpose.
    loose = {f"checkpoints/{PREVIOUS}"} | {name for name in there if name.startswith("checkpoints/state-damaged")}
    found = [f"{name} is missing or too much" for name in sorted((names ^ there) - loose)]
    for name in sorted(names & there - loose - {"run.json"}):
        ours, theirs = (run / name).read_bytes(), (whole / name).read_bytes()
        if name == f"checkpoints/{NEWEST}":
            ours, theirs = _without_seconds(ours), _without_seconds(theirs)
        elif name == "log.jsonl":
            ours, theirs = (re.sub(rb'"seconds": [0-9.e-]+', b"", text) for text in (ours, theirs))
        if ours != theirs:
            found.append(f"{name} differs")
    return found


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _without_seconds(content: bytes) -> bytes:
    """A state without the time that it took, and without the checksum, of which the time is part."""
    length = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:length])
    told = head.pop("__metadata__")
    numbers = json.loads(told["state"])
    assert numbers.pop("seconds") > 0
    return json.dumps([head, numbers], sort_keys=True).encode() + content[length:]


def _differing_records(run: Path, whole: Path) -> list[str]:
    found = []
    for file in whole.glob("*.json"):
        other = run / file.name
        if not other.exists():
            return [f"{file.name} is missing"]
        ours, theirs = (json.loads(path.read_text()) for path in (other, file))
        ours.pop("run"), theirs.pop("run")  # how it came about: when, how long, on which machine
        found += [f"{file.name} differs"] if ours != theirs else []
        tables = [path.with_suffix(".npz").read_bytes() for path in (other, file)]
        found += [f"{file.stem}.npz differs"] if tables[0] != tables[1] else []
    return found or ([] if any(whole.glob("*.json")) else ["there is no record"])


def scenarios(processes: list[int], names: list[str], torchrun: bool) -> list[Scenario]:
    """Every method with every number of processes, in turns, evaluations with at most two; ``torchrun`` at the end."""
    found = []
    for turn in range(len(processes)):
        for place, name in enumerate(names):
            count = processes[(place + turn) % len(processes)]
            found.append(Scenario(name, min(count, 2) if name == "evaluate" else count))
    if torchrun:
        found += [Scenario("gairat", 2, "torchrun"), Scenario("trades_awp", 2, "torchrun")]
    return found


def main() -> int:
    """Rounds until there were enough moments."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--moments", type=int, default=100)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--processes", default="1,2,4", help="numbers of processes")
    given.add_argument("--only", default=",".join([*METHODS, "evaluate"]), help="methods, and evaluate")
    given.add_argument("--most", type=int, default=MOST, help="moments in a round")
    given.add_argument("--torchrun", action="store_true", help="rounds of torchrun itself too, which are slow")
    given.add_argument("--limit", action="store_true", help="mount no small disk: limit the size of files instead")
    given.add_argument("--work", type=Path, default=Path("build/chaos"), help="where undisturbed runs are kept")
    given.add_argument("--out", type=Path, default=None, help="folder of chaos.json and README.md")
    told = given.parse_args()
    turns = scenarios([int(count) for count in told.processes.split(",")], told.only.split(","), told.torchrun)
    told.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    kept = told.work / "rounds.jsonl"
    with small_disk(told.work.absolute() / "small", limit=told.limit) as disk:
        chaos = Chaos(told.work.absolute(), disk, told.seed)
        begun = time.monotonic()
        number, spent = 0, 0.0
        if kept.exists():
            for line in kept.read_text().splitlines():
                stored = json.loads(line)
                number, spent = stored["round"] + 1, stored["seconds"]
                chaos.moments += [Moment(**moment) for moment in stored["moments"]]
                chaos.failures += stored["failures"]
        already = spent
        while len(chaos.moments) < told.moments:
            moments, failures = len(chaos.moments), len(chaos.failures)
            scenario = turns[number % len(turns)]
            chaos.round(number, scenario, min(told.most, told.moments - len(chaos.moments)))
            spent = already + time.monotonic() - begun
            stored = {"round": number, "seconds": spent, "failures": chaos.failures[failures:]}
            stored["moments"] = [asdict(moment) for moment in chaos.moments[moments:]]
            with kept.open("a") as file:
                file.write(json.dumps(stored) + "\n")
            number += 1
        found = _summary(chaos, told.seed, rounds=number, seconds=spent)
    good = sum(moment.equal is True for moment in chaos.moments)
    print(f"{good} of {len(chaos.moments)} moments in rounds that ended equal; {len(chaos.failures)} failures")
    for failure in chaos.failures:
        print(failure)
    if told.out is not None:
        told.out.mkdir(parents=True, exist_ok=True)
        (told.out / "chaos.json").write_text(json.dumps(found, indent=1) + "\n")
        (told.out / "README.md").write_text(_page(found))
    return 1 if chaos.failures or good < len(chaos.moments) else 0


def _summary(chaos: Chaos, seed: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    return {
        "moments": [asdict(moment) for moment in chaos.moments],
        "failures": chaos.failures,
        "rounds": rounds,
        "seed": seed,
        "seconds": round(seconds),
        "disk": f"tmpfs of {DISK >> 20} MiB" if chaos.disk.mounted else f"files limited to {LIMIT} bytes",
        "hardware": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[2]},
        "versions": {
            "instar": instar.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def _page(found: dict[str, Any]) -> str:
    moments = found["moments"]
    good = sum(moment["equal"] is True for moment in moments)
    counts = sorted({moment["processes"] for moment in moments})
    table = Counter((m["scenario"] + (", torchrun" if m["launch"] == "torchrun" else ""), m["kind"]) for m in moments)
    names = list(dict.fromkeys(name for name, _ in table))
    heads = [kind for kind in KINDS if any(other == kind for _, other in table)]
    lines = [f"| | {' | '.join(heads)} | all | equal |", f"| --- |{' ---: |' * (len(heads) + 2)}"]
    for name in names:
        recipe, _, launch = name.partition(", ")
        own = [m for m in moments if m["scenario"] == recipe and (m["launch"] == "torchrun") == (launch == "torchrun")]
        cells = [str(table[name, kind]) for kind in heads]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(own)} | {sum(m['equal'] is True for m in own)} |")
    several = ", ".join(f"{sum(m['processes'] == count for m in moments)} with {count}" for count in counts)
    versions, hardware = found["versions"], found["hardware"]
    parts = [
        "# Chaos",
        "Training runs and evaluations of tiny networks on the embedded digits, disturbed at random moments, gone on "
        "with by the command that a user would give, and compared byte for byte with undisturbed ones of as many "
        "processes: weights (best, last, and those of each epoch) with their cards, the saved state with momentum and "
        "average, the instance table of each epoch, the log, and the records of evaluations with their rows. Times "
        "are left out, and so is the state before the last one.",
        f"**{good} of {len(moments)} moments ended so.**",
        "\n".join(lines),
        f"By processes: {several}.",
        "- *kill*: SIGKILL to one process. *terminate*: SIGTERM to one (of `torchrun`: to the launcher).",
        f"- *full disk* ({found['disk']}): nothing can be written for up to 1.5 seconds; the program goes on by "
        "itself.",
        "- *cut short*, *bit flip*: SIGKILL, then the newest state is damaged at a random place; of an evaluation the "
        "newest finished part.",
        "## What failed",
        "\n".join(f"- {failure}" for failure in found["failures"]) or "None.",
        "## How it was made",
        f"`python benchmarks/chaos.py --moments {len(moments)} --seed {found['seed']}`: {found['rounds']} "
        f"rounds in {found['seconds'] // 60} minutes on {hardware['cores']} cores of {hardware['machine']}, shared "
        f"with other work (load {hardware['load']:.0f}); gloo on the CPU. Instar {versions['instar']}, PyTorch "
        f"{versions['torch']}, NumPy {versions['numpy']}, Python {versions['python']}, {versions['system']}. Each "
        "moment is in [chaos.json](chaos.json). Processes are forked from one that has imported PyTorch, with the "
        "variables of `torchrun`; `--torchrun` adds rows of `torchrun` itself. Random moments "
        "are drawn from the seed, but what a process is doing at a moment depends on the machine: another run hits "
        "other places. A shorter form runs in the tests.",
    ]
    filled = [part if part[0] in "|*#-" and "\n" in part else textwrap.fill(part, 120) for part in parts]
    return "\n\n".join(filled).replace("\n\n- *full", "\n- *full").replace("\n\n- *cut", "\n- *cut") + "\n"


if __name__ == "__main__":
    sys.exit(main())
