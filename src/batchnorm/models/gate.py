"""How much error folding may add: the bound for one fold and the bound for the whole network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from batchnorm.models.data.arrays import as_array
from batchnorm.models.report import FLOAT64, FoldError

# The relative error that one fold may make, whatever the original's own error, by the name of the dtype.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
# A network may amplify the error of a fold. If the whole network's error exceeds this multiple of the bound of one
# fold, there is another cause.
AMPLIFICATION = 10.0


class Results(NamedTuple):
    """Corresponding tensors, computed in three ways.

    Attributes:
        own: By the original.
        folded: By the folded network.
        exact: By the reference: the original in float64, if it can run there.
    """

    own: Sequence[Any]
    folded: Sequence[Any]
    exact: Sequence[Any]


class Error(NamedTuple):
    """Largest errors against the reference, relative to the largest value.

    Attributes:
        before: The original's error.
        after: The folded network's error.
    """

    before: float
    after: float

    @classmethod
    def of(cls, results: Results) -> Error:
        """Return the largest errors of any tensor.

        An element that overflows in the original does not count for the original's error. It counts for the folded
        network's error only if it is finite there. Otherwise, one overflow would be an infinite error of the original,
        which allows any error of the folded network.
        """
        before, after = 0.0, 0.0
        for arrays in zip(results.own, results.folded, results.exact, strict=True):
            own, folded, exact = (as_array(value) for value in arrays)
            before = max(before, relative(own, _without_overflow(exact, own, own)))
            after = max(after, relative(folded, _without_overflow(exact, own, folded)))
        return cls(before, after)

    @staticmethod
    def worst(errors: Iterable[Error]) -> Error:
        """Return the error that folding increases most."""
        return max(errors, key=lambda error: error.after - 2.0 * error.before)

    def allowed(self, tolerance: float, amplification: float = 1.0) -> bool:
        """Return whether the error is at most the tolerance or twice the original's error, times the amplification.

        The original and the folded network round differently, so either may happen to be closer to float64. Twice the
        original's error is therefore no evidence of a mistake. The whole network has the bound of one fold, multiplied:
        a lower multiple of the original's error would reject networks in which every single fold was accepted.
        """
        return self.after <= amplification * max(tolerance, 2.0 * self.before)


def tolerance_for(given: float | None, dtypes: Iterable[Any]) -> float:
    """Return the given tolerance, or by default the largest tolerance of these dtypes."""
    names = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return given if given is not None else max((TOLERANCE.get(name, 1e-5) for name in names), default=1e-5)


def relative(found: Any, exact: Any) -> float:
    """Return `max|found - exact| / max|exact|`; infinite if shapes differ or only one of two values is finite."""
    found, exact = (as_array(value).astype(np.float64) for value in (found, exact))
    finite = np.isfinite(exact)
    if found.shape != exact.shape or not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(np.abs(exact[finite]).max())
    difference = float(np.abs(found[finite] - exact[finite]).max())
    return difference / largest if largest else difference


def _without_overflow(exact: Any, own: Any, found: Any) -> Any:
    """Return `exact`, but `found` where neither this nor the original's `own` value is finite."""
    if not own.shape == found.shape == exact.shape:
        return exact
    return np.where(np.isfinite(own) | np.isfinite(found), exact, found)


def check_whole(error: Error, tolerance: float, reference: str = FLOAT64) -> None:
    """Check the whole folded network, whose error was measured against `reference`.

    Raises:
        FoldError: Its results are not the original's.
    """
    if not error.allowed(tolerance, AMPLIFICATION):
        raise FoldError(
            f"the folded network must give the original's results, but its error against {reference} is "
            f"{error.after:.1e}, and the original's own error is {error.before:.1e}. Nothing was "
            "changed; please report the network."
        )
