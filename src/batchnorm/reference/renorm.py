"""Batch renormalization, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from batchnorm.reference.layout import Array, require, shaped
from batchnorm.reference.passes import backward, forward_training
from batchnorm.reference.results import Forward


def forward_renorm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    rmax: float,
    dmax: float,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    **options: Any,
) -> RenormForward:
    """Return y and its intermediates.

        r = clip(σ_B/σ, 1/rmax, rmax)    d = clip((μ_B − μ)/σ, −dmax, dmax)
        x̂ = (x − μ_B)/σ_B·r + d          y = γ·x̂ + β

    with σ_B = √(var_B + ε), σ = √(running_var + ε), and the running statistics from before this batch.
    Source: Ioffe 2017, Algorithm 1. Section 5.

    Args:
        x: `[N, C, *S]`.
        weight: γ, `[C]`. Default 1.
        bias: β, `[C]`. Default 0.
        running_mean: μ, `[C]`.
        running_var: `[C]`; σ² is running_var + ε.
        rmax: >= 1.
        dmax: >= 0.
        eps: ε, > 0.
        weights: `[N, *S]`, the weight of each value in the batch's statistics.
        **options: As in `forward_training`.
    """
    require(rmax >= 1 and dmax >= 0, "rmax must be >= 1 and dmax >= 0", [rmax, dmax], "(1, 0) is batch normalization.")
    plain = forward_training(x, eps=eps, weights=weights, **options)
    sigma = np.sqrt(shaped("running_var", running_var, plain.mean.shape) + eps)
    r = np.clip(1 / plain.invstd / sigma, 1 / rmax, rmax)
    d = np.clip((plain.mean - shaped("running_mean", running_mean, plain.mean.shape)) / sigma, -dmax, dmax)
    gamma = shaped("weight", np.ones_like(r) if weight is None else weight, r.shape)
    beta = shaped("bias", np.zeros_like(r) if bias is None else bias, r.shape)
    forward = forward_training(x, gamma * r, gamma * d + beta, eps=eps, weights=weights, **options)
    spread = forward.layout.spread
    return RenormForward(forward, gamma, r, d, forward.x_hat * spread(r) + spread(d), forward.y)


def backward_renorm(dy: ArrayLike, renorm: RenormForward) -> RenormGradients:
    """Return the gradients, with r and d as constants.

        dx = γ·r/σ_B·(dy − Σ dy/m − x̂_B·Σ(dy·x̂_B)/m)
        dγ = r·Σ(dy·x̂_B) + d·Σ dy    dβ = Σ dy

    with x̂_B = (x − μ_B)/σ_B. Source: Ioffe 2017, section 3. Section 5.

    Args:
        dy: Gradient of y, like x.
        renorm: The forward pass.
    """
    gradients = backward(dy, renorm.forward)
    dweight = renorm.r * gradients.dweight + renorm.d * gradients.dbias
    return RenormGradients(gradients.dx, dweight, gradients.dbias)


@dataclass(frozen=True)
class RenormForward:
    """All intermediate values of a forward pass, and the data for backward.

    Attributes:
        forward: The equivalent pass of batch normalization, with γ·r and γ·d + β as γ and β.
        weight: γ, `[C]`.
        r: σ_B/σ, clipped, `[C]`.
        d: (μ_B − μ)/σ, clipped, `[C]`.
        x_hat: (x − μ_B)/σ_B·r + d, like x.
        y: γ·x̂ + β, like x: the output.
    """

    forward: Forward
    weight: Array
    r: Array
    d: Array
    x_hat: Array
    y: Array


@dataclass(frozen=True)
class RenormGradients:
    """Gradients of a scalar loss: dx like x, dweight (dγ) and dbias (dβ) `[C]`."""

    dx: Array
    dweight: Array
    dbias: Array
