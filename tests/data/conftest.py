"""Data sets of the catalogue, made small, so that whole official layouts can be written in a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from instar.data import get as get_module
from instar.data import sources
from instar.data.catalogue import CATALOGUE, DatasetInfo


@pytest.fixture
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, DatasetInfo]:
    """Every registered data set with 50 training and 10 test images, Tiny-ImageNet with 3 classes."""
    small = {name: replace(info, train_size=50, test_size=10) for name, info in CATALOGUE.items()}
    small["tiny_imagenet"] = replace(small["tiny_imagenet"], classes=("a", "b", "c"), train_size=6, test_size=3)
    small["digits"] = CATALOGUE["digits"]
    monkeypatch.setattr(sources, "CATALOGUE", small)
    monkeypatch.setattr(get_module, "CATALOGUE", small)
    return small
