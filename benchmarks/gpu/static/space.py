"""The calls of the operators that a user can make, as far as kernels differ in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batchnorm.ops.activations import ACTIVATIONS
from batchnorm.ops.schemas import SCHEMAS
from batchnorm.ops.triton import OPERATORS, launch
from benchmarks.gpu.layers import EPS
from benchmarks.gpu.static.compiling import empty
from benchmarks.gpu.static.covering import Choice, covering

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A program holds a channel; programs read tiles; the same with rows of odd sizes; without positions.
SHAPES = ((8, 16, 14, 14), (64, 64, 32, 32), (40, 24, 37, 41), (300, 1000))
_GROUPS = 3
# The operators, and the two that share their launches.
_FUSED = "train_forward_and_update_"
CALLED = (*OPERATORS, _FUSED)
_RUNNING = "Tensor running_mean, Tensor running_var, Tensor? num_batches_tracked, float momentum"


def _schema(operator: str) -> list[Any]:
    text = SCHEMAS["train_forward"].replace(") ->", f", {_RUNNING}) ->", 1) if operator == _FUSED else SCHEMAS[operator]
    return torch._C.parse_schema(f"{operator}{text}").arguments


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


def call(operator: str, choice: Choice, device: str = "meta") -> None:
    """Make the launches of a call, on a GPU, or on the meta device within `launches`."""
    absent = {name for name, value in choice.items() if value is False}
    if operator == "update_running_":
        given = _update_arguments(choice["dtype"], device, 16)
        absent -= {"num_batches_tracked"} if "momentum" in absent else set()  # one of the two is needed
    else:
        given = _update_arguments(choice["dtype"], device, choice["shape"][1]) | _arguments(choice, device)
    arguments = [_argument(a, given[a.name], a.name in absent) for a in _schema(operator)]
    getattr(launch, operator)(*arguments)


def _argument(argument: Any, value: Any, absent: bool) -> Any:
    if str(argument.type) == "bool":
        return not absent
    return None if absent else value


def _arguments(choice: Choice, device: str) -> Choice:
    x = empty(choice["shape"], choice["layout"], choice["dtype"], device).zero_()
    (n, c, *s), indexed = x.shape, choice.get("index", False)
    vector = torch.ones((_GROUPS, c) if indexed else (c,), device=device)
    vectors = ("mean", "mean_low", "var", "weight", "bias", "mean_dxhat", "mean_dxhat_xhat")
    return {
        **dict.fromkeys(("x", "dy", "residual", "y"), x),
        **dict.fromkeys(vectors, vector),
        "index": torch.zeros(n, dtype=torch.int64, device=device),
        "groups": _GROUPS if indexed else 1,
        "weights": torch.ones((n, *s), device=device),
        "eps": EPS,
        "activation": choice.get("activation"),
        "negative_slope": 0.1,
        "need_dz": None,
    }


def _update_arguments(dtype: torch.dtype, device: str, channels: int) -> Choice:
    running, vector = torch.ones(channels, dtype=dtype, device=device), torch.ones(channels, device=device)
    return {
        **dict.fromkeys(("running_mean", "running_var"), running),
        **dict.fromkeys(("mean", "mean_low", "var"), vector),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device),
        "m": 12,
        "count": torch.full((), 12.0, dtype=torch.float64, device=device),
        "momentum": 0.1,
        "skip_nonfinite": None,
    }


def calls(strength: int) -> list[tuple[str, Choice]]:
    """Return calls of all operators in which all combinations of `strength` factors' values occur."""
    return [(operator, choice) for operator in CALLED for choice in covering(factors(operator), strength)]
