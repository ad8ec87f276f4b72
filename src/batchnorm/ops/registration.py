"""Register the operators with torch: schemas, eager and Triton implementations, and shapes for compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import _checks
from batchnorm.ops import eager, triton
from batchnorm.ops.schemas import SCHEMAS, SIGNATURES

_LIBRARY = torch.library.Library("batchnorm", "DEF")

# The results with x's shape and strides. The others are vectors and counts.
_LIKE_X = ("y", "dx", "dz")


def _with_strides_of(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`, or a copy, with the strides of `torch.empty_like(x)`."""
    if value.shape != x.shape:  # an empty dz without `need_dz`
        return value
    out = torch.empty_like(x)
    return value if value.stride() == out.stride() else out.copy_(value)


def eager_implementation(name: str) -> Callable[..., Any]:
    """Return the eager operator, whose results have the strides that the contract requires."""
    function = getattr(eager, name)
    arguments, results = SIGNATURES[name]

    def implementation(*args: Any) -> Any:
        given = dict(zip(arguments, args, strict=True))
        _checks.check_allocated(f"batchnorm::{name}", **given)
        found = function(*args)
        if not set(results) & set(_LIKE_X):
            return found
        x = given["x"]
        if isinstance(found, Tensor):
            return _with_strides_of(x, found)
        named = zip(results, found, strict=True)
        return tuple(_with_strides_of(x, value) if result in _LIKE_X else value for result, value in named)

    return implementation


def _fake(name: str) -> Callable[..., Any]:
    """Return a function that creates the operator's results without computing values."""
    arguments, results = SIGNATURES[name]

    def empty(result: str, given: dict[str, Any]) -> Tensor:
        x: Tensor = given["x"]
        if result in _LIKE_X:
            return torch.empty_like(x) if result != "dz" or given["need_dz"] else x.new_empty(0)
        rows = () if given.get("index") is None else (given["groups"],)
        if result == "count":
            return x.new_empty(rows, dtype=eager.wide_dtype(x))
        return x.new_empty((*rows, x.shape[1]), dtype=eager.statistics_dtype(x))

    def fake(*args: Any) -> Any:
        given = dict(zip(arguments, args, strict=True))
        found = tuple(empty(result, given) for result in results)
        return found[0] if len(found) == 1 else found or None

    return fake


def _fake_copy_running(*running: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape, dtype=eager.statistics_dtype(t)) for t in running)


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, eager_implementation(_name), "CompositeExplicitAutograd")
    _shapes = _fake_copy_running if _name == "copy_running" else _fake(_name)
    torch.library.register_fake(f"batchnorm::{_name}", _shapes, lib=_LIBRARY)
# The implementations for CUDA, by operator. One of them is no operator: two at once, with fewer launches.
ON_CUDA = {name: triton.implementation(name, eager_implementation(name)) for name in triton.OPERATORS}
for _name, _on_cuda in ON_CUDA.items():
    _LIBRARY.impl(_name, _on_cuda, "CUDA")
ON_CUDA["train_forward_and_update_"] = triton.fused(ON_CUDA["train_forward"], ON_CUDA["update_running_"])
