"""The launches of a layer's passes for the node in C++, which has checked the arguments and allocated the results.

Importing this module imports Triton. `csrc/pytorch/launched.h` has the order of the arguments.
"""

from __future__ import annotations

from torch import Tensor

from batchnorm.ops.activations import ACTIVATIONS
from batchnorm.ops.schemas import Attributes
from batchnorm.ops.triton import launch
from batchnorm.ops.triton.frame import BY_CHANNEL, Frame, KernelVectors
from batchnorm.ops.triton.variants import Start

_NAMES = tuple(ACTIVATIONS)


def train_forward(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
    activation: int,
    parameter: float,
    momentum: float | None,
    skip_nonfinite: bool,
) -> list[Start]:
    """Return the launches for y, the statistics and the update of the running statistics, which may be absent."""
    statistics, running = (mean, mean_low, var), (running_mean, running_var, num_batches_tracked)
    update = launch.NO_UPDATE
    if running_mean is not None and momentum is not None and not skip_nonfinite:
        update = launch.Update(running, momentum)
    attributes = Attributes(eps, _NAMES[activation], parameter)
    starts = launch.forward(frame, x, residual, y, statistics, weight, bias, attributes, update)
    if running_mean is not None and update is launch.NO_UPDATE:
        m = frame.n * frame.s
        starts.append(launch.running_update(running, statistics, m, None, momentum, skip_nonfinite))
    return starts


def normalize(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    parameter: float,
) -> list[Start]:
    """Return the launches for y from running statistics."""
    vectors = KernelVectors((mean, None, var, weight, bias), None, BY_CHANNEL)
    return [launch.normalization(frame, x, residual, y, vectors, Attributes(eps, _NAMES[activation], parameter))]


def backward(
    frame: Frame,
    x: Tensor,
    dy: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    dx: Tensor,
    dz: Tensor | None,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor,
    dweight: Tensor,
    eps: float,
    activation: int,
    parameter: float,
) -> list[Start]:
    """Return the launches for the gradients. Without `mean_low`, the statistics are running ones, and constant."""
    vectors = KernelVectors((mean, mean_low, var, weight, bias), None, BY_CHANNEL)
    attributes = Attributes(eps, _NAMES[activation], parameter)
    call = launch.Backward(frame, (dy, x, residual, y), vectors, attributes)
    if mean_low is None:
        return call.reduce(1, (dbias, dweight), dx, dz)
    return call.train(dx, dz, (dbias, dweight))
