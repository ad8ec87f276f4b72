"""Draw `mnist-mini` (10,000 training and 2,000 test images, class-balanced) from the four official MNIST files.

    python scripts/make_mnist_mini.py DIR            write the file that the package ships
    python scripts/make_mnist_mini.py DIR --check    only compare the shipped file with what would be written

DIR holds the four official files, gzipped or not; their content is checked.

The script takes the images of each class at even distances through the official order. This needs no random generator,
represents many writers, and draws from both halves of the test set (its first 5,000 images are known to be easier).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm.compare.inputs import idx

Bytes = NDArray[np.uint8]

PER_CLASS, CLASSES = {"train": 1000, "test": 200}, 10
SHIPPED = Path(__file__).parent.parent / "src/batchnorm/compare/inputs/datasets/mnist-mini.npz"


def draw(labels: Bytes, per_class: int) -> NDArray[np.intp]:
    """Return the sorted indices of `per_class` samples of each class, at even distances."""
    chosen = []
    for label in range(CLASSES):
        where = np.flatnonzero(labels == label)
        if len(where) < per_class:
            raise ValueError(f"class {label} must have at least {per_class} samples, got {len(where)}")
        chosen.append(where[np.arange(per_class) * len(where) // per_class])
    return np.sort(np.concatenate(chosen))


def draw_all(directory: Path) -> dict[str, Bytes]:
    """Return the four arrays of `mnist-mini`."""
    official, arrays = idx.read("mnist", directory), {}
    for split, per_class in PER_CLASS.items():
        index = draw(official[f"y_{split}"], per_class)
        arrays |= {key: official[key][index] for key in (f"x_{split}", f"y_{split}")}
    return arrays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder with the four official files")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the shipped file")
    arguments = parser.parse_args()
    arrays = draw_all(arguments.directory)
    if arguments.check:
        with np.load(SHIPPED) as shipped:
            same = set(shipped.files) == set(arrays) and all(np.array_equal(shipped[k], arrays[k]) for k in arrays)
        print(f"{SHIPPED.name} {'is' if same else 'IS NOT'} what this script draws")
        return 0 if same else 1
    with tempfile.NamedTemporaryFile(dir=SHIPPED.parent, suffix=".npz", delete=False) as file:
        np.savez_compressed(file, **arrays)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(SHIPPED)
    print(f"{SHIPPED.name}: {SHIPPED.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
