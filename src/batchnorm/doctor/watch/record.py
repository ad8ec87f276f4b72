"""What one look at a layer shows."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.doctor.measure.facts import DEAD
from batchnorm.doctor.measure.layers import Layer, Samples
from batchnorm.moments import Moments

# (mean/σ)² of a channel from which on its variance, a difference of float32 sums, is not taken.
_FAR = 1e5
# Samples by which they are seen to differ.
_ENOUGH = 32


@dataclass(frozen=True)
class Record:
    """One layer in one step; NaN is what could not be measured.

    Attributes:
        step: Number of the step of the optimizer, from 1.
        layer: Its path.
        mean_distance: Root mean square over the channels of (running mean − batch mean)/σ, less what sampling explains.
        log_ratio: Median over the channels of ln(batch variance / running variance): above 0 evaluation puts out
            more than training does.
        noise: Deviation of a normalized value of the median channel by the choice of the other samples of its batch,
            in σ; falls as one over the square root of the batch size.
        dead: Share of channels with |γ| < 0.001.
        updates: How often the running statistics moved in the step; None where the layer does not count them.
        batch_size: Samples in the first call of the step; None where no call was seen.
    """

    step: int
    layer: str
    mean_distance: float = math.nan
    log_ratio: float = math.nan
    noise: float = math.nan
    dead: float = math.nan
    updates: int | None = None
    batch_size: int | None = None


# What is drawn and logged of a record.
QUANTITIES = {
    "mean_distance": "distance of the means (σ)",
    "log_ratio": "ln(batch / running variance)",
    "noise": "noise of the batch (σ)",
    "dead": "share of dead channels",
    "updates": "updates in a step",
}


@dataclass
class Look:
    """What a layer is seen to do in one step.

    Attributes:
        forward: Calls in training.
        backward: Calls in training within a backward pass.
        batch: Rows c, Σu, Σu², Σv, Σv² `[5, C]` of the first call, with u a sample's mean over its positions less c, v
            its mean square deviation from c. That is the batch's mean, or the running one where the batch is so small
            that several have to be taken together.
        batch_size: Samples in that call.
        values: Values per channel in it.
    """

    forward: int = 0
    backward: int = 0
    batch: Tensor | None = None
    batch_size: int | None = None
    values: int = 0

    @torch.no_grad()
    def take(self, x: Tensor, running_mean: Tensor | None) -> None:
        """Take in a batch x `[N, C, *S]`; nothing of x is kept."""
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
                places = tuple(range(2, x.dim()))
                means = x.mean(places).to(wide)
                squares = torch.linalg.vector_norm(x, dim=places).to(wide).square() / positions
            together = self.batch_size < _ENOUGH and running_mean is not None
            centre = running_mean.to(x.device, wide) if together else means.mean(0)  # type: ignore[union-attr]
            u = means - centre
            v = u.square() if squares is None else u.square() + (squares - means.square()).clamp_min(0)
            self.batch = torch.stack([centre, u.sum(0), u.square().sum(0), v.sum(0), v.square().sum(0)])


class Pool:
    """The last batches of a layer, as many as it takes to tell how samples differ."""

    def __init__(self) -> None:
        self._batches: deque[tuple[int, Tensor]] = deque()

    def add(self, count: int, sums: Tensor) -> Samples:
        """Take in a batch's sums of u, u², v, v² `[4, C]`; returns those of the last batches."""
        self._batches.append((count, sums))
        while sum(n for n, _ in self._batches) - self._batches[0][0] >= _ENOUGH:
            self._batches.popleft()
        return Samples(sum(n for n, _ in self._batches), torch.stack([sums for _, sums in self._batches]).sum(0))


@dataclass(frozen=True)
class Held:
    """What a layer holds at one time, float64 on the CPU; None where it has no such vector `[C]`.

    Attributes:
        mean: Running mean.
        var: Running variance, unbiased.
        weight: γ.
        updates: Batches that it counts, of the domain that has most.
    """

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    updates: int | None

    @property
    def finite(self) -> bool:
        """Whether statistics and γ are, and no variance is negative."""
        vectors = [v for v in (self.mean, self.var, self.weight) if v is not None]
        return all(bool(v.isfinite().all()) for v in vectors) and not (
            self.var is not None and bool((self.var < 0).any())
        )


