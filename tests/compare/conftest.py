"""Small data that networks learn within a few steps, and one comparison on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batchnorm import compare
from batchnorm.compare.report import figures


def small_arrays(samples: int = 96, features: int = 8, classes: int = 3) -> dict[str, np.ndarray]:
    """Return clusters, one for each class."""
    generator = np.random.default_rng(0)
    centres = 3 * generator.standard_normal((classes, features))
    arrays = {}
    for split in ("train", "test"):
        labels = np.arange(samples) % classes
        arrays[f"x_{split}"] = (centres[labels] + generator.standard_normal((samples, features))).astype(np.float32)
        arrays[f"y_{split}"] = labels
    return arrays


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures, which take longer than the training of small networks."""
    monkeypatch.setattr(figures, "draw", lambda *_: {})


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return small_arrays()


@pytest.fixture(scope="session")
def data() -> compare.Data:
    return compare.from_arrays(small_arrays(), "clusters")


@pytest.fixture(scope="session")
def result(data: compare.Data, tmp_path_factory: pytest.TempPathFactory) -> compare.Result:
    """A comparison of two norms over two seeds."""
    out: Path = tmp_path_factory.mktemp("comparison")
    return compare.run(
        ["none", "batch"],
        data=data,
        batch_size=16,
        steps=12,
        seeds=2,
        evaluate_every=5,
        threads=1,
        out=out,
        progress=False,
    )
