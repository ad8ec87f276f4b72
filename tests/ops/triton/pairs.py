"""Pairs of what the code of a launch's kernel depends on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch


def pairs_of(function: Any, arguments: Mapping[str, Any]) -> set[Any]:
    """Return all pairs of a launch's dtypes, absent tensors, flags, width of accesses, and shared lines.

    Activations differ in one function of a value, so they are in no pair.

    Args:
        function: The kernel's function.
        arguments: The values of its parameters.
    """
    kinds: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            kinds[name] = value.dtype
        elif value is None or isinstance(value, bool) or name == "VEC":
            kinds[name] = value
        elif name == "GROUP":
            kinds[name] = value > 0
    return {(function, *pair) for pair in itertools.combinations(kinds.items(), 2)} | {
        (function, arguments.get("ACTIVATION"))
    }
