"""`batchnorm.jax.batch_norm` under JAX's transformations, in float64 against plain `jax.numpy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

jax = pytest.importorskip("jax")
jnp = jax.numpy

from jax import lax  # noqa: E402

from batchnorm.jax import batch_norm, normalize  # noqa: E402

EPS = 1e-3
pytestmark = pytest.mark.usefixtures("unoptimized_by_xla")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def array(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def arguments() -> tuple[Any, ...]:
    """x, weight, bias and residual."""
    return array(4, 3, 2), array(2, seed=1), array(2, seed=2), array(4, 3, 2, seed=3)


def ours(x: Any, weight: Any, bias: Any, residual: Any, *, mask: Any = None) -> Any:
    return batch_norm(x, weight, bias, residual, eps=EPS, activation="silu", mask=mask)


def plain(x: Any, weight: Any, bias: Any, residual: Any, *, mask: Any = None) -> Any:
    """The definition, differentiated by JAX."""
    w = jnp.ones(x.shape[:-1])[..., None] if mask is None else mask[..., None].astype(x.dtype)
    mean = jnp.sum(w * x, (0, 1)) / jnp.sum(w)
    var = jnp.sum(w * (x - mean) ** 2, (0, 1)) / jnp.sum(w)
    return jax.nn.silu((x - mean) / jnp.sqrt(var + EPS) * weight + bias + residual), mean, var


def loss(function: Callable[..., Any], *values: Any) -> Any:
    """A scalar that depends on all three results in a nonlinear way."""
    y, mean, var = function(*values)
    return jnp.sum(jnp.sin(y) * array(*y.shape, seed=5)) + jnp.sum(mean**3) + jnp.sum(jnp.sqrt(var + 1.0))


def grad(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(partial(loss, function), (0, 1, 2, 3))


def check(transform: Callable[..., Any], *values: Any, **options: Any) -> None:
    """Compare `transform(function, *values)` for our function and for the definition, compiled as a whole."""
    found, expected = (jax.jit(partial(transform, partial(function, **options)))(*values) for function in (ours, plain))
    jax.tree.map(partial(assert_allclose, rtol=1e-9, atol=1e-10), found, expected)


MASKS = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def mask_of(masked: bool) -> Any:
    return jnp.asarray(np.random.default_rng(4).random((4, 3)) > 0.3) if masked else None


def directions() -> tuple[Any, ...]:
    """A direction for each argument."""
    return array(4, 3, 2, seed=6), array(2, seed=7), array(2, seed=8), array(4, 3, 2, seed=9)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "forward": lambda f, *v: f(*v),
    "grad": lambda f, *v: grad(f)(*v),
    "jvp": lambda f, *v: jax.jvp(f, v, directions()),
    "jacfwd": lambda f, *v: jax.jacfwd(f, (0, 1))(*v),
    "jacrev": lambda f, *v: jax.jacrev(f, (0, 1))(*v),
    "hessian": lambda f, *v: jax.hessian(partial(loss, f), (0, 1))(*v),
    "reverse over reverse": lambda f, *v: jax.grad(
        lambda *values: sum(jnp.sum(g * d) for g, d in zip(grad(f)(*values), directions(), strict=True)), (0, 1, 2, 3)
    )(*v),
    "linearize": lambda f, *v: jax.linearize(f, *v)[1](*directions()),
}


@MASKS
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_are_those_of_the_definition(name: str, masked: bool) -> None:
    check(TRANSFORMS[name], *arguments(), mask=mask_of(masked))


def test_derivatives_without_jit_are_the_same() -> None:
    found, expected = grad(ours)(*arguments()), jax.jit(grad(ours))(*arguments())
    jax.tree.map(partial(assert_allclose, rtol=1e-12, atol=1e-13), found, expected)


def test_the_third_derivative_is_that_of_the_definition() -> None:
    def third(function: Callable[..., Any], x: Any, *others: Any) -> Any:
        return jax.grad(jax.grad(jax.grad(lambda t: loss(function, x + t * directions()[0], *others))))(0.3)

    check(third, *arguments())


@MASKS
@pytest.mark.parametrize("axes", [(0, None, None, 0), (1, 0, None, 2)], ids=str)
def test_vmap_normalizes_each_example_by_itself(axes: tuple[int | None, ...], masked: bool) -> None:
    examples = [jnp.stack([a, 2 * a + 1, -a]) for a in arguments()]
    values = [a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(examples, axes, strict=True)]

    def transform(function: Callable[..., Any], *v: Any) -> Any:
        def total(*v: Any) -> Any:
            return jax.tree.map(lambda a: a.sum(0), jax.vmap(function, axes)(*v))

        return jax.vmap(function, axes)(*v), jax.vmap(grad(function), axes)(*v), grad(total)(*v)

    check(transform, *values, mask=mask_of(masked))


@pytest.mark.parametrize("policy", ["everything_saveable", "nothing_saveable", "dots_saveable"])
def test_policies_of_checkpointing_compute_the_same_gradients(policy: str) -> None:
    chosen = getattr(jax.checkpoint_policies, policy)
    check(lambda f, *v: grad(jax.checkpoint(f, policy=chosen))(*v), *arguments())


def test_scan_carries_statistics() -> None:
    def transform(function: Callable[..., Any], weight: Any) -> Any:
        def total(weight: Any) -> Any:
            def layer(carry: Any, x: Any) -> Any:
                y, mean, _ = function(x + carry, weight, weight, x)
                return mean, y

            carry, y = lax.scan(layer, jnp.zeros(2), array(5, 4, 3, 2))
            return jnp.sum(carry) + jnp.sum(jnp.sin(y))

        return jax.value_and_grad(total)(weight)

    check(transform, array(2, seed=1))


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_buffers_give_the_same_results() -> None:
    donated = jax.jit(ours, donate_argnums=(0, 3))(*(jnp.array(a, copy=True) for a in arguments()))
    jax.tree.map(assert_allclose, donated, jax.jit(ours)(*arguments()))


def test_inference_can_be_exported_and_loaded() -> None:
    from jax import export

    def infer(x: Any, mean: Any, var: Any) -> Any:
        return normalize(x, mean, var, activation="gelu")

    values = array(4, 3, 2), array(2, seed=1), array(2, seed=2) ** 2
    exported = export.export(jax.jit(infer), platforms=["cpu", "cuda", "tpu"])(*values)
    loaded = export.deserialize(exported.serialize())
    assert_allclose(loaded.call(*values), infer(*values), rtol=1e-14)


def test_training_can_be_exported_for_other_devices() -> None:
    from jax import export

    def train(x: Any) -> Any:
        return jax.value_and_grad(lambda x: jnp.sum(batch_norm(x)[0] ** 2))(x)

    exported = export.export(jax.jit(train), platforms=["cuda", "tpu"])(array(4, 3))
    assert "batchnorm_xla" not in exported.mlir_module()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "hardsigmoid", "leaky_relu", "elu"])
def test_derivatives_at_kinks_are_those_of_the_kernels(activation: str, dtype: str) -> None:
    x = jnp.asarray([[-3.0], [0.0], [3.0], [6.0]], dtype)
    zero, one = jnp.zeros(1), jnp.ones(1)
    _, pull = jax.vjp(lambda x: normalize(x, zero, one - 1e-5, activation=activation), x)
    from batchnorm.reference.passes import ACTIVATIONS

    expected = ACTIVATIONS[activation][1](np.asarray(x, np.float64), 0.01 if activation == "leaky_relu" else 1.0)
    assert_allclose(pull(jnp.ones_like(x))[0].astype("float64"), expected, rtol=2e-2 if dtype == "bfloat16" else 1e-6)


def test_second_derivatives_of_large_values_are_right_in_float32() -> None:
    x, t = (array(16, 3, seed=seed).astype(jnp.float32) for seed in (1, 2))

    def second(scale: float) -> Any:  # the derivative along x, of degree -1 in x
        gradient = jax.grad(lambda x: (batch_norm(x)[0] * t).sum())
        return jax.jvp(gradient, (x * scale,), (x * scale,))[1] * scale

    assert_allclose(second(1e16), second(1e3), rtol=0, atol=1e-4)
