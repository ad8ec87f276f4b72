"""The tensors that a model returns, and the difference of two results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def outputs(result: Any) -> list[Tensor]:
    """Return every tensor in the result of a model, also in attributes of objects."""
    return [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]


def same_containers(result: Any, other: Any) -> bool:
    """Return whether two results hold tensors at the same places, in containers and objects of the same classes."""
    places: list[Any] = []
    other_places: list[Any] = []
    ones, others = _leaves(result, places), _leaves(other, other_places)
    kinds = zip(ones, others, strict=False)
    return places == other_places and all(isinstance(a, Tensor) == isinstance(b, Tensor) for a, b in kinds)


def _leaves(value: Any, places: list[Any] | None = None, inside: tuple[int, ...] = ()) -> list[Any]:
    """Return the values in containers and objects, and append the classes and keys on the way to `places`."""
    children = None if id(value) in inside else _children(value)  # an object may hold itself
    if children is None:
        return [value]
    if places is not None:
        # By name, because a function may create its class again in each call.
        places.append((type(value).__module__, type(value).__qualname__, list(children)))
    return [leaf for child in children.values() for leaf in _leaves(child, places, (*inside, id(value)))]


def _children(value: Any) -> dict[Any, Any] | None:
    """Return the values that a container or object holds, by key or name; None for a leaf."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return None
    if (kind := pytree.SUPPORTED_NODES.get(type(value))) is not None:
        return dict(enumerate(kind.flatten_fn(value)[0]))
    return vars(value) if hasattr(value, "__dict__") else None


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
    if not same_containers(expected, found):
        return _DIFFERENT
    worst, rounding = 0.0, 0.0
    for one, other in zip(outputs(expected), outputs(found), strict=True):
        if not one.is_floating_point():
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
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
