"""The packaged part of MNIST is what the script draws from the official files."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

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


def test_the_file_is_small_and_its_licence_lies_beside():
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


def test_parse_idx_reads_shape_and_values(script):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 4) + values.tobytes()
    np.testing.assert_array_equal(script.parse_idx(content), values)
    with pytest.raises(ValueError, match="an IDX file of bytes starts with"):
        script.parse_idx(b"\x00\x00\x0d\x01")


def test_read_official_refuses_other_content(script, tmp_path: Path):
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / name).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="must hold MNIST's official content"):
        script.read_official(tmp_path, name)
