"""A layer of batch normalization, and all its measurements."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.execution.observe import Statistics, running_statistics
from batchnorm.models.graphs.neighbours import BatchNormCall
from batchnorm.moments import Moments
from batchnorm.walk import Found, as_in_training, eps_of, is_frozen, norm_layers, uses_batch

# Largest number of channels of a layer whose values are kept for every sample.
KEPT_CHANNELS = 32
# From the first noise of a normalized value, in σ, the batch is too small. The second is the noise to aim for.
NOISY, NOISE_AIM = 0.25, 0.1
# Below this |γ|, the output of a channel is nearly its β alone. From this share of such channels, a layer is reported.
DEAD, DEAD_SHARE = 1e-3, 0.25


@dataclass
class Samples:
    """The inputs of a layer in evaluation, sample by sample.

    u is the mean of a sample over its positions, minus the running mean. v is its mean square deviation from the
    running mean.
    """

    count: int = 0
    sums: Tensor | None = None  # [4, C]: of u, u², v, v²
    kept: list[Tensor] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)

    def add(self, u: Tensor, v: Tensor, batch: int) -> None:
        """Add the samples of a batch, u and v `[N, C]`."""
        u, v = u.cpu(), v.cpu()
        sums = torch.stack([u.sum(0), u.square().sum(0), v.sum(0), v.square().sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(u)
        every = torch.linspace(0, u.shape[1] - 1, min(KEPT_CHANNELS, u.shape[1]), device="cpu").long()
        self.kept.append(u[:, every].float())
        self.batch += [batch] * len(u)

    def noise(self, batch_size: float, eps: float) -> Tensor:
        """Return the standard deviation `[C]` of a normalized value when the other samples of its batch vary.

        It is √((Var(u)/σ² + Var(v)/(4σ⁴))/N), where σ² includes ε. The first term is the shift by the batch's mean, the
        second the scale by its deviation. The variances are those of whole samples, so correlated positions do not
        count as independent.

        Source: the mathematics page, "Measures", for independent values.
        """
        if self.sums is None or self.count < 2:
            return torch.full((1,), math.nan, device="cpu")
        u, uu, v, vv = self.sums / self.count
        var_u, var_v = (uu - u * u).clamp_min(0), (vv - v * v).clamp_min(0)
        var = (v - u * u).clamp_min(0) + eps
        return ((var_u / var + var_v / (4 * var * var)) / batch_size).sqrt()

    def error_of_mean(self, number: float) -> Tensor:
        """Return the variance `[C]` of the mean of this many samples."""
        assert self.sums is not None
        u, uu, _, _ = self.sums / self.count
        return (uu - u * u).clamp_min(0) / number


@dataclass(frozen=True)
class Precision:
    """The precision with which the input of a layer can be normalized, from the first batch.

    Attributes:
        ratio: The largest |mean| over √(variance + ε) of a channel.
        channel: That channel.
        dtype: The dtype of the input.
        input_error: Error that the rounding of the input causes, in standard deviations.
        computed_error: Error of torch's batch normalization on this input against float64, in standard deviations.
    """

    ratio: float
    channel: int
    dtype: torch.dtype
    input_error: float
    computed_error: float

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.input_error, self.computed_error)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of batch normalization. Without data, the fields that need data are empty.

    Attributes:
        found: The module and its paths.
        running: Its running statistics, float64 `[K, C]`; None if it keeps none that can be measured.
        updates_running: Whether training updates them.
        by_batch: Whether training normalizes by the batch.
        place: Its place in the traced model.
        order: Its number in the order of the calls; a large number if it is not called.
        calls: Moments of its input in each call of a forward pass, with the layers before it as in training.
        first_input: Moments of its input in the first call with the first batch.
        single_value_batches: Number of batches with a single value per channel.
        moved_in_evaluation: Whether its running statistics changed in evaluation.
        samples: Its inputs in evaluation.
        precision: How precisely its input can be normalized.
        largest_input: The largest |x| of its input, in the dtype of x; NaN if one was NaN.
    """

    found: Found
    running: Statistics | None
    updates_running: bool
    by_batch: bool
    place: BatchNormCall | None = None
    order: int = sys.maxsize
    calls: tuple[Moments, ...] = ()
    first_input: Moments | None = None
    single_value_batches: int = 0
    moved_in_evaluation: bool = False
    samples: Samples | None = None
    precision: Precision | None = None
    largest_input: Tensor | None = None

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.found.path

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.found.module

    @property
    def eps(self) -> float:
        """ε, which is added to the variance."""
        return eps_of(self.module)

    @property
    def momentum(self) -> float | None:
        """The weight of the new batch; None for the average over all batches."""
        momentum = getattr(self.module, "momentum", None)
        return None if momentum is None else float(momentum)

    @property
    def momentum_as_set(self) -> str:
        """The momentum in the convention of its framework; for Keras also the weight of the new batch."""
        old = getattr(self.module, "weight_of_old", None)
        if old is None:
            return f"momentum {self.momentum:g}"
        return f"momentum {old:g} (weight of the new batch: {1 - old:g})"

    @property
    def updates(self) -> int | None:
        """Number of batches in its running statistics, of all domains together; None if it does not count them."""
        tracked = getattr(self.module, "num_batches_tracked", None)
        return None if tracked is None else int(tracked.sum())

    @property
    def affine(self) -> list[nn.Parameter]:
        """γ and β, if it has them."""
        return list(self.module.parameters(recurse=False))

    @property
    def population(self) -> Moments | None:
        """Moments of its input over all data and calls; None without data, or if they are not finite."""
        if not self.calls or self.running is None:
            return None
        pooled = self.calls[0].merge(*self.calls[1:])
        # A single value has no variance. With masks, there may be no value.
        return pooled if pooled.count > 1 and bool((pooled.mean + pooled.m2).isfinite().all()) else None

    def is_new(self) -> bool:
        """Return whether the running statistics are those of a new layer."""
        return self.running is not None and bool((self.running.mean == 0).all() and (self.running.var == 1).all())

    def initial_share(self) -> float:
        """Return the weight of the initial values in the running statistics, (1 - momentum)^updates."""
        return 1.0 if self.is_new() else remaining(self.momentum, self.updates)

    def scatter(self, batch_size: float) -> Tensor | None:
        """Return the standard deviation `[C]` of the batch mean, in σ; None without data."""
        if self.samples is None or self.population is None:
            return None
        return (self.samples.error_of_mean(batch_size) / (self.population.var + self.eps)).sqrt()


