"""Importing is quiet: no warning, no output, nothing changed for the program that imports."""

import subprocess
import sys

IMPORT_EVERYTHING = """
import importlib, pkgutil
import instar
for module in pkgutil.walk_packages(instar.__path__, "instar."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

KEEP_WHAT_IS_GLOBAL = """
import random, numpy, torch
numpy.random.seed(1); torch.manual_seed(1); random.seed(1)
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()), torch.get_num_threads(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
    )
before = state()
import instar
assert state() == before
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_every_module_imports_without_a_warning_or_a_word() -> None:
    run("import matplotlib.font_manager")  # says so when it builds its cache, which it does once on a new machine
    for code in ("import instar", IMPORT_EVERYTHING):
        done = run(code)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_changes_no_seed_thread_count_or_switch_of_torch() -> None:
    done = run(KEEP_WHAT_IS_GLOBAL)
    assert (done.returncode, done.stderr) == (0, "")
