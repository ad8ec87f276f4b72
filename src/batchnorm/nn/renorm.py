"""Batch renormalization (Ioffe 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm import _checks, ops
from batchnorm.nn.layer import Check
from batchnorm.nn.parts import PartsLayer
from batchnorm.ops import BatchStatistics

# A constant, or a function of the number of batches so far (an int64 scalar on the layer's device).
Limit = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PaperSchedule:
    """The paper's schedule of both limits: batch normalization first, then gradually larger limits.

    Up to batch `start`, `rmax` is 1 and `dmax` is 0. Then they grow linearly to `rmax_limit` at batch `rmax_end` and
    `dmax_limit` at batch `dmax_end`. The layer's `num_batches_tracked` counts the batches. The `state_dict` contains
    it, so a resumed run continues the schedule.

    Args:
        start: The number of batches of plain batch normalization.
        rmax_end: The batch at which rmax reaches its limit.
        dmax_end: The batch at which dmax reaches its limit.
        rmax_limit: The largest rmax, >= 1.
        dmax_limit: The largest dmax, >= 0.

    Raises:
        ValueError: an end is not after the start, or a limit is out of range.

    Source: Ioffe 2017, section 4. The paper says "gradually"; here the growth is linear. The paper's momentum is 0.01.

    Examples:
        >>> paper = PaperSchedule()
        >>> layer = BatchRenorm2d(64, momentum=0.01, rmax=paper.rmax, dmax=paper.dmax)
        >>> paper.rmax(torch.tensor([5_000, 22_500, 40_000])), paper.dmax(torch.tensor(30_000))
        (tensor([1., 2., 3.]), tensor(5.))
    """

    start: int = 5_000
    rmax_end: int = 40_000
    dmax_end: int = 25_000
    rmax_limit: float = 3.0
    dmax_limit: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < min(self.rmax_end, self.dmax_end):
            raise ValueError(
                f"PaperSchedule expects 0 <= start < rmax_end and dmax_end, got start={self.start}, "
                f"rmax_end={self.rmax_end}, dmax_end={self.dmax_end}. They are numbers of batches."
            )
        _check_limit("PaperSchedule", "rmax_limit", self.rmax_limit, 1.0)
        _check_limit("PaperSchedule", "dmax_limit", self.dmax_limit, 0.0)

    def rmax(self, batches: Tensor) -> Tensor:
        """Return the limit of r after a number of batches."""
        return 1.0 + (self.rmax_limit - 1.0) * self._progress(batches, self.rmax_end)

    def dmax(self, batches: Tensor) -> Tensor:
        """Return the limit of d after a number of batches."""
        return self.dmax_limit * self._progress(batches, self.dmax_end)

    def _progress(self, batches: Tensor, end: int) -> Tensor:
        return ((batches - self.start) / (end - self.start)).clamp(0.0, 1.0)


def _check_limit(caller: str, name: str, value: object, least: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(
            f"{caller} expects {name} to be a number >= {least:g}, or a function of the number of batches, "
            f"got {value!r} ({type(value).__name__}). Pass for example PaperSchedule().{name}."
        )
    if not value >= least:
        raise ValueError(
            f"{caller} expects {name} >= {least:g}, got {value}. rmax = 1 with dmax = 0 is batch normalization; "
            "the paper uses up to 3 and 5."
        )


def _attribute(name: str, least: float) -> Check:
    """Return the check of a limit, which may be a function of the number of batches."""

    def check(caller: str, limit: Limit) -> None:
        value: object = limit(torch.zeros((), dtype=torch.int64)) if callable(limit) else limit
        _check_limit(caller, name, value.item() if isinstance(value, Tensor) else value, least)

    return check


class _BatchRenorm(PartsLayer):
    rmax: Limit
    dmax: Limit
    _checked: ClassVar[Mapping[str, Check]] = {
        **PartsLayer._checked,
        "rmax": _attribute("rmax", 1.0),
        "dmax": _attribute("dmax", 0.0),
    }

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        rmax: Limit = 3.0, dmax: Limit = 5.0, sync: bool = False,
        process_group: Any = None,
    ) -> None:  # fmt: skip
        if not track_running_stats:
            raise ValueError(
                f"{self.layer_name} expects track_running_stats=True, got False. It corrects the batch's statistics "
                "toward the running statistics. Use BatchNorm for a layer without them."
            )
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.rmax = rmax
        self.dmax = dmax
        self.sync = sync
        self.process_group = process_group

    def _normalize_by_parts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if (self.rmax, self.dmax) == (1, 0) and self._peers() is None:
            return self._normalize(x, mask=mask)  # bitwise equal
        return super()._normalize_by_parts(x, mask)

    def _affine(self, statistics: BatchStatistics) -> tuple[Tensor | None, Tensor | None]:
        """Return γ·r and γ·d + β, because renormalization is batch normalization with these as γ and β."""
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or batches is None:
            raise ValueError(
                f"{self.layer_name} expects running_mean, running_var and num_batches_tracked, got None. It corrects "
                "the batch's statistics toward the running statistics. Keep them, or use BatchNorm."
            )
        _checks.check_allocated(
            self.layer_name, running_mean=running_mean, running_var=running_var, num_batches_tracked=batches,
            weight=self.weight, bias=self.bias,
        )  # fmt: skip
        rmax = self.rmax(batches) if callable(self.rmax) else self.rmax
        dmax = self.dmax(batches) if callable(self.dmax) else self.dmax
        r, d = ops.renorm_correction(
            statistics.mean, statistics.mean_low, statistics.var, running_mean, running_var, rmax, dmax, self.eps,
            self.layer_name,
        )  # fmt: skip
        if self.weight is not None:
            gamma = self.weight.to(r.dtype)  # cast once: the two gradients of a half γ are added before rounding
            r, d = gamma * r, gamma * d
        return r, d if self.bias is None else d + self.bias

    def extra_repr(self) -> str:
        """Describe the batch normalization and the limits."""
        limits = (f"{name}={getattr(limit, '__qualname__', limit)}" for name, limit in self._limits())
        return ", ".join([super().extra_repr(), *limits, *(["sync=True"] if self.sync else [])])

    def _limits(self) -> tuple[tuple[str, Limit], ...]:
        return ("rmax", self.rmax), ("dmax", self.dmax)


class BatchRenorm(_BatchRenorm, torch.nn.modules.batchnorm._BatchNorm):
    """Batch renormalization of `[N, C, *S]`, with any number of spatial dimensions, for small or non-iid batches.

    The layer normalizes by the batch, then corrects the result toward the running statistics, so that training and
    evaluation compute nearly the same:

        x̂ = (x - μ_B)/σ_B·r + d    r = clip(σ_B/σ, 1/rmax, rmax)    d = clip((μ_B - μ)/σ, -dmax, dmax)

    with σ_B = √(var_B + eps), σ = √(running_var + eps), and y = x̂·weight + bias. No gradient flows through r and d.
    μ and σ are the running statistics before this batch updates them. With rmax = 1 and dmax = 0, the layer is bitwise
    equal to batch normalization.

    Parameters, buffers, `state_dict` and evaluation are those of `BatchNorm`, so checkpoints load in both directions.
    The running variance is the average of *unbiased* variances (the paper averages σ_B): with m values per channel,
    r is about √((m - 1)/m) on average, or less.

    Args:
        num_features: C. The arguments that are not listed here are those of `BatchNorm`.
        momentum: Weight of the new batch; the paper uses 0.01.
        track_running_stats: Must be True: the correction is toward the running statistics.
        rmax: A number >= 1, or a function that maps the number of batches so far (int64 scalar tensor, the layer's
            `num_batches_tracked`) to a scalar tensor, such as `PaperSchedule().rmax` (keyword only).
        dmax: A number >= 0, or a function as for rmax (keyword only).
        sync: Whether to use the joint statistics of all processes of a group (keyword only).
        process_group: The group for `sync`; None: all processes (keyword only).

    Shape:
        x and y: `[N, C, *S]`; training with N = 1 needs more than one position.

    Raises:
        TypeError: as `BatchNorm`; a limit is neither a number nor a function that returns one.
        ValueError: as `BatchNorm`; rmax < 1, dmax < 0, or track_running_stats=False.
        RuntimeError: activation checkpointing repeats a forward pass that is not among the layer's last 64 calls, so
            that r and d of the first pass are unknown.

    Numerics: as `batchnorm.functional.batch_norm`; r and d are computed in float64. For activation checkpointing, the
        layer keeps mean, variance, r and d of its last 64 calls: 1 KiB per channel in float32.

    Source: Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        algorithm 1.

    Examples:
        >>> layer = BatchRenorm(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()  # r = (1, 3), d = (2, 5), the last two clipped
        tensor([[1.0000, 2.0000],
                [3.0000, 8.0000]])
    """

    layer_name = "BatchRenorm"


class BatchRenorm1d(_BatchRenorm, torch.nn.BatchNorm1d):
    """Batch renormalization of `[N, C]` or `[N, C, L]`; arguments and equations are those of `BatchRenorm`."""

    layer_name = "BatchRenorm1d"


class BatchRenorm2d(_BatchRenorm, torch.nn.BatchNorm2d):
    """Batch renormalization of `[N, C, H, W]`; arguments and equations are those of `BatchRenorm`.

    Examples:
        >>> layer = BatchRenorm2d(8, rmax=3.0, dmax=5.0)
        >>> layer(torch.rand(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    layer_name = "BatchRenorm2d"


class BatchRenorm3d(_BatchRenorm, torch.nn.BatchNorm3d):
    """Batch renormalization of `[N, C, D, H, W]`; arguments and equations are those of `BatchRenorm`."""

    layer_name = "BatchRenorm3d"