def remaining(momentum: float | None, updates: int | None) -> float:
    """Return the weight of the initial values after this number of updates; 0 if the updates are not counted."""
    if momentum is None or not updates:  # loaded from elsewhere, or not counted
        return 0.0
    return math.pow(1 - min(momentum, 1.0), updates)


def samples_needed(batch_size: float, noise: float) -> int:
    """Return the batch size that reduces the noise of the batch statistics at `batch_size` to `NOISE_AIM`."""
    return math.ceil(batch_size * (noise / NOISE_AIM) ** 2)


def is_synchronized(module: nn.Module) -> bool:
    """Return whether the layer computes its batch statistics over several processes."""
    return isinstance(module, nn.SyncBatchNorm) or bool(getattr(module, "sync", False))


def dead_channels(weight: Tensor) -> Tensor:
    """Return which channels have a γ so near 0 that their output is nearly β alone."""
    return weight.detach().abs() < DEAD


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """Return every layer of batch normalization, with its role in training."""
    with as_in_training(model):
        return tuple(map(_layer, norm_layers(model)))


def _layer(found: Found) -> Layer:
    module = found.module
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    known = isinstance(mean, Tensor) and isinstance(var, Tensor) and not is_lazy(mean)
    updates = (
        module.training
        and mean is not None
        and bool(getattr(module, "track_running_stats", True))
        and bool(getattr(module, "update_running_stats", True))
        and getattr(module, "momentum", None) != 0
        and not is_frozen(module)
    )
    running = Statistics(*(statistic.cpu() for statistic in running_statistics(module))) if known else None
    return Layer(found, running, updates, uses_batch(module))
