"""Activations and their derivatives."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.reference.layout import Array

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    return np.asarray(np.exp(np.minimum(z, 0)) / (1 + np.exp(-np.abs(z))))  # never overflows


def _tanh_of_softplus(z: Array) -> Array:
    return np.asarray(np.tanh(np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))))


def _normal_cdf(z: Array) -> Array:
    return np.asarray(0.5 * _erfc(-z / math.sqrt(2)))


# name: f(z) and f′(z). A second argument is the negative slope, or α of elu; the others ignore it. At a kink, f′ has
# the value that torch uses.
ACTIVATIONS = {
    "none": (lambda z, *_: z, lambda z, *_: np.ones_like(z)),
    "relu": (lambda z, *_: np.maximum(z, 0.0), lambda z, *_: np.where(z <= 0, 0.0, 1.0)),
    "relu6": (lambda z, *_: np.clip(z, 0.0, 6.0), lambda z, *_: np.where((z <= 0) | (z >= 6), 0.0, 1.0)),
    "leaky_relu": (lambda z, a=0.01: np.where(z > 0, z, a * z), lambda z, a=0.01: np.where(z > 0, 1.0, a)),
    "silu": (lambda z, *_: z * _sigmoid(z), lambda z, *_: _sigmoid(z) * (1 + z * _sigmoid(-z))),
    "gelu": (
        lambda z, *_: z * _normal_cdf(z),
        lambda z, *_: _normal_cdf(z) + z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi),
    ),
    "hardswish": (
        lambda z, *_: z * np.clip(z + 3, 0.0, 6.0) / 6,
        lambda z, *_: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, (2 * z + 3) / 6)),
    ),
    "mish": (
        lambda z, *_: z * _tanh_of_softplus(z),
        lambda z, *_: _tanh_of_softplus(z) + z * _sigmoid(z) * (1 - _tanh_of_softplus(z) ** 2),
    ),
    "hardsigmoid": (
        lambda z, *_: np.clip(z + 3, 0.0, 6.0) / 6,
        lambda z, *_: np.where(np.abs(z) < 3, 1 / 6, 0.0),
    ),
    # 1 − tanh², rewritten, because the subtraction has no correct digit if |z| > 19
    "tanh": (lambda z, *_: np.tanh(z), lambda z, *_: 4 * _sigmoid(2 * z) * _sigmoid(-2 * z)),
    "sigmoid": (lambda z, *_: _sigmoid(z), lambda z, *_: _sigmoid(z) * _sigmoid(-z)),
    "elu": (
        lambda z, a=0.01: np.where(z > 0, z, a * np.expm1(np.minimum(z, 0))),
        lambda z, a=0.01: np.where(z > 0, 1.0, a * np.exp(np.minimum(z, 0))),
    ),
}
