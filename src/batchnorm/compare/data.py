"""The images and labels that a comparison trains and tests on."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.compare.errors import ComparisonError

PACKAGED = ("mnist-mini",)
KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Data:
    """Inputs and labels, checked and ready for training.

    Attributes:
        name: What it is called in reports.
        x_train: float32 `[N, *in_shape]`; images without a channel axis have been given one.
        y_train: int64 `[N]`, values in `0 .. num_classes - 1`.
        x_test: float32 `[N_test, *in_shape]`.
        y_test: int64 `[N_test]`.
        num_classes: Number of classes.
        scaling: How the stored values became these, in words.
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


def load(source: str | Path | Data) -> Data:
    """Returns the data that a name or a file stands for.

    Args:
        source: `mnist-mini`, or the path of an `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`.
            Inputs are `[N, D]`, `[N, H, W]` (one channel), or `[N, C, *S]`. Bytes (uint8) are standardized: the
            mean of all training values is taken away, and they are divided by their standard deviation.
            Floating-point values are used as they are. Labels are integers from 0, each class occurring in
            `y_train`; where some do not, `num_classes` in the file says how many there are.

    Raises:
        ComparisonError: If there is no such file, or it does not hold what is described above.
    """
    if isinstance(source, Data):
        return source
    if str(source) in PACKAGED:
        packaged = resources.files("batchnorm.compare") / "datasets" / f"{source}.npz"
        with resources.as_file(packaged) as path:
            return from_arrays(_read(path), str(source))
    path = Path(source)
    if path.suffix != ".npz":
        raise ComparisonError(
            f"data must be {', '.join(PACKAGED)} or the path of an .npz file, got {str(source)!r}. Write your "
            "arrays with numpy.savez_compressed."
        )
    return from_arrays(_read(path), path.name)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise ComparisonError(f"data must be a file that exists, got {str(path)!r}. Check the path.") from error
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise ComparisonError(
            f"{path.name} must be a readable .npz file without Python objects, but reading it said: {error}. "
            "Write it with numpy.savez_compressed."
        ) from error


def from_arrays(arrays: dict[str, NDArray[Any]], name: str) -> Data:
    """Returns the data that NumPy arrays hold, checked as `load` describes.

    Args:
        arrays: `x_train`, `y_train`, `x_test`, `y_test`, and perhaps `num_classes`.
        name: What it is called in reports and errors.

    Raises:
        ComparisonError: If the arrays are not as `load` describes.
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
            f"{test.dtype} and {list(train.shape[1:])} {train.dtype}. Make them alike."
        )
    num_classes = _num_classes(arrays, name)
    scaling = "used as they are"
    if train.dtype == np.uint8:
        mean, deviation = float(train.mean()), float(train.std()) or 1.0
        scaling = f"bytes, less the training mean {mean:.1f}, over the training deviation {deviation:.1f}"
        train, test = ((part.astype(np.float32) - mean) / deviation for part in (train, test))
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
                f"at index {bad[0]}. Leave these out or mend them."
            )


def _check_labels(y: NDArray[Any], what: str, samples: int, inputs: str) -> None:
    if not np.issubdtype(y.dtype, np.integer):
        raise ComparisonError(f"{what} must be integers, got {y.dtype}. Number the classes from 0.")
    if y.shape != (samples,):
        raise ComparisonError(
            f"{what} must have one label for each of the {samples} samples in {inputs}, got shape {list(y.shape)}. "
            "Check that both are cut alike."
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
                f"{name}: y_train must be below num_classes = {num_classes}, got {train.max()}. Mend one of them."
            )
    else:
        present = np.unique(train)
        num_classes = len(present)
        if present[-1] != num_classes - 1:
            raise ComparisonError(
                f"{name}: y_train must have every class from 0 to its largest label, got {num_classes} different "
                f"labels from {present[0]} to {present[-1]}. Number the classes from 0, or store num_classes beside."
            )
    if test.max() >= num_classes:
        raise ComparisonError(
            f"{name}: y_test must be among the {num_classes} classes 0 to {num_classes - 1}, got {test.max()}. Leave "
            "such samples out, or store num_classes in the file."
        )
    if num_classes < 2:
        raise ComparisonError(f"{name} must have at least two classes, got {num_classes}. Check y_train.")
    return num_classes
