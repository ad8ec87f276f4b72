"""What is known of each layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.models.neighbours import BatchNormCall
from batchnorm.models.observe import Statistics, running_statistics
from batchnorm.moments import Moments
from batchnorm.nn.frozen import FrozenLayer
from batchnorm.walk import Found, norm_layers, restored

# Of a layer's channels, those whose values are kept for every sample.
KEPT_CHANNELS = 32


@dataclass
class Samples:
    """What a layer is given in evaluation, sample by sample, over the batches.

    u is a sample's mean over its positions less the running mean, v its mean square deviation from the running mean.
    """

    count: int = 0
    sums: Tensor | None = None  # [4, C]: of u, u², v, v²
    kept: list[Tensor] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)

    def add(self, u: Tensor, v: Tensor, batch: int) -> None:
        """Take in the samples of a batch, u and v `[N, C]`."""
        u, v = u.cpu(), v.cpu()
        sums = torch.stack([u.sum(0), u.square().sum(0), v.sum(0), v.square().sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(u)
        every = torch.linspace(0, u.shape[1] - 1, min(KEPT_CHANNELS, u.shape[1])).long()
        self.kept.append(u[:, every].float())
        self.batch += [batch] * len(u)

    def noise(self, batch_size: float, eps: float) -> Tensor:
        """Deviation `[C]` of a normalized value by the choice of the other samples of its batch.

        √((Var(u)/σ² + Var(v)/(4σ⁴))/N), with σ² including ε: the batch's mean moves it, and the batch's deviation
        scales it. From the spread of whole samples, so that correlated positions count as what they are.

        Source: the mathematics page, "Measures", for independent values.
        """
        if self.sums is None or self.count < 2:
            return torch.full((1,), math.nan)
        u, uu, v, vv = self.sums / self.count
        var_u, var_v = (uu - u * u).clamp_min(0), (vv - v * v).clamp_min(0)
        var = (v - u * u).clamp_min(0) + eps
        return ((var_u / var + var_v / (4 * var * var)) / batch_size).sqrt()

    def error_of_mean(self, number: float) -> Tensor:
        """Variance `[C]` of a mean over so many samples."""
        assert self.sums is not None
        u, uu, _, _ = self.sums / self.count
        return (uu - u * u).clamp_min(0) / number

    def error_of_var(self, number: float) -> Tensor:
        """Variance `[C]` of a variance over so many samples."""
        assert self.sums is not None
        _, _, v, vv = self.sums / self.count
        return (vv - v * v).clamp_min(0) / number


@dataclass(frozen=True)
class Precision:
    """How exactly a layer's input can be normalized, from the first batch.

    Attributes:
        ratio: The largest |mean| over √(variance + ε) of a channel.
        channel: Which.
        dtype: Of the input.
        given: Error by the rounding of the input itself, in standard deviations: nothing after it repairs that.
        computed: Error of torch's batch normalization on this input against float64, the same.
    """

    ratio: float
    channel: int
    dtype: torch.dtype
    given: float
    computed: float

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(self.given, self.computed)


@dataclass(eq=False)
class Layer:
    """One layer of batch normalization; what needs data is None without.

    Attributes:
        found: The module and its places.
        before: Its running statistics, float64 `[K, C]`; None where it has none that can be measured.
        moves: Whether training moves them.
        by_batch: Whether training normalizes by the batch.
        place: Where it stands, traced.
        order: Which of the layers it is in the order in which they are called; a large number where it is not called.
        calls: What it was given in each call of a forward pass, normalized before it as in training.
        first: What it was given in the first call with the first batch.
        one_value: In how many batches it was given a single value per channel.
        moved_in_evaluation: Whether its running statistics moved there.
        samples: What it was given in evaluation.
        precision: How exactly that can be normalized.
        largest: The largest |x| that it was given, in the dtype of x; NaN where one was.
    """

    found: Found
    before: Statistics | None
    moves: bool
    by_batch: bool
    place: BatchNormCall | None = None
    order: int = sys.maxsize
    calls: tuple[Moments, ...] = ()
    first: Moments | None = None
    one_value: int = 0
    moved_in_evaluation: bool = False
    samples: Samples | None = None
    precision: Precision | None = None
    largest: Tensor | None = None

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.found.path

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.found.module

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(getattr(self.module, "eps", 0.0))

    @property
    def updates(self) -> int | None:
        """How many batches its running statistics have seen, of all domains together, where it counts them."""
        tracked = getattr(self.module, "num_batches_tracked", None)
        return None if tracked is None else int(tracked.sum())

    @property
    def affine(self) -> list[nn.Parameter]:
        """γ and β, as far as it has them."""
        return list(self.module.parameters(recurse=False))

    @property
    def population(self) -> Moments | None:
        """Of all it was given, all calls together; None without data, or where it is not finite."""
        if not self.calls or self.before is None:
            return None
        pooled = self.calls[0].merge(*self.calls[1:])
        # One value has no variance, and with masks there may be none at all.
        return pooled if pooled.count > 1 and bool((pooled.mean + pooled.m2).isfinite().all()) else None

    def is_new(self) -> bool:
        """Whether the running statistics are those of a new layer."""
        return self.before is not None and bool((self.before.mean == 0).all() and (self.before.var == 1).all())


@dataclass(frozen=True)
class Off:
    """How far a layer's running statistics are from the population.

    Attributes:
        layer: The layer.
        shift: Root mean square over the channels of (running mean - mean)/σ, less what sampling explains; of channels
            that are constant σ is the running one.
        scale: Median over the channels of |ln(σ of running / σ)|.
        divergence: Mean over the channels of KL(population ‖ running) for normal distributions, in nats.
        uneven: Median over the channels of how far ln(σ of running / σ) is from its own median; infinite for fewer than
            eight channels, which can be alike by chance.
    """

    layer: Layer
    shift: float
    scale: float
    divergence: float
    uneven: float

    @property
    def matters(self) -> bool:
        """Whether it is more than a healthy running average is off."""
        return self.shift > 0.25 or self.scale > 0.2

    def __str__(self) -> str:
        return (
            f"{self.layer.path or '(model)'}: running mean off by {self.shift:.2g}σ, running σ by a factor of "
            f"{math.exp(self.scale):.2f}, divergence {self.divergence:.2g} nats"
        )


def off(layer: Layer, samples: int, batch_size: float) -> Off | None:
    """Compare running statistics and population; None where one of them is missing."""
    population = layer.population
    if population is None or layer.before is None or len(layer.before.mean) != 1 or layer.samples is None:
        return None
    mean, var = population.mean, population.var + layer.eps
    running_mean, running_var = layer.before.mean[0], layer.before.var[0] + layer.eps
    if not bool((running_mean + running_var).isfinite().all()):
        return None
    # Of a channel that is constant σ would be √ε alone, in which nothing is near.
    varies = torch.where(population.m2 > 0, var, running_var)
    square = (running_mean - mean).square() / varies
    # The average over the last 1/a batches and the measured mean scatter by themselves.
    momentum = getattr(layer.module, "momentum", None)
    a = 0.0 if momentum is None else min(float(momentum), 1.0)
    by_chance = layer.samples.error_of_mean(samples) + layer.samples.error_of_mean(batch_size) * a / (2 - a)
    shift = float((square - by_chance / varies).mean().clamp_min(0).sqrt())
    ratio = (var / running_var.clamp_min(1e-30)).log()
    divergence = 0.5 * (ratio.exp() + (running_mean - mean).square() / running_var.clamp_min(1e-30) - 1 - ratio)
    uneven = (ratio - ratio.median()).abs().median() / 2 if len(ratio) >= 8 else math.inf
    return Off(layer, shift, float(ratio.abs().median() / 2), float(divergence.mean()), float(uneven))


def layers_of(model: nn.Module) -> list[Layer]:
    """Every layer of batch normalization, and what training would do with it.

    A model in training is taken as it is; one in evaluation as its `train()` makes it, which many models override to
    keep layers frozen.
    """
    found = norm_layers(model)
    with restored(model):
        if not model.training:
            model.train()
        return [_layer(f) for f in found]


def _layer(found: Found) -> Layer:
    module = found.module
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    known = isinstance(mean, Tensor) and isinstance(var, Tensor) and not is_lazy(mean)
    moves = (
        module.training
        and mean is not None
        and bool(getattr(module, "track_running_stats", True))
        and bool(getattr(module, "update_running_stats", True))
        and getattr(module, "momentum", None) != 0
        and not isinstance(module, FrozenLayer)
    )
    by_batch = module.training and not isinstance(module, FrozenLayer)
    before = Statistics(*(statistic.cpu() for statistic in running_statistics(module))) if known else None
    return Layer(found, before, moves, by_batch)


def counted(number: int, one: str, several: str = "") -> str:
    """How many, as words: `1 layer`, `2 layers`; with the verb where `several` is given, as `layer moves`."""
    return f"{number} {one if number == 1 else several or one + ('es' if one.endswith('ch') else 's')}"


def listed(paths: Iterable[str], most: int = 4) -> str:
    """Some of the paths, and how many more."""
    every = [path or "(model)" for path in paths]
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest
