"""The record of one layer in one step, and the observations that it is computed from."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.doctor.measure.layers import Array, Layer, Samples, dead_channels, median
from batchnorm.doctor.pytorch.layers import as_array, is_synchronized
from batchnorm.reference.statistics import Moments

# Above this (mean/σ)², the variance of a channel is too inexact to use, because it is a difference of float32 sums.
_CANCELS = 1e5
# Number of samples from which the variance between samples can be estimated.
_ENOUGH = 32


@dataclass(frozen=True)
class Record:
    """One layer in one step; NaN if a figure could not be measured.

    Attributes:
        step: Number of the optimizer's step, from 1.
        layer: The path of the layer.
        mean_distance: Root mean square over the channels of (running mean − batch mean)/σ, minus the part that
            sampling explains.
        log_ratio: Median over the channels of ln(batch variance / running variance). Above 0, outputs are larger in
            evaluation than in training.
        noise: Standard deviation, in σ, of a normalized value when the other samples of its batch vary, for the median
            channel. It falls as one over the square root of the batch size.
        dead: Share of channels with |γ| < 0.001.
        updates: Number of updates of the running statistics in the step; None if the layer does not count them.
        batch_size: Number of samples in the first call of the step; None if no call was seen.
    """

    step: int
    layer: str
    mean_distance: float = math.nan
    log_ratio: float = math.nan
    noise: float = math.nan
    dead: float = math.nan
    updates: int | None = None
    batch_size: int | None = None


# The quantities of a record that are drawn and logged.
QUANTITIES = {
    "mean_distance": "distance of the means (σ)",
    "log_ratio": "ln(batch / running variance)",
    "noise": "noise of the batch (σ)",
    "dead": "share of dead channels",
    "updates": "updates in a step",
}


@dataclass
class Observation:
    """The calls and the first batch of a layer in one step.

    Attributes:
        forward: Number of calls in training mode.
        backward: Number of calls in training mode within a backward pass.
        batch: Rows c, Σu, Σu², Σv, Σv² `[5, C]` of the first call. u is the mean of a sample over its positions, minus
            c. v is its mean square deviation from c. c is the mean of the batch, or the running mean if the batch is so
            small that several are pooled.
        batch_size: Number of samples in that call.
        values: Number of values per channel in that call.
    """

    forward: int = 0
    backward: int = 0
    batch: Tensor | None = None
    batch_size: int | None = None
    values: int = 0

    @torch.no_grad()
    def measure(self, x: Tensor, running_mean: Array | None) -> None:
        """Measure a batch x `[N, C, *S]`; nothing of x is kept."""
        self.batch_size, positions = x.shape[0], math.prod(x.shape[2:])
        self.values = self.batch_size * positions
        if self.values == 0:
            return
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        with torch.autocast(x.device.type, enabled=False):
            if positions == 1:
                means, squares = x.flatten(1).to(wide), None
            else:
                x = x if x.dtype == torch.float64 else x.float()
                spatial = tuple(range(2, x.dim()))
                means = x.mean(spatial).to(wide)
                squares = torch.linalg.vector_norm(x, dim=spatial).to(wide).square() / positions
            pooled = self.batch_size < _ENOUGH and running_mean is not None
            centre = torch.as_tensor(running_mean, device=x.device, dtype=wide) if pooled else means.mean(0)
            u = means - centre
            v = u.square() if squares is None else u.square() + (squares - means.square()).clamp_min(0)
            self.batch = torch.stack([centre, u.sum(0), u.square().sum(0), v.sum(0), v.square().sum(0)])


class RecentBatches:
    """The last batches of a layer, enough to estimate the variance between samples."""

    def __init__(self) -> None:
        self._batches: deque[tuple[int, Array]] = deque()

    def add(self, count: int, sums: Array) -> Samples:
        """Add the sums of u, u², v, v² `[4, C]` of a batch; return those of the last batches."""
        self._batches.append((count, sums))
        while sum(n for n, _ in self._batches) - self._batches[0][0] >= _ENOUGH:
            self._batches.popleft()
        return Samples(sum(n for n, _ in self._batches), np.sum([sums for _, sums in self._batches], axis=0))


@dataclass(frozen=True)
class LayerState:
    """The parameters and statistics of a layer; None if it has no such vector `[C]`.

    Attributes:
        mean: Running mean.
        var: Running variance, unbiased.
        weight: γ.
        updates: Number of batches in the running statistics, of the domain with most.
    """

    mean: Array | None
    var: Array | None
    weight: Array | None
    updates: int | None

    @property
    def finite(self) -> bool:
        """Whether statistics and γ are finite, and no variance is negative."""
        vectors = [v for v in (self.mean, self.var, self.weight) if v is not None]
        return all(bool(np.isfinite(v).all()) for v in vectors) and not (
            self.var is not None and bool((self.var < 0).any())
        )


def copied(tensors: list[Tensor]) -> list[Array]:
    """Return copies in NumPy and float64, with one transfer from each other device."""
    found: dict[int, Array] = {}
    elsewhere: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            found[number] = as_array(tensor, copy=True)
        else:
            elsewhere.setdefault(tensor.device, []).append(number)
    for device, numbers in elsewhere.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        joined = as_array(torch.cat([tensors[n].detach().to(wide).flatten() for n in numbers]))
        parts = np.split(joined, np.cumsum([tensors[n].numel() for n in numbers])[:-1])
        found |= {n: part.reshape(tensors[n].shape) for n, part in zip(numbers, parts, strict=True)}
    return [found[number] for number in range(len(tensors))]


def samples_sharing_statistics(module: nn.Module, samples: int) -> float:
    """Return the number of samples that share statistics in this layer."""
    ghost = getattr(module, "ghost_size", None)
    if isinstance(ghost, int):
        return float(min(samples, ghost))
    if is_synchronized(module) and dist.is_available() and dist.is_initialized():
        return float(samples * dist.get_world_size(getattr(module, "process_group", None)))
    return float(samples)


@np.errstate(all="ignore")  # values may not be finite
def recorded(
    step: int,
    layer: Layer,
    module: nn.Module,
    observation: Observation,
    batch: Array | None,
    recent: RecentBatches,
    before: LayerState,
    after: LayerState,
) -> tuple[Record, Layer]:
    """Return the record of a layer, and the layer with the `calls` and `samples` of this step.

    If the call of the layer was seen, the statistics of the batch are measured. Calls in compiled code are not seen,
    and masked batches are not read. The statistics of the batch then follow from the running statistics, if these were
    updated once: (new − (1 − a)·old)/a.
    """
    updates = None if before.updates is None or after.updates is None else after.updates - before.updates
    calls: tuple[Moments, ...] = ()
    samples: Samples | None = None
    noise = math.nan
    mean = var = None
    if batch is not None and observation.batch_size:
        size, values = observation.batch_size, observation.values
        samples = recent.add(size, batch[1:])
        if samples.count >= _ENOUGH // 2:  # their own mean is subtracted
            shared = samples_sharing_statistics(module, size) * (samples.count - 1) / samples.count
            noise = median(samples.noise(shared, layer.eps))
        u, v = batch[1] / size, batch[3] / size
        mean, var = batch[0] + u, np.maximum(v - np.square(u), 0.0)
        cancels = values > size and bool((np.square(mean) > _CANCELS * (var + layer.eps)).any())
        if cancels or values == 1:
            mean = var = None
        else:
            count = np.asarray(float(values))
            calls = (Moments(count, mean, var * values, count),)
            var = var * (values / (values - 1))
    if mean is None and updates == 1:
        mean, var = _from_running(module, before, after)
    distance = log_ratio = math.nan
    if mean is not None and var is not None and before.mean is not None and before.var is not None:
        distance, log_ratio = _distances(layer, samples, observation.batch_size, mean, var, before.mean, before.var)
    dead = math.nan if after.weight is None else float(dead_channels(after.weight).mean())
    record = Record(step, layer.path, distance, log_ratio, noise, dead, updates, observation.batch_size)
    return record, replace(layer, calls=calls, samples=samples)


def _from_running(module: nn.Module, before: LayerState, after: LayerState) -> tuple[Array | None, Array | None]:
    a = getattr(module, "momentum", None)
    if a is None and after.updates:
        a = 1 / after.updates
    if not a or before.mean is None or before.var is None or after.mean is None or after.var is None:
        return None, None
    if before.mean.shape != after.mean.shape:
        return None, None
    return (after.mean - (1 - a) * before.mean) / a, np.maximum((after.var - (1 - a) * before.var) / a, 0.0)


def _distances(
    layer: Layer,
    samples: Samples | None,
    size: int | None,
    mean: Array,
    var: Array,
    running_mean: Array,
    running_var: Array,
) -> tuple[float, float]:
    if running_mean.shape != mean.shape:
        return math.nan, math.nan
    scale = var + layer.eps
    square = np.square(running_mean - mean)
    if samples is not None and samples.count > 1 and size:
        a = layer.momentum or 0.0
        # Errors of the batch mean and of the running mean, an average over the last 1/a batches.
        square = square - samples.error_of_mean(size) * (1 + a / (2 - a))
    distance = math.sqrt(max(float((square / scale).mean()), 0.0))
    return distance, math.log(median(scale / np.maximum(running_var + layer.eps, 1e-30)))
