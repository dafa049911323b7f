"""What must not be committed is refused, and is not there."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 4 * 2**20


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: an unpacked source archive has nothing tracked")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def refused(path: str) -> bool:
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (guard,) = (hook for hook in configuration["repos"][0]["hooks"] if hook["id"] == "data-sets")
    return re.search(guard["files"], path) is not None and re.search(configuration["exclude"], path) is None


@pytest.mark.parametrize(
    "path",
    [
        "cifar-10-python.tar.gz",
        "data/cifar-10-batches-py/data_batch_1",
        "cifar-10-batches-bin/test_batch.bin",
        "data_batch_3",
        "train-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte.gz",
        "svhn/train_32x32.mat",
        "tiny-imagenet-200/val/images/val_0.JPEG",
        "imagenette2-160/train/n01440764/ILSVRC2012_val_00000293.JPEG",
        "weights/model.pth",
    ],
)
def test_the_files_that_data_sets_come_in_are_refused(path: str) -> None:
    assert refused(path)


@pytest.mark.parametrize(
    "path",
    [
        "src/instar/data/cifar.py",
        "tests/oracles/golden/gairat.npz",
        "docs/results/checkpoints/gairat.safetensors",
        "docs/results/curves.png",
        "tests/data/test_idx_files.py",
    ],
)
def test_source_golden_values_and_results_are_accepted(path: str) -> None:
    assert not refused(path)


def test_nothing_refused_and_nothing_large_is_tracked() -> None:
    names = {path: path.relative_to(ROOT).as_posix() for path in tracked()}
    assert [name for name in names.values() if refused(name)] == []
    assert [name for path, name in names.items() if path.stat().st_size > LARGEST] == []
