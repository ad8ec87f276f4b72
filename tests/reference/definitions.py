"""Common to the tests of the reference: indexes, and the error of a result."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

INDEX = [1, 0, 1, 0, 1]


def error(found: Array, true: Array) -> float:
    """Largest difference, relative to the largest true value."""
    return float(np.abs(found - true).max() / np.abs(true).max())
