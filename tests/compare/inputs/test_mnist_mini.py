"""The packaged part of MNIST is what the script draws from the official files."""

from __future__ import annotations

import gzip
import importlib.util
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs import idx

ROOT = Path(__file__).parents[3]
OFFICIAL = ROOT.parent / "shared" / "data" / "mnist"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_mnist_mini", ROOT / "scripts" / "make_mnist_mini.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_small_and_its_licence_is_next_to_it():
    folder = resources.files("batchnorm.compare.inputs") / "datasets"
    assert len((folder / "mnist-mini.npz").read_bytes()) <= 3_000_000
    notice = (folder / "mnist-mini.LICENSE.md").read_text(encoding="utf-8")
    for word in ("Yann LeCun", "Corinna Cortes", "Burges", "CC BY-SA 3.0"):
        assert word in notice


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official MNIST files are not here")
def test_the_script_draws_what_the_package_ships(script):
    drawn = script.draw_all(OFFICIAL)
    with np.load(script.SHIPPED) as shipped:
        assert set(shipped.files) == set(drawn)
        for name, array in drawn.items():
            np.testing.assert_array_equal(shipped[name], array)


def test_draw_takes_each_class_at_even_distances(script):
    labels = (np.arange(400) % 10).astype(np.uint8)
    index = script.draw(labels, 4)
    assert np.bincount(labels[index]).tolist() == [4] * 10
    assert index[labels[index] == 3].tolist() == [3, 103, 203, 303]
    with pytest.raises(ValueError, match="class 0 must have at least 41 samples, got 40"):
        script.draw(labels, 41)


def test_the_script_refuses_other_content(script, tmp_path: Path):
    for name in idx.FILES.values():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ComparisonError, match="must be MNIST's official file"):
        script.draw_all(tmp_path)
