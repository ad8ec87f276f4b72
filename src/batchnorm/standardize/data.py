"""The kinds of data that `Standardizer` accepts: one array, or batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from batchnorm.standardize import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "Tensor | NDArray[Any]"

# Number of values that are converted to float64 at a time. On the CPU, torch processes so few in the calling thread.
# More threads would not speed up these memory-bound operations, but would wait for one another on a busy machine.
_PART = 2**15
# The same for data on other devices, and for data in which the values of a sample are far apart.
_LARGE_PART = 2**19
# Number of values whose sums are added before they are merged with the others.
_BLOCK = 2**23
# scikit-learn's checks require the last words of the second sentence.
_COMPLEX = (
    "Standardizer expects real numbers, got {}. Pass the real and the imaginary part as separate features: "
    "Complex data not supported."
)


def is_batches(x: object) -> bool:
    """Return whether x is an iterable of batches, not an array or an object that converts to one."""
    if isinstance(x, (Tensor, np.ndarray, str, bytes, Mapping)) or hasattr(x, "__array__") or sparse.is_sparse(x):
        return False
    if isinstance(x, (list, tuple)):
        return bool(x) and all(_ndim(part) >= 2 for part in x)
    return isinstance(x, Iterable)


def _ndim(part: object) -> int:
    return part.ndim if isinstance(part, (Tensor, np.ndarray)) else 0


def batch_of(batch: object) -> Any:
    """Return the data of a batch: the batch itself, or the first item of a tuple."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, np.ndarray)):
        batch = batch[0]
    if isinstance(batch, Mapping):
        raise TypeError(
            "Standardizer expects batches that are arrays, or tuples that begin with one, got "
            f"{type(batch).__name__}. Select one, for example (batch['x'] for batch in loader)."
        )
    return as_array(batch)


def as_array(x: Any) -> Any:
    """Convert x to a tensor, an array or a sparse matrix of real numbers, without a copy if it already is one."""
    if sparse.is_sparse(x):
        return sparse.canonical(x)
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(
            f"Standardizer expects a dense tensor or a sparse matrix of SciPy, got a tensor of layout {x.layout}. Use "
            "x.to_dense(), or build a scipy.sparse.csr_array."
        )
    if torch.masked.is_masked_tensor(x):
        raise TypeError(
            "Standardizer expects a plain tensor, got a MaskedTensor. Use x.to_tensor(float('nan')) with "
            "nan_policy='omit'."
        )
    if isinstance(x, Tensor):
        if x.is_complex():
            raise ValueError(_COMPLEX.format(x.dtype))
        return x
    array: NDArray[Any] = x if isinstance(x, np.ndarray) else np.asarray(x)
    if array.dtype.kind == "c":
        raise ValueError(_COMPLEX.format(array.dtype))
    if array.dtype.kind == "O":
        pandas = sys.modules.get("pandas")
        if pandas is not None:  # its missing values do not convert to float
            array = np.where(pandas.isna(array), np.nan, array)
        array = array.astype(np.float64)  # an error of NumPy names a value that is not a number
    if array.dtype.kind not in "buif":
        raise ValueError(f"Standardizer expects numbers, got an array of dtype {array.dtype}. Convert it first.")
    return array


def parts(x: Array) -> Iterator[slice]:
    """Yield slices of x's samples, each small enough to convert to float64."""
    small = x.device.type == "cpu" and x.is_contiguous() if isinstance(x, Tensor) else x.flags.c_contiguous
    return _slices(x, _PART if small else _LARGE_PART)


def blocks(x: Array) -> Iterator[slice]:
    """Yield slices of x's samples, each of many parts."""
    return _slices(x, _BLOCK)


def _slices(x: Array, values: int) -> Iterator[slice]:
    per_sample = max(1, int(np.prod(x.shape[1:])))
    step = max(1, values // per_sample)
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def float64(part: Array) -> Tensor:
    """Return a copy in float64, on the same device if that has float64, with NaN instead of masked values."""
    if isinstance(part, Tensor):
        device = "cpu" if part.device.type == "mps" else part.device
        return part.detach().to(device, torch.float64, copy=True)
    values = np.array(np.ma.getdata(part), dtype=np.float64)
    if isinstance(part, np.ma.MaskedArray):
        values[mask_of(part)] = np.nan
    return torch.from_numpy(values)


def weights(given: Any, samples: int) -> Tensor:
    """Return `sample_weight` as float64 `[N]`, checked."""
    weights = float64(as_array(given))
    if weights.shape != (samples,):
        raise ValueError(
            f"Standardizer expects sample_weight of shape [N] = [{samples}], got {list(weights.shape)}. "
            "Pass one number for each sample."
        )
    if not bool(((weights >= 0) & weights.isfinite()).all()) or not weights.any():
        raise ValueError(
            "Standardizer expects sample_weight >= 0, finite and not all zero, got other values. Use a weight of 0 for "
            "samples that do not count."
        )
    return weights


def mask_of(x: Array) -> NDArray[Any]:
    """Return the mask of a masked array, in x's shape; for other data, a single False."""
    return np.ma.getmaskarray(x) if isinstance(x, np.ma.MaskedArray) else np.zeros((), bool)


def result_dtype(x: Array) -> Any:
    """Return the dtype of standardized x: its own, or for integers torch's default dtype or NumPy's float64."""
    if isinstance(x, Tensor):
        return x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)


def new_like(x: Array) -> Array:
    """Return an uninitialized array or tensor for x's standardized values."""
    if isinstance(x, Tensor):
        return torch.empty_like(x, dtype=result_dtype(x), requires_grad=False)
    empty = np.empty_like(np.ma.getdata(x), result_dtype(x), subok=False)
    return np.ma.MaskedArray(empty) if isinstance(x, np.ma.MaskedArray) else empty


def check_out(out: Array, x: Array) -> None:
    """Check that standardized values can be written into `out`."""
    floating = out.is_floating_point() if isinstance(out, Tensor) else getattr(out, "dtype", np.dtype("O")).kind == "f"
    if not isinstance(out, (Tensor, np.ndarray)) or not floating:
        raise TypeError(
            "Standardizer expects out to be an array or tensor of a floating-point dtype, got "
            f"{getattr(out, 'dtype', type(out).__name__)}. Standardized values are fractions: use float32 or float64."
        )
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"Standardizer expects out of x's shape {list(x.shape)}, got {list(out.shape)}. Reshape it.")


def write(out: Array, part: slice, values: Tensor) -> None:
    """Write values into a part of `out`, rounded to its dtype."""
    if isinstance(out, Tensor):
        out[part] = values.to(out.device, out.dtype)
    else:
        np.ma.getdata(out)[part] = values.cpu().numpy()
