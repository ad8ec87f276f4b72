"""What was measured of each layer, for charts and tables; and which layers no measure fits."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.doctor.finding import NotChecked
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe


@dataclass(frozen=True)
class LayerMeasures:
    """What the data showed of one layer, as plain values; None where it could not be measured.

    Attributes:
        path: Where it is.
        order: Which of the layers it is in the order in which they are called, from 0.
        shift: Root mean square over the channels of (running mean - mean)/σ, less what sampling explains; of channels
            that are constant σ is the running one.
        log_scale: Median over the channels of |ln(σ of running / σ)|.
        divergence: Mean over the channels of KL(population ‖ running) for normal distributions, in nats: how far what
            evaluation normalizes by is from what training does.
        noise: Deviation of a normalized value of the median channel by the choice of the other samples of its batch,
            in σ, at the batch size of the data; falls as one over its square root.
    """

    path: str
    order: int | None = None
    shift: float | None = None
    log_scale: float | None = None
    divergence: float | None = None
    noise: float | None = None


@dataclass(frozen=True, eq=False)
class Channels:
    """Each channel of a layer: float32 copies on the CPU, which stay as they were; None where there is none.

    Attributes:
        weight: γ.
        bias: β.
        running_mean: `[C]`, or `[K, C]` where the layer has several.
        running_var: The same.
        mean: Mean of all that the layer was given, `[C]`.
        var: Biased variance of it, `[C]`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def measures_of(probe: Probe) -> tuple[LayerMeasures, ...]:
    """Of every layer, in the model's order."""
    off = {found.layer: found for found in probe.off}
    noise = {} if "data" in probe.missing else probe.noise

    def measures(layer: Layer) -> LayerMeasures:
        order = None if layer.order == sys.maxsize else layer.order
        found = off.get(layer)
        return LayerMeasures(
            layer.path,
            order,
            None if found is None else found.shift,
            None if found is None else found.scale,
            None if found is None else found.divergence,
            noise.get(layer),
        )

    return tuple(measures(layer) for layer in probe.layers)


def channels_of(layer: Layer) -> Channels:
    """The channels of a layer."""
    population = layer.population
    of_module = (getattr(layer.module, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
    of_data = (None, None) if population is None else (population.mean, population.var)
    return Channels(*(_copy(vector) for vector in (*of_module, *of_data)))


def left_out(probe: Probe) -> list[NotChecked]:
    """The layers that were given data and that no population could be compared with, by reason."""
    if "data" in probe.missing:
        return []
    measured = {found.layer for found in probe.off}
    reasons: dict[str, list[str]] = {}
    for layer in probe.layers:
        if layer not in measured:
            reasons.setdefault(_reason(layer), []).append(layer.path)
    return [
        NotChecked(
            "BN102",
            "running statistics against the population",
            f"leaves out {counted(len(paths), 'layer')} ({listed(paths)}), as do BN103 and BN104: {reason}",
            tuple(paths),
        )
        for reason, paths in reasons.items()
    ]


def _reason(layer: Layer) -> str:
    kind = type(layer.module).__name__
    if layer.before is None:
        if getattr(layer.module, "running_whitening", None) is not None:
            return f"{kind} whitens, and has a matrix in place of variances"
        return f"{kind} keeps no running mean and variance here"
    if len(layer.before.mean) != 1:
        return f"{kind} keeps statistics of {len(layer.before.mean)} domains, each with a population of its own"
    if not layer.calls:
        return "these data did not reach it"
    if not bool((layer.before.mean + layer.before.var).isfinite().all()):
        return "the running statistics are not finite"
    if layer.population is None:
        return "what it was given is not finite, or a single value per channel"
    return "the first dimension of its input is not that of the samples"


@torch.no_grad()
def _copy(vector: object) -> Tensor | None:
    if not isinstance(vector, Tensor) or vector.numel() == 0:
        return None
    return vector.detach().to("cpu", torch.float32, copy=True)
