"""The passes of a layer for the node in C++, which has checked the arguments and allocated the results.

Importing this module imports Triton. `csrc/pytorch/launched.h` has the order of the arguments.
"""

from __future__ import annotations

from torch import Tensor

from batchnorm.ops.activations import ACTIVATIONS
from batchnorm.ops.schemas import Attributes
from batchnorm.ops.triton import launch
from batchnorm.ops.triton.frame import BY_CHANNEL, Frame, KernelVectors

_NAMES = tuple(ACTIVATIONS)


def train_forward(
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
) -> None:
    """Compute y and the batch's statistics, and update the running statistics, which may be absent."""
    frame, statistics = Frame.of(x), (mean, mean_low, var)
    running = (running_mean, running_var, num_batches_tracked)
    update = launch.NO_UPDATE
    if running_mean is not None and momentum is not None and not skip_nonfinite:
        update = launch.Update(running, momentum)
    attributes = Attributes(eps, _NAMES[activation], parameter)
    launch.launch_forward(frame, x, residual, y, statistics, weight, bias, attributes, update)
    if running_mean is not None and update is launch.NO_UPDATE:
        launch.launch_update(running, statistics, frame.n * frame.s, None, momentum, skip_nonfinite)


def normalize(
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
) -> None:
    """Compute y from running statistics."""
    vectors = KernelVectors((mean, None, var, weight, bias), None, BY_CHANNEL)
    launch.launch_normalize(Frame.of(x), x, residual, y, vectors, Attributes(eps, _NAMES[activation], parameter))


def backward(
    dy: Tensor,
    x: Tensor,
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
) -> None:
    """Compute the gradients. Statistics without `mean_low` are running statistics, which are constants."""
    vectors = KernelVectors((mean, mean_low, var, weight, bias), None, BY_CHANNEL)
    attributes = Attributes(eps, _NAMES[activation], parameter)
    call = launch.Backward(Frame.of(x), (dy, x, residual, y), vectors, attributes)
    if mean_low is None:
        call.reduce(1, (dbias, dweight), dx, dz)
    else:
        call.train(dx, dz, (dbias, dweight))
