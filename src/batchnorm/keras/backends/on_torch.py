"""The layer on torch: the operators of this library, on the CPU and on GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from keras import ops as keras_ops
from torch import Tensor

from batchnorm import distributed, functional, ops
from batchnorm.keras.backends.call import Call, Statistics

FUSES = True


def check_synchronized() -> None:
    """Accept: the statistics are those of all processes of the default process group."""


def normalize(x: Tensor, mean: Any, variance: Any, gamma: Any, beta: Any, call: Call) -> Tensor:
    """Return y by given statistics. An exported graph has torch's own operators."""
    y = functional.batch_norm(
        x.movedim(call.axis, 1), _vector(mean, x), _vector(variance, x), _vector(gamma, x), _vector(beta, x),
        eps=call.epsilon, activation=call.activation, negative_slope=call.parameter, alpha=call.parameter,
        caller="BatchNormalization",
    )  # fmt: skip
    return y.movedim(1, call.axis)


def batch_norm(x: Tensor, gamma: Any, beta: Any, counts: Any, call: Call) -> tuple[Tensor, Statistics]:
    """Return y and the statistics."""
    weight, bias = _vector(gamma, x), _vector(beta, x)
    peers = None
    if call.synchronized:
        peers = distributed.peers(None, f"BatchNormalization({x.shape[call.axis]})", call.name)
    attributes = call.epsilon, call.activation, call.parameter
    count: Any
    if counts is None and peers is None:
        z = x.movedim(call.axis, 1)
        y, mean, mean_low, variance = ops.batch_statistics_norm(z, weight, bias, None, *attributes)
        y, count = y.movedim(1, call.axis), z.numel() // max(z.shape[1], 1)
    else:
        view = _View(x.movedim(call.axis, 1)) if counts is None else _masked(x, counts, call.axis)
        statistics = ops.batch_moments(*view, peers)
        if view.index is not None:  # a row for each channel
            weight, bias = (None if t is None else t.unsqueeze(1) for t in (weight, bias))
        z, index, weights, groups = view
        y = ops.batch_statistics_norm_by_parts(
            z, statistics, weight, bias, None, *attributes, index, weights, groups, peers
        )
        y = y.movedim(1, call.axis) if index is None else _from_rows(y, x, call.axis)
        count, mean, mean_low, variance, _ = (t.detach() for t in statistics)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        # Checkpointing repeats this forward in backward, which must not update the moving statistics again.
        count = 0
    return y, Statistics((mean + mean_low).flatten(), variance.flatten(), count)


def _vector(value: Any, x: Tensor) -> Tensor | None:
    """Return a variable in a dtype that operators on x accept: x's own, or float32 if x is shorter."""
    if value is None:
        return None
    tensor: Tensor = keras_ops.convert_to_tensor(value)
    accepted = x.dtype if x.dtype in (torch.float64, torch.float32) else torch.float32
    return tensor if tensor.dtype in (accepted, x.dtype) else tensor.to(accepted)


class _View(NamedTuple):
    """x as `[N, C, *S]`, and the arguments of the operators that say which values count."""

    x: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # a tuple's method of this name is not needed
    weights: Tensor | None = None
    groups: int = 1


def _masked(x: Tensor, counts: Tensor, axis: int) -> _View:
    """Return a view of x with the weights of a mask, whose shape broadcasts to x's."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if counts.shape[axis] == 1:
        z = x.movedim(axis, 1)
        weights = counts.select(axis, 0).expand(z.shape[0], *z.shape[2:])
        return _View(z, weights=weights.to(dtype).contiguous())
    # The mask differs by channel, so that each channel is a group: one sample with one channel.
    rows = x.movedim(axis, 0).flatten(1).unsqueeze(1)
    weights = counts.expand_as(x).movedim(axis, 0).flatten(1)
    return _View(rows, torch.arange(len(rows), device=x.device), weights.to(dtype), len(rows))


def _from_rows(y: Tensor, x: Tensor, axis: int) -> Tensor:
    return y.reshape(x.movedim(axis, 0).shape).movedim(0, axis)
