"""Batch normalization synchronized over the processes of a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.nn.parts import PartsLayer


class SyncBatchNorm(PartsLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization of `[N, C, *S]` by the statistics of all processes' batches together.

    In training, the layer computes the same mean, variance, running statistics and gradient of x as one process with
    the joined batch of all processes. Each process may have any number of samples, even none. The equations are those
    of `BatchNorm`. Forward uses one collective (count, mean and sum of squared deviations), and backward uses another
    (two sums per channel). In evaluation, without `torch.distributed`, or with a single process in the group, the layer
    computes the same as `BatchNorm` and does not communicate.

    The gradient of x is the gradient of the sum of all processes' losses. The gradients of weight and bias are this
    process's part of it, and `DistributedDataParallel` averages them over the processes. With batches of equal size,
    the averages are the gradients of the joined batch's mean loss. Otherwise, multiply each process's mean loss by
    `n·W/Σn`, where n is its number of samples and W the number of processes.

    Every process must call the same synchronized layers in the same order, forward and backward.

    Args:
        num_features: C, the number of x's channels; the same on every process.
        eps: Added to the variance; positive.
        momentum: Weight of the new batch, in [0, 1]. None gives the cumulative average of all batches.
        affine: Whether there are weight (γ) and bias (β), each `[C]`.
        track_running_stats: Whether there are running statistics; without them, evaluation uses the local batch's.
        process_group: The processes to join, from `torch.distributed.new_group`; None: all.
        device: The device of parameters and buffers.
        dtype: The dtype of parameters and buffers.
        bias: Whether there is β (keyword only).
        on_nonfinite: "propagate", or "skip" to leave the running statistics unchanged when a batch's are not finite
            (keyword only).
        on_single: As in `BatchNorm`, for the values of all processes together; the same on every process (keyword
            only).
        channel_dim: As in `BatchNorm` (keyword only).
        name: The layer's name in errors, usually its path in the model; the same on every process (keyword only).

    Attributes:
        process_group: The process group, which can be changed. A copy of the layer keeps it. An unpickled layer finds
            its group by name.
        name: The layer's name in errors.

    Shape:
        x and y: `[N, C, *S]`, where N and `*S` may differ between processes.
        mask: booleans or weights, broadcastable to `[N, *S]`; positions where it is 0 do not enter the statistics.

    Raises:
        TypeError: num_features is not an int; process_group is not a process group; in forward, x is not a
            floating-point tensor, or its dtype does not match that of the parameters.
        ValueError: eps, momentum, on_nonfinite, on_single or channel_dim out of range; this process is not in
            process_group; in forward, a wrong rank or number of channels, or one value per channel over all processes
            in training if on_single is "error".
        RuntimeError: in forward or backward, a process died, has another number of channels or is in another layer.
            Every remaining process raises this error within the group's timeout. It names the layer and the ranks.

    Numerics: for all dtypes, the processes exchange float64 and merge in the order of ranks. Their running statistics
    are therefore bitwise equal.

    Source: Ioffe & Szegedy 2015, algorithm 1, over the joined batch; moments merged after Chan, Golub & LeVeque 1979.

    Examples:
        >>> layer = SyncBatchNorm(3)  # alone: as BatchNorm
        >>> layer(torch.rand(4, 3, 5, 5)).shape
        torch.Size([4, 3, 5, 5])
    """

    layer_name = "SyncBatchNorm"
    sync = True

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group: Any = None, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        name: str = "",
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.process_group = process_group
        self.name = name

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return y for x `[N, C, *S]`; positions where `mask [N, *S]` is 0 do not enter the statistics."""
        if self._peers() is None:
            return self._normalize(input, mask=mask)
        return super().forward(input, mask)

    def extra_repr(self) -> str:
        """Describe the layer: torch's description, and the options that differ from their defaults."""
        parts = [super().extra_repr()]
        parts += [f"process_group={self._group_name!r}"] * (self._group_name is not None)
        parts += [f"name={self.name!r}"] * bool(self.name)
        return ", ".join(parts)
