"""The same surroundings for every test and doctest: one thread, no screen, no network, nobody's files, fixed seeds."""

import os
import random
import tempfile
from collections.abc import Iterator

# Before torch is imported, and in the environment, so that commands started by tests inherit it. `make test` runs two
# workers; more threads than cores cost more than they give, and the order of a sum depends on their number.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["MPLBACKEND"] = "Agg"
# A model or data set that a test forgot to make itself fails at once instead of being downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
# Colours and widths of the terminal that happens to run the tests must not decide what they see.
os.environ["COLUMNS"] = "120"
os.environ["NO_COLOR"] = "1"
for variable in ("FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(variable, None)

_root = tempfile.TemporaryDirectory(prefix="instar-tests-")
# Tests never see the data sets of whoever runs them; those that want real ones read INSTAR_TEST_DATA.
os.environ["INSTAR_DATA"] = os.path.join(_root.name, "data")

import hypothesis  # noqa: E402  the environment comes first
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# No deadline: the first example of a property may compile or load. CI draws the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed the global generators, so that a test draws the same numbers alone and among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unchanged_globals() -> Iterator[None]:
    """Fail the test that leaves torch's global switches changed, instead of the one that runs after it."""

    def globals_now() -> dict[str, object]:
        return {
            "default dtype": torch.get_default_dtype(),
            "gradients enabled": torch.is_grad_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
            "working directory": os.getcwd(),
        }

    before = globals_now()
    yield
    after = globals_now()
    assert after == before, f"this test left global state changed: {before} became {after}"
