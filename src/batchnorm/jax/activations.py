"""The activations in `jax.numpy`, and their derivatives. At kinks, both equal those of the kernels and of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, nn


class Activation(NamedTuple):
    """`y = forward(z, parameter)` and `dy/dz = derivative(z, parameter)`.

    Attributes:
        forward: The function.
        derivative: Its derivative.
        parameter: The name of its keyword argument: "negative_slope", "alpha" or None.
    """

    forward: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]
    parameter: str | None = None


def _gate(z: Array) -> Array:
    """Return relu6(z + 3)/6."""
    return jnp.clip(z + 3.0, 0.0, 6.0) / 6.0


def _between(z: Array, low: float, high: float) -> Array:
    """Return 1 between the bounds, and 0 at and beyond them."""
    return jnp.where((z > low) & (z < high), jnp.ones_like(z), 0.0)


def _silu_derivative(z: Array, _: float) -> Array:
    sigmoid = nn.sigmoid(z)
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


def _gelu_cdf(z: Array) -> Array:
    return 0.5 * (1.0 + lax.erf(z * 0.5**0.5))


def _gelu_derivative(z: Array, _: float) -> Array:
    return _gelu_cdf(z) + z * (0.3989422804014327 * jnp.exp(-0.5 * z * z))


def _hardswish_derivative(z: Array, _: float) -> Array:
    return jnp.where(z <= -3.0, 0.0, jnp.where(z >= 3.0, 1.0, z / 3.0 + 0.5))


def _mish_terms(z: Array) -> tuple[Array, Array]:
    """Return e^z and w = e^z·(e^z + 2), with which mish is z·w/(w + 2). From z = 20 on, that factor is 1."""
    e = jnp.exp(jnp.minimum(z, 20.0))
    return e, e * (e + 2.0)


def _mish(z: Array, _: float) -> Array:
    w = _mish_terms(z)[1]
    return z * (w / (w + 2.0))


def _mish_derivative(z: Array, _: float) -> Array:
    e, w = _mish_terms(z)
    n = w + 2.0
    return w / n + jnp.minimum(z, 20.0) * (e / (e + 1.0)) * (4.0 * (w + 1.0) / (n * n))


def _sigmoid_derivative(z: Array, _: float) -> Array:
    y = nn.sigmoid(z)
    return y * (1.0 - y)


def _elu(z: Array, alpha: float) -> Array:
    return jnp.where(z > 0.0, z, alpha * jnp.expm1(jnp.minimum(z, 0.0)))


def _elu_derivative(z: Array, alpha: float) -> Array:
    return jnp.where(z > 0.0, 1.0, alpha * jnp.exp(jnp.minimum(z, 0.0)))


ACTIVATIONS = {
    "none": Activation(lambda z, _: z, lambda z, _: jnp.ones_like(z)),
    "relu": Activation(lambda z, _: jnp.where(z <= 0.0, 0.0, z), lambda z, _: jnp.where(z <= 0.0, 0.0, 1.0)),
    "relu6": Activation(lambda z, _: jnp.clip(z, 0.0, 6.0), lambda z, _: _between(z, 0.0, 6.0)),
    "leaky_relu": Activation(
        lambda z, slope: jnp.where(z > 0.0, z, z * slope),
        lambda z, slope: jnp.where(z > 0.0, 1.0, slope),
        "negative_slope",
    ),
    "silu": Activation(lambda z, _: z * nn.sigmoid(z), _silu_derivative),
    "gelu": Activation(lambda z, _: z * _gelu_cdf(z), _gelu_derivative),
    "hardswish": Activation(lambda z, _: z * _gate(z), _hardswish_derivative),
    "mish": Activation(_mish, _mish_derivative),
    "hardsigmoid": Activation(lambda z, _: _gate(z), lambda z, _: _between(z, -3.0, 3.0) / 6.0),
    "tanh": Activation(lambda z, _: jnp.tanh(z), lambda z, _: 1.0 - jnp.square(jnp.tanh(z))),
    "sigmoid": Activation(lambda z, _: nn.sigmoid(z), _sigmoid_derivative),
    "elu": Activation(_elu, _elu_derivative, "alpha"),
}


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def activate(z: Array, activation: str, parameter: float) -> Array:
    """Return f(z). Its derivative at kinks is that of the table."""
    return ACTIVATIONS[activation].forward(z, parameter)


@activate.defjvp
def _activate_jvp(
    activation: str, parameter: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (z,), (z_dot,) = primals, tangents
    return activate(z, activation, parameter), ACTIVATIONS[activation].derivative(z, parameter) * z_dot
