"""The calls of the operators that a user can make, as far as kernels differ in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batchnorm.ops.activations import ACTIVATIONS
from batchnorm.ops.schemas import SCHEMAS
from batchnorm.ops.triton import OPERATORS, launch
from benchmarks.gpu.layers import EPS
from benchmarks.gpu.static.compiling import meta
from benchmarks.gpu.static.covering import Choice, covering

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A program holds a channel; programs read tiles; the same with rows of odd sizes; without positions.
SHAPES = ((8, 16, 14, 14), (64, 64, 32, 32), (40, 24, 37, 41), (300, 1000))
_GROUPS = 3


def _schema(operator: str) -> list[Any]:
    return torch._C.parse_schema(f"{operator}{SCHEMAS[operator]}").arguments


def factors(operator: str) -> dict[str, Sequence[Any]]:
    """Return the factors of an operator's calls: what its tensors are like, and every argument that may be None."""
    arguments = _schema(operator)
    names = {a.name for a in arguments}
    found: dict[str, Sequence[Any]] = {"dtype": DTYPES}
    if "x" in names:
        found |= {"shape": SHAPES, "layout": ("contiguous", "channels-last")}
    if "activation" in names:
        found["activation"] = tuple(ACTIVATIONS)
    for a in arguments:
        if isinstance(a.type, torch._C.OptionalType) or str(a.type) == "bool":
            found[a.name] = (True, False)
    return found


def call(operator: str, choice: Choice) -> None:
    """Make the launches of a call, within `launches`."""
    absent = {name for name, value in choice.items() if value is False}
    if operator == "update_running_":
        given = _update_arguments(choice["dtype"])
        absent -= {"num_batches_tracked"} if "momentum" in absent else set()  # one of the two is needed
    else:
        given = _arguments(choice)
    arguments = [_argument(a, given[a.name], a.name in absent) for a in _schema(operator)]
    getattr(launch, operator)(*arguments)


def _argument(argument: Any, value: Any, absent: bool) -> Any:
    if str(argument.type) == "bool":
        return not absent
    return None if absent else value


def _arguments(choice: Choice) -> Choice:
    x = meta(choice["shape"], choice["layout"], choice["dtype"])
    (n, c, *s), indexed = x.shape, choice.get("index", False)
    vector = torch.empty((_GROUPS, c) if indexed else (c,), device="meta")
    vectors = ("mean", "mean_low", "var", "weight", "bias", "mean_dxhat", "mean_dxhat_xhat")
    return {
        **dict.fromkeys(("x", "dy", "residual", "y"), x),
        **dict.fromkeys(vectors, vector),
        "index": torch.empty(n, dtype=torch.int64, device="meta"),
        "groups": _GROUPS if indexed else 1,
        "weights": torch.empty((n, *s), device="meta"),
        "eps": EPS,
        "activation": choice.get("activation"),
        "negative_slope": 0.1,
        "need_dz": None,
    }


def _update_arguments(dtype: torch.dtype) -> Choice:
    running, vector = torch.empty(16, dtype=dtype, device="meta"), torch.empty(16, device="meta")
    return {
        **dict.fromkeys(("running_mean", "running_var"), running),
        **dict.fromkeys(("mean", "mean_low", "var"), vector),
        "num_batches_tracked": torch.empty((), dtype=torch.int64, device="meta"),
        "m": 12,
        "count": torch.empty((), dtype=torch.float64, device="meta"),
        "momentum": 0.1,
        "skip_nonfinite": None,
    }


def calls(strength: int) -> list[tuple[str, Choice]]:
    """Return calls of all operators in which all combinations of `strength` factors' values occur."""
    return [(operator, choice) for operator in OPERATORS for choice in covering(factors(operator), strength)]
