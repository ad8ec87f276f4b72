"""Ghost batch normalization (Hoffer, Hubara & Soudry 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm import _options, ops
from batchnorm.nn.layer import Check
from batchnorm.nn.parts import PartsLayer
from batchnorm.ops import BatchStatistics


def _checked_size(caller: str, size: object) -> int:
    hint = "Pass the number of samples that are normalized together."
    return _options.checked_integer(caller, "ghost_size", size, 1, hint)


class _GhostBatchNorm(PartsLayer):
    ghost_size: int
    _groups_samples = True
    _checked: ClassVar[Mapping[str, Check]] = {**PartsLayer._checked, "ghost_size": _checked_size}

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        ghost_size: int = 32,
    ) -> None:  # fmt: skip
        ghost_size = _checked_size(self.layer_name, ghost_size)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.ghost_size = ghost_size

    def _index(self, x: Tensor) -> tuple[Tensor | None, int]:
        """Return each sample's part, and the number of parts; a last part with a single value joins the one before."""
        n, size, positions = x.shape[0], self.ghost_size, math.prod(x.shape[2:])
        if n <= size:
            return None, 1
        if size == positions == 1 and self.on_single == "error":
            raise ValueError(
                f"{self.layer_name} expects more than one value per channel and ghost batch in training, got "
                f"ghost_size=1 for x of shape {list(x.shape)}. One value has no variance: use a larger ghost_size, or "
                "on_single='running'."
            )
        last_joins = bool(positions == 1 and n % size == 1)
        parts = (n + size - 1) // size - int(last_joins)
        if parts == 1:
            return None, 1
        index = torch.arange(n, device=x.device) // size
        return (index.clamp(max=parts - 1) if last_joins else index), parts

    def _update_running(self, x: Tensor, statistics: BatchStatistics) -> None:
        """Update the running statistics once: by the mean of all values, and the pooled variance of the parts.

        A batch of n/K values has the same divisor for the unbiased variance: Σ(mₖ - 1). Section "Ghost batches".
        """
        if statistics.count.dim() == 0:
            super()._update_running(x, statistics)
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        skip = self.on_nonfinite != "propagate"
        if ops.update_running_by_parts_(*buffers, statistics, self.momentum, skip):
            return
        count, mean, mean_low, var, effective_count = (t.detach() for t in statistics)
        total = count.sum()
        divisor = torch.where(total > 0, total, 1.0)
        # A part without counted values has weight zero.
        share = (count / divisor).unsqueeze(1)
        parts = torch.where(effective_count > 0, count / effective_count, 0.0).sum()
        pooled = (share * (mean.to(count.dtype) + mean_low)).sum(0)
        high = pooled.to(mean.dtype)
        low = (pooled - high).to(mean.dtype)
        pooled_var = (share * var).sum(0).to(var.dtype)
        self._update_running_by(high, low, pooled_var, x, total / torch.where(parts > 0, parts, 1.0))

    def extra_repr(self) -> str:
        """Describe the batch normalization and the size of a part."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GhostBatchNorm(_GhostBatchNorm, torch.nn.modules.batchnorm._BatchNorm):
    """Ghost batch normalization of `[N, C, *S]`, which normalizes parts of the batch separately, for large batches.

    In training, the batch is split into parts of `ghost_size` consecutive samples. Each part is normalized by its own
    statistics, which keeps the noise of small batches. The last part is smaller if ghost_size does not divide N. If it
    has a single value per channel, it joins the part before it. All parts are computed in one pass.

    The running statistics are updated once per batch: the mean by the mean of all values, and the variance by
    ΣM2ₖ/Σ(mₖ - 1). For parts of equal size, this is the mean of their unbiased variances. It omits the variance between
    parts, because training does not see it. (The paper updates once per part, which decays like a single update with
    momentum 1 - (1 - a)^K.) Evaluation, parameters, buffers and `state_dict` are those of `BatchNorm`.

    Args:
        num_features: C. All arguments that are not listed here are those of `BatchNorm`.
        momentum: Weight of the whole batch in the update of the running statistics.
        track_running_stats: Whether there are running statistics; without them, evaluation also uses ghost batches.
        on_single: As in `BatchNorm`, for each part (keyword only).
        ghost_size: Samples in a part (keyword only). A batch of at most this size is normalized as by `BatchNorm`.

    Shape:
        x and y: `[N, C, *S]`.

    Raises:
        TypeError: as `BatchNorm`; ghost_size is not an int.
        ValueError: as `BatchNorm`; ghost_size < 1; in training, every part has one value per channel and
            on_single is "error".

    Numerics: as `batchnorm.functional.batch_norm`.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better: closing the generalization gap in large
        batch training of neural networks", algorithm 1; Summers & Dinneen 2020, "Four Things Everyone Should Know to
        Improve Batch Normalization".

    Examples:
        >>> layer = GhostBatchNorm(1, ghost_size=2)
        >>> layer(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).detach().T
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    layer_name = "GhostBatchNorm"


class GhostBatchNorm1d(_GhostBatchNorm, torch.nn.BatchNorm1d):
    """Ghost batch normalization of `[N, C]` or `[N, C, L]`; arguments and equations are those of `GhostBatchNorm`."""

    layer_name = "GhostBatchNorm1d"


class GhostBatchNorm2d(_GhostBatchNorm, torch.nn.BatchNorm2d):
    """Ghost batch normalization of `[N, C, H, W]`; arguments and equations are those of `GhostBatchNorm`.

    Examples:
        >>> GhostBatchNorm2d(8, ghost_size=4)(torch.rand(10, 8, 5, 5)).shape
        torch.Size([10, 8, 5, 5])
    """

    layer_name = "GhostBatchNorm2d"


class GhostBatchNorm3d(_GhostBatchNorm, torch.nn.BatchNorm3d):
    """Ghost batch normalization of `[N, C, D, H, W]`; arguments and equations are those of `GhostBatchNorm`."""

    layer_name = "GhostBatchNorm3d"
