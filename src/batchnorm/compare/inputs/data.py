"""The images and labels that a comparison trains and tests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm._options import as_clause
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs import idx
from batchnorm.compare.inputs.importing import import_named, user_code
from batchnorm.importing import is_named

PACKAGED = "mnist-mini"
DIGITS = "digits"
NAMES = (PACKAGED, *idx.SOURCES, DIGITS)
KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Data:
    """Inputs and labels, checked and ready for training.

    Attributes:
        name: Its name in reports.
        x_train: float32 `[N, *in_shape]`; images always have a channel axis.
        y_train: int64 `[N]`, values in `0 .. num_classes - 1`.
        x_test: float32 `[N_test, *in_shape]`.
        y_test: int64 `[N_test]`.
        num_classes: Number of classes.
        scaling: Description of how the stored values were scaled.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    scaling: str

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(self.x_train.shape[1:])

    @cached_property
    def train_part(self) -> tuple[Tensor, Tensor]:
        """A fixed subset of the training samples, at most as large as the test set: inputs and labels."""
        order = torch.randperm(len(self.y_train), generator=torch.Generator().manual_seed(0), device="cpu")
        index = order[: len(self.y_test)].to(self.y_train.device)
        return self.x_train[index], self.y_train[index]

    def to(self, device: torch.device | str) -> Data:
        """Return the same data on a device, such as `cuda`."""
        moved = {name: getattr(self, name).to(device) for name in KEYS}
        return replace(self, **moved)


def load(source: str | Path | Data, *, data_dir: str | Path | None = None, standardize: bool = True) -> Data:
    """Return the data that a name, a file or a callable specifies.

    Args:
        source: One of these:

            - `mnist-mini`: 10,000 training and 2,000 test images of MNIST, included in this package.
            - `mnist`, `fashion-mnist`: 60,000 training and 10,000 test images of 28×28, read from `data_dir` or
              downloaded once to the user's cache (the environment variable `BATCHNORM_CACHE` names another folder).
            - `digits`: scikit-learn's 1,797 digits of 8×8; the last 360, mostly by other writers, are the test set.
            - The path of an `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`.
            - `module.path:callable`, which takes no arguments and returns a dict of such arrays, or a `Data`.
            - A `Data`, which is returned unchanged.

            Inputs are `[N, D]`, `[N, H, W]` (one channel), or `[N, C, *S]`. Bytes (uint8) are standardized with the
            mean and the standard deviation of all training values. Floating-point values are used as they are. Labels
            are integers from 0. Every class must occur in `y_train`, unless `num_classes` is stored with the arrays.
        data_dir: Folder with the four official files of `mnist` or `fashion-mnist`, gzipped or not.
        standardize: Whether to standardize bytes. Otherwise they are divided by 255, which uses no statistics of the
            data.

    Raises:
        ComparisonError: If the data do not exist, or differ from the description above.
    """
    name = source.name if isinstance(source, Data) else str(source)
    if data_dir is not None and name not in idx.SOURCES:
        raise ComparisonError(
            f"data_dir (--data-dir) requires data {' or '.join(idx.SOURCES)}, got data {name!r}. Leave out data_dir, "
            "or choose one of these."
        )
    if isinstance(source, Data):
        return source
    if name == PACKAGED:
        packaged = resources.files("batchnorm.compare.inputs") / "datasets" / f"{name}.npz"
        with resources.as_file(packaged) as path:
            return from_arrays(_read(path), name, standardize=standardize)
    if name in idx.SOURCES:
        return from_arrays(idx.read(name, data_dir), name, standardize=standardize)
    if name == DIGITS:
        return from_arrays(_digits(), name, standardize=standardize)
    if Path(name).suffix == ".npz":
        return from_arrays(_read(Path(name)), Path(name).name, standardize=standardize)
    if is_named(name):
        return _from_callable(name, standardize)
    raise ComparisonError(
        f"data must be {', '.join(NAMES)}, the path of an .npz file, or module.path:callable, got {name!r}. Write your "
        "arrays with numpy.savez_compressed."
    )


def _digits() -> dict[str, NDArray[Any]]:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ComparisonError(
            "data digits needs scikit-learn, which cannot be imported. Install with: pip install 'batchnorm[sklearn]'."
        ) from error
    held = load_digits()
    images = (held.images * 15).astype(np.uint8)  # from 0..16 to bytes
    labels, train = held.target, len(held.target) - 360
    return dict(zip(KEYS, (images[:train], labels[:train], images[train:], labels[train:]), strict=True))


def _from_callable(name: str, standardize: bool) -> Data:
    target = import_named(name, "data")
    if not callable(target):
        raise ComparisonError(
            f"data {name!r} must name a callable, got {type(target).__name__}. Name a function without arguments that "
            "returns the arrays."
        )
    with user_code(name, "was called", of="the data callable"):
        made = target()
        if isinstance(made, Mapping):
            made = {key: np.asarray(value) for key, value in made.items()}
    if isinstance(made, Data):
        return made
    if not isinstance(made, dict):
        raise ComparisonError(
            f"the data callable {name} must return a dict of arrays {', '.join(KEYS)}, or a batchnorm.compare.Data, "
            f"got {type(made).__name__}. See batchnorm.compare.from_arrays."
        )
    return from_arrays(made, name, standardize=standardize)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise ComparisonError(f"data must be a file that exists, got {str(path)!r}. Check the path.") from error
    except Exception as error:  # damage shows as EOFError, zlib.error and many others
        raise ComparisonError(
            f"{path.name} must be a readable .npz file without Python objects, but reading it failed: "
            f"{as_clause(error)}. Write it with numpy.savez_compressed."
        ) from error