def fetched(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in float64 on the CPU, with one transfer from each other device."""
    found: dict[int, Tensor] = {}
    apart: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            found[number] = tensor.detach().to(torch.float64, copy=True)
        else:
            apart.setdefault(tensor.device, []).append(number)
    for device, numbers in apart.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        together = torch.cat([tensors[n].detach().to(wide).flatten() for n in numbers]).cpu().double()
        parts = together.split([tensors[n].numel() for n in numbers])
        found |= {n: part.reshape(tensors[n].shape) for n, part in zip(numbers, parts, strict=True)}
    return [found[number] for number in range(len(tensors))]


def noise_size(module: nn.Module, samples: int) -> float:
    """How many samples share their statistics in this layer."""
    ghost = getattr(module, "ghost_size", None)
    if isinstance(ghost, int):
        return float(min(samples, ghost))
    synchronized = getattr(module, "sync", False) or isinstance(module, nn.SyncBatchNorm)
    if synchronized and dist.is_available() and dist.is_initialized():
        return float(samples * dist.get_world_size(getattr(module, "process_group", None)))
    return float(samples)


def recorded(
    step: int, layer: Layer, look: Look, batch: Tensor | None, pool: Pool, before: Held, after: Held
) -> Record:
    """The record of a layer; fills the layer's `calls` and `samples` with what was measured of the batch.

    The batch's statistics come from the batch, where the call was seen. Within compiled code it is not, nor is it read
    through a mask: there they are (new − (1 − a)·old)/a of the running ones, if those moved once.
    """
    moved = None if before.updates is None or after.updates is None else after.updates - before.updates
    layer.calls, layer.samples = (), None
    noise = math.nan
    mean = var = None
    if batch is not None and look.batch_size:
        size = look.batch_size
        layer.samples = samples = pool.add(size, batch[1:])
        if samples.count >= _ENOUGH // 2:  # with samples' own mean taken from them
            shared = noise_size(layer.module, size) * (samples.count - 1) / samples.count
            noise = float(samples.noise(shared, layer.eps).median())
        u, v = batch[1] / size, batch[3] / size
        mean, var = batch[0] + u, (v - u.square()).clamp_min(0)
        if (look.values > size and bool((mean.square() > _FAR * (var + layer.eps)).any())) or look.values == 1:
            mean = var = None
        else:
            layer.calls = (Moments(torch.tensor(float(look.values)), mean, var * look.values),)
            var = var * (look.values / (look.values - 1))
    if mean is None and moved == 1:
        mean, var = _from_running(layer.module, before, after)
    distance = log_ratio = math.nan
    if mean is not None and var is not None and before.mean is not None and before.var is not None:
        distance, log_ratio = _distances(layer, look.batch_size, mean, var, before.mean, before.var)
    dead = math.nan if after.weight is None else float((after.weight.abs() < DEAD).double().mean())
    return Record(step, layer.path, distance, log_ratio, noise, dead, moved, look.batch_size)


def _from_running(module: nn.Module, before: Held, after: Held) -> tuple[Tensor | None, Tensor | None]:
    a = getattr(module, "momentum", None)
    if a is None and after.updates:
        a = 1 / after.updates
    if not a or before.mean is None or before.var is None or after.mean is None or after.var is None:
        return None, None
    if before.mean.shape != after.mean.shape:
        return None, None
    return (after.mean - (1 - a) * before.mean) / a, ((after.var - (1 - a) * before.var) / a).clamp_min(0)


def _distances(
    layer: Layer, size: int | None, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
) -> tuple[float, float]:
    if running_mean.shape != mean.shape:
        return math.nan, math.nan
    scale = var + layer.eps
    square = (running_mean - mean).square()
    if layer.samples is not None and layer.samples.count > 1 and size:
        a = getattr(layer.module, "momentum", None) or 0.0
        # Of the batch's mean, and of the running one, which is an average over the last 1/a batches.
        square = square - layer.samples.error_of_mean(size) * (1 + a / (2 - a))
    distance = math.sqrt(max(float((square / scale).mean()), 0.0))
    return distance, math.log(float((scale / (running_var + layer.eps).clamp_min(1e-30)).median()))
