"""A layer of batch normalization, and all its measurements, in NumPy.

Values may not be finite, so computations here and in the modules for these measurements ignore NumPy's warnings.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.doctor.measure.place import Place
from batchnorm.reference.statistics import Moments, merge

Array = NDArray[np.float64]

# Largest number of channels of a layer whose values are kept for every sample.
KEPT_CHANNELS = 32
# From the first noise of a normalized value, in σ, the batch is too small. The second is the noise to aim for.
NOISY, NOISE_AIM = 0.25, 0.1
# Below this |γ|, the output of a channel is nearly its β alone. From this share of such channels, a layer is reported.
DEAD, DEAD_SHARE = 1e-3, 0.25


class Statistics(NamedTuple):
    """The mean and variance that a layer normalizes by: `[K, C]`, with K > 1 only for layers with domains."""

    mean: Array
    var: Array


@dataclass(frozen=True, eq=False)
class Vectors:
    """The parameters and statistics of a layer, as copies: `[C]`, or `[K, C]` if it has several; None if it has none.

    Attributes:
        weight: γ.
        bias: β.
        running_mean: Running mean.
        running_var: Running variance.
    """

    weight: Array | None = None
    bias: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None


@dataclass
class Samples:
    """The inputs of a layer in evaluation, sample by sample.

    u is the mean of a sample over its positions, minus the running mean. v is its mean square deviation from the
    running mean.
    """

    count: int = 0
    sums: Array | None = None  # [4, C]: of u, u², v, v²
    kept: list[NDArray[np.float32]] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)

    @np.errstate(all="ignore")
    def add(self, u: Array, v: Array, batch: int) -> None:
        """Add the samples of a batch, u and v `[N, C]`."""
        sums = np.stack([u.sum(0), np.square(u).sum(0), v.sum(0), np.square(v).sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(u)
        every = np.linspace(0, u.shape[1] - 1, min(KEPT_CHANNELS, u.shape[1])).astype(int)
        self.kept.append(u[:, every].astype(np.float32))
        self.batch += [batch] * len(u)

    @np.errstate(all="ignore")
    def noise(self, batch_size: float, eps: float) -> Array:
        """Return the standard deviation `[C]` of a normalized value when the other samples of its batch vary.

        It is √((Var(u)/σ² + Var(v)/(4σ⁴))/N), where σ² includes ε. The first term is the shift by the batch's mean, the
        second the scale by its deviation. The variances are those of whole samples, so correlated positions do not
        count as independent.

        Source: the tutorial, "How much noise, by hand", for independent values.
        """
        if self.sums is None or self.count < 2:
            return np.full(1, math.nan)
        u, uu, v, vv = self.sums / self.count
        var_u, var_v = np.maximum(uu - u * u, 0.0), np.maximum(vv - v * v, 0.0)
        var = np.maximum(v - u * u, 0.0) + eps
        noise: Array = np.sqrt((var_u / var + var_v / (4 * var * var)) / batch_size)
        return noise

    @np.errstate(all="ignore")
    def error_of_mean(self, number: float) -> Array:
        """Return the variance `[C]` of the mean of this many samples."""
        assert self.sums is not None
        u, uu, _, _ = self.sums / self.count
        error: Array = np.maximum(uu - u * u, 0.0) / number
        return error


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
    dtype: str
    input_error: float
    computed_error: float

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.input_error, self.computed_error)


class HalfInput(NamedTuple):
    """The largest |x| of an input in half precision.

    Attributes:
        largest: The largest |x|; NaN if one was NaN.
        limit: The largest number of the dtype.
        dtype: The dtype.
    """

    largest: float
    limit: float
    dtype: str


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of batch normalization. Without data, the fields that need data are empty.

    Attributes:
        paths: Its paths.
        kind: Its class.
        channels: Number of channels; 0 if it is unknown.
        eps: ε, which is added to the variance.
        momentum: The weight of the new batch; None for the average over all batches.
        running: Its running statistics `[K, C]`; None if it keeps none that can be measured.
        updates_running: Whether training updates them.
        by_batch: Whether training normalizes by the batch.
        vectors: Its parameters and statistics.
        keeps_statistics: Whether it has running statistics.
        whitens: Whether its running statistics are a matrix, because it whitens.
        weight_of_old: The momentum of frameworks in which it is the weight of the old statistics.
        updates: Number of batches in its running statistics, of all domains together; None if it does not count them.
        training: Whether it is in training mode.
        affine: Whether γ or β are parameters.
        trained: Whether one of them is trained.
        weight_decay: The largest weight decay of its parameters.
        frozen: Whether it normalizes by its running statistics even in training.
        not_updated_by: The setting that prevents updates of the running statistics.
        synchronized: Whether it computes its batch statistics over several processes.
        on_single: What training does with a single value per channel: "error", "running" or "skip".
        own_forward: Whether it is a layer of the framework whose computation was replaced.
        resolution: The ε of the dtype of the running statistics, if it is half precision.
        parameters: Number of values in parameters.
        buffers: Number of values in buffers.
        place: Its place in the traced model.
        order: Its number in the order of the calls; a large number if it is not called.
        calls: Moments of its input in each call of a forward pass, with the layers before it as in training.
        first_input: Moments of its input in the first call with the first batch.
        single_value_batches: Number of batches with a single value per channel.
        moved_in_evaluation: Whether its running statistics changed in evaluation.
        samples: Its inputs in evaluation.
        precision: How precisely its input can be normalized.
        half_input: The range of its input in half precision.
    """

    paths: tuple[str, ...]
    kind: str
    channels: int
    eps: float
    momentum: float | None
    running: Statistics | None
    updates_running: bool
    by_batch: bool
    vectors: Vectors = field(default_factory=Vectors)
    keeps_statistics: bool = True
    whitens: bool = False
    weight_of_old: float | None = None
    updates: int | None = None
    training: bool = True
    affine: bool = True
    trained: bool = True
    weight_decay: float = 0.0
    frozen: bool = False
    not_updated_by: str = ""
    synchronized: bool = False
    on_single: str = "error"
    own_forward: bool = False
    resolution: float | None = None
    parameters: int = 0
    buffers: int = 0
    place: Place | None = None
    order: int = sys.maxsize
    calls: tuple[Moments, ...] = ()
    first_input: Moments | None = None
    single_value_batches: int = 0
    moved_in_evaluation: bool = False
    samples: Samples | None = None
    precision: Precision | None = None
    half_input: HalfInput | None = None

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]

    @property
    def momentum_as_set(self) -> str:
        """The momentum in the convention of its framework; for Keras also the weight of the new batch."""
        old = self.weight_of_old
        if old is None:
            return f"momentum {self.momentum:g}"
        return f"momentum {old:g} (weight of the new batch: {1 - old:g})"

    @property
    def population(self) -> Moments | None:
        """Moments of its input over all data and calls; None without data, or if they are not finite."""
        if not self.calls or self.running is None:
            return None
        with np.errstate(all="ignore"):
            pooled = merge(self.calls)
            finite = bool(np.isfinite(pooled.mean + pooled.m2).all())
        # A single value has no variance. With masks, there may be no value.
        return pooled if pooled.count > 1 and finite else None

    def is_new(self) -> bool:
        """Return whether the running statistics are those of a new layer."""
        return self.running is not None and bool((self.running.mean == 0).all() and (self.running.var == 1).all())

    def initial_share(self) -> float:
        """Return the weight of the initial values in the running statistics, (1 - momentum)^updates."""
        return 1.0 if self.is_new() else remaining(self.momentum, self.updates)

    @np.errstate(all="ignore")
    def scatter(self, batch_size: float) -> Array | None:
        """Return the standard deviation `[C]` of the batch mean, in σ; None without data."""
        if self.samples is None or self.population is None:
            return None
        scatter: Array = np.sqrt(self.samples.error_of_mean(batch_size) / (self.population.var + self.eps))
        return scatter


def remaining(momentum: float | None, updates: int | None) -> float:
    """Return the weight of the initial values after this number of updates; 0 if the updates are not counted."""
    if momentum is None or not updates:  # loaded from elsewhere, or not counted
        return 0.0
    return math.pow(1 - min(momentum, 1.0), updates)


def samples_needed(batch_size: float, noise: float) -> int:
    """Return the batch size that reduces the noise of the batch statistics at `batch_size` to `NOISE_AIM`."""
    return math.ceil(batch_size * (noise / NOISE_AIM) ** 2)


def median(values: Array) -> float:
    """Return the median over the channels; of an even number, the lower of the two values in the middle."""
    return float(np.quantile(values, 0.5, method="lower"))


def dead_channels(weight: Array) -> NDArray[np.bool_]:
    """Return which channels have a γ so near 0 that their output is nearly β alone."""
    dead: NDArray[np.bool_] = np.abs(weight) < DEAD
    return dead
