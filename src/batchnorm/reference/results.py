"""The results of the passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from batchnorm.reference.layout import Array, Layout
from batchnorm.reference.statistics import Moments


@dataclass(frozen=True)
class Forward:
    """All intermediate values of a forward pass, in the order of computation, and what backward needs.

    Attributes:
        mean: μ, `[C]` or `[K, C]`.
        var: σ², like `mean`; in training, the biased one.
        x_centered: x − μ, like x.
        invstd: 1/√(σ² + ε), like `mean`.
        x_hat: x̂ = (x − μ)·invstd, like x.
        z: γ·x̂ + β + residual, like x.
        y: f(z), like x: the output.
        weight: γ, `[C]` or `[K, C]`.
        slope: f′(z), like x.
        layout: The axes of channels and samples.
        share: The weight of each value in its statistics: 1/m, or w/V₁; 0 for given statistics, as at inference.
        batch: The batch's moments; None for given statistics.
    """

    mean: Array
    var: Array
    x_centered: Array
    invstd: Array
    x_hat: Array
    z: Array
    y: Array
    weight: Array
    slope: Array
    layout: Layout
    share: Array
    batch: Moments | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of a scalar loss, with intermediate values.

    Attributes:
        dz: dy·f′(z), like x; also the gradient of the residual.
        dweight: dγ = Σ dz·x̂, like γ.
        dbias: dβ = Σ dz, like γ.
        dx_hat: dz·γ, like x.
        dx: The gradient of x.
    """

    dz: Array
    dweight: Array
    dbias: Array
    dx_hat: Array
    dx: Array


@dataclass(frozen=True)
class GradientsByParts(Gradients):
    """`Gradients` and the gradients of the statistics: dvar (dσ²) and dmean (dμ), `[C]` or `[K, C]`."""

    dvar: Array
    dmean: Array


class DoubleGradients(NamedTuple):
    """Gradients of Σ v·dx + Σ v_γ·dγ + Σ v_β·dβ: dz and dx like x, dweight like γ. The gradient of β is 0."""

    dz: Array
    dx: Array
    dweight: Array
