"""The tensors that a model returns, and the difference of two results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def outputs(result: Any) -> list[Tensor]:
    """Return every tensor in the result of a model."""
    if not pytree.tree_leaves(result) and hasattr(result, "__dict__"):
        result = vars(result)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


class Difference(NamedTuple):
    """The difference of two results.

    Attributes:
        relative: The largest difference divided by the largest value, for the worst tensor. It is infinite if
            structures, shapes, dtypes or the positions of non-finite values differ.
        rounding: The largest relative difference that may be rounding: √ε of the dtype.
    """

    relative: float
    rounding: float

    @property
    def is_rounding(self) -> bool:
        """Whether the difference may be due to rounding alone."""
        return self.relative <= self.rounding


_DIFFERENT = Difference(float("inf"), 0.0)


def difference(expected: Any, found: Any) -> Difference:
    """Return the difference of the floating-point tensors in two results."""
    (ones, spec), (others, other_spec) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    if spec != other_spec:
        return _DIFFERENT
    worst, rounding = 0.0, 0.0
    for one, other in zip(ones, others, strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            continue
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return _DIFFERENT
        rounding = max(rounding, torch.finfo(one.dtype).eps ** 0.5)
        wide, wide_other = one.double(), other.double()
        finite = wide.isfinite()
        if not torch.equal(finite, wide_other.isfinite()):
            return _DIFFERENT
        if finite.any():
            scale = wide[finite].abs().max().clamp_min(torch.finfo(one.dtype).tiny)
            worst = max(worst, float((wide - wide_other)[finite].abs().max() / scale))
    return Difference(worst, rounding)


def check_unchanged(caller: str, before: Any, after: Any, cause: str) -> None:
    """Check that a changed model's result differs only by rounding.

    Raises:
        ValueError: it differs by more; the message states the likely cause.
    """
    change = difference(before, after)
    if not change.is_rounding:
        raise ValueError(
            f"{caller} expects a model whose output stays the same, got one whose output changed by "
            f"{change.relative:.1e} of its largest value. {cause}; the model is unchanged."
        )
