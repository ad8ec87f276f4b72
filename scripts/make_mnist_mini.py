"""Draw `mnist-mini` (10,000 training and 2,000 test images, class-balanced) from the four official MNIST files.

    python scripts/make_mnist_mini.py DIR            writes the file that the package ships
    python scripts/make_mnist_mini.py DIR --check    only says whether the shipped file is what would be written

DIR holds train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and
t10k-labels-idx1-ubyte.gz. Their contents are checked against MNIST's published MD5 sums first.

Of each class the images are taken at even distances through the official order, so that no random
generator is needed, many writers are represented, and the test set has both of its halves (its first
5,000 images are known to be the easier ones).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

TRAIN_PER_CLASS, TEST_PER_CLASS, CLASSES = 1000, 200, 10
SHIPPED = Path(__file__).parent.parent / "src/batchnorm/compare/inputs/datasets/mnist-mini.npz"
MD5 = {  # of the uncompressed files
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}


def parse_idx(content: bytes) -> Bytes:
    """Return the array of an uncompressed IDX file of unsigned bytes."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"an IDX file of bytes starts with 00 00 08, got {content[:3].hex(' ')}")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_official(directory: Path, name: str) -> Bytes:
    """Return the array in one of the four official files, once its checksum is found right."""
    content = gzip.decompress((directory / name).read_bytes())
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != MD5[name]:
        raise ValueError(f"{name} must hold MNIST's official content (MD5 {MD5[name]}), got MD5 {digest}")
    return parse_idx(content)


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
    arrays = {}
    for split, prefix, per_class in (("train", "train", TRAIN_PER_CLASS), ("test", "t10k", TEST_PER_CLASS)):
        labels = read_official(directory, f"{prefix}-labels-idx1-ubyte.gz")
        images = read_official(directory, f"{prefix}-images-idx3-ubyte.gz")
        index = draw(labels, per_class)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images[index], labels[index]
    return arrays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder with the four official .gz files")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the shipped file")
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