def from_arrays(arrays: dict[str, NDArray[Any]], name: str, *, standardize: bool = True) -> Data:
    """Return the data in NumPy arrays, checked.

    Args:
        arrays: `x_train`, `y_train`, `x_test`, `y_test`, and optionally `num_classes`; `load` describes them.
        name: Their name in reports and errors.
        standardize: Whether to standardize bytes.

    Raises:
        ComparisonError: If the arrays differ from the description in `load`.
    """
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ComparisonError(
            f"{name} must hold {', '.join(KEYS)}, got {', '.join(arrays) or 'nothing'}. Add {', '.join(missing)}."
        )
    for split in ("train", "test"):
        _check_inputs(arrays[f"x_{split}"], f"{name}: x_{split}")
        _check_labels(arrays[f"y_{split}"], f"{name}: y_{split}", len(arrays[f"x_{split}"]), f"x_{split}")
    train, test = arrays["x_train"], arrays["x_test"]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise ComparisonError(
            f"{name}: x_test must have the sample shape and dtype of x_train, got {list(test.shape[1:])} "
            f"{test.dtype} and {list(train.shape[1:])} {train.dtype}. Make them equal."
        )
    num_classes = _num_classes(arrays, name)
    scaling = "used as they are"
    if train.dtype == np.uint8:
        mean, deviation = _mean_and_deviation(train) if standardize else (0.0, 255.0)
        scaling = f"bytes, standardized with the training mean {mean:.1f} and deviation {deviation:.1f}"
        if not standardize:
            scaling = "bytes, divided by 255"
        train, test = train.astype(np.float32), test.astype(np.float32)
        for part in (train, test):
            part -= mean
            part /= deviation
    if train.ndim == 3:
        train, test = train[:, None], test[:, None]
    return Data(
        name=name,
        x_train=torch.from_numpy(np.ascontiguousarray(train, np.float32)),
        y_train=torch.from_numpy(arrays["y_train"].astype(np.int64)),
        x_test=torch.from_numpy(np.ascontiguousarray(test, np.float32)),
        y_test=torch.from_numpy(arrays["y_test"].astype(np.int64)),
        num_classes=num_classes,
        scaling=scaling,
    )


def _mean_and_deviation(values: NDArray[np.uint8]) -> tuple[float, float]:
    """Return both from the counts of the byte values, because NumPy's functions need eight times the data's memory."""
    counts = np.zeros(256)
    for part in np.array_split(values, math.ceil(values.size / 2**22)):
        counts += np.bincount(part.ravel(), minlength=256)
    mean = float(np.average(np.arange(256), weights=counts))
    variance = float(np.average((np.arange(256) - mean) ** 2, weights=counts))
    return mean, math.sqrt(variance) or 1.0


def _check_inputs(x: NDArray[Any], what: str) -> None:
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ComparisonError(f"{what} must be uint8 or floating point, got {x.dtype}. Convert it with astype.")
    if x.ndim < 2 or x.size == 0:
        raise ComparisonError(
            f"{what} must be [N, D], [N, H, W] or [N, C, *S] with at least one sample, got shape {list(x.shape)}. "
            "Put one sample in each row."
        )
    if x.dtype != np.uint8:
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1).astype(np.float32)).all(axis=1))
        if len(bad):
            raise ComparisonError(
                f"{what} must be finite in float32, got NaN or infinity in {len(bad)} of {len(x)} samples, the first "
                f"at index {bad[0]}. Remove or fix these samples."
            )


def _check_labels(y: NDArray[Any], what: str, samples: int, inputs: str) -> None:
    if not np.issubdtype(y.dtype, np.integer):
        raise ComparisonError(f"{what} must be integers, got {y.dtype}. Number the classes from 0.")
    if y.shape != (samples,):
        raise ComparisonError(
            f"{what} must have one label for each of the {samples} samples in {inputs}, got shape {list(y.shape)}. "
            "Check that both have the same samples."
        )
    if y.min() < 0:
        raise ComparisonError(f"{what} must not be negative, got {y.min()}. Number the classes from 0.")


def _num_classes(arrays: dict[str, NDArray[Any]], name: str) -> int:
    train, test = arrays["y_train"], arrays["y_test"]
    if "num_classes" in arrays:
        given = arrays["num_classes"]
        if given.size != 1 or not np.issubdtype(given.dtype, np.integer):
            raise ComparisonError(f"{name}: num_classes must be one integer, got {given!r}. Store numpy.int64(10).")
        num_classes = int(given.reshape(()))
        if train.max() >= num_classes:
            raise ComparisonError(
                f"{name}: y_train must be below num_classes = {num_classes}, got {train.max()}. Fix one of them."
            )
    else:
        present = np.unique(train)
        num_classes = len(present)
        if present[-1] != num_classes - 1:
            raise ComparisonError(
                f"{name}: y_train must have every class from 0 to its largest label, got {num_classes} different "
                f"labels from {present[0]} to {present[-1]}. Number the classes from 0, or store num_classes, too."
            )
    if test.max() >= num_classes:
        raise ComparisonError(
            f"{name}: y_test must be among the {num_classes} classes 0 to {num_classes - 1}, got {test.max()}. Leave "
            "out such samples, or store num_classes in the file."
        )
    if num_classes < 2:
        raise ComparisonError(f"{name} must have at least two classes, got {num_classes}. Check y_train.")
    return num_classes
