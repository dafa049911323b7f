"""Inputs for one reader that atheris finds by the code they reach: beside the blind ones of ``benchmarks/fuzz.py``.

    pip install atheris
    python benchmarks/fuzz_guided.py expression --inputs 500000 --out runs/fuzz-guided

What counts as a crash is the same. Writes ``<out>/<reader>.json`` as it goes on, and keeps in ``<out>/<reader>`` the
inputs that reached something new, from which another call goes on. libFuzzer prints the branches reached (``cov``).
The exit status is 1 at the first crash.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import atheris
import torch  # before the instrumentation, which is for our code alone

with atheris.instrument_imports(include=["instar"]):
    import instar
    from tests.safety import targets
    from tests.safety.fuzzing import Outcome, read_one


def main() -> None:
    """Fuzz one reader; atheris ends the process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("reader", help="as in the table of benchmarks/fuzz.py, for example expression")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz-guided"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = targets.everything(Path(tempfile.mkdtemp()))
    chosen = [target for target in found if target.name == given.reader]
    if not chosen:
        parser.error(f"unknown reader {given.reader}: one of {', '.join(target.name for target in found)}")
    (target,) = chosen
    corpus = given.out / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number:04d}").write_bytes(seed)
    outcome = Outcome()

    def write() -> None:
        row = {
            "reader": target.name,
            "inputs": outcome.inputs,
            "accepted": outcome.accepted,
            "refused": outcome.refused,
            "slowest_ms": round(1000 * outcome.slowest, 1),
            "crashes": [[content.hex(), what] for content, what in outcome.crashes],
            "versions": {"instar": instar.__version__, "torch": torch.__version__, "atheris": version("atheris")},
        }
        (given.out / f"{target.name}.json").write_text(json.dumps(row, indent=2) + "\n")

    def read(content: bytes) -> None:
        read_one(target, content, outcome)
        if outcome.crashes or outcome.inputs % 1000 == 0 or outcome.inputs >= given.inputs:
            write()
        if outcome.crashes:
            print(f"{target.name}: {outcome.crashes[0][1]}", flush=True)
            os._exit(1)

    options = [f"-atheris_runs={given.inputs}", f"-seed={given.seed}", "-max_len=2000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
