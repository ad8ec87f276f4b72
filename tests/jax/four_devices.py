"""Checks on four host devices, which `test_devices.py` runs in a process of its own: its environment has the number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from batchnorm.jax import batch_norm, kernels

jax.config.update("jax_enable_x64", True)

MESH = Mesh(np.array(jax.devices()), ("d",))
OPTIONS: dict[str, Any] = {"activation": "silu", "eps": 1e-3}


def array(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


X, WEIGHT, BIAS, DIRECTION = array(8, 3, 2), array(2, seed=1), array(2, seed=2), array(8, 3, 2, seed=3)
MASK = jnp.asarray(np.random.default_rng(4).random((8, 3)) > 0.3).at[:2].set(False)  # nothing counts on one device


def whole(x: Any, weight: Any, bias: Any, mask: Any = None) -> Any:
    return batch_norm(x, weight, bias, mask=mask, **OPTIONS)


def local(x: Any, weight: Any, bias: Any, mask: Any = None) -> Any:
    return batch_norm(x, weight, bias, mask=mask, axis_name="d", **OPTIONS)


def mapped(x: Any, weight: Any, bias: Any, mask: Any = None) -> Any:
    """Normalize over the devices, each of which has two samples."""
    specs = (P("d"), P(), P()) if mask is None else (P("d"), P(), P(), P("d"))
    values = (x, weight, bias) if mask is None else (x, weight, bias, mask)
    return jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=(P("d"), P(), P()))(*values)


def loss(function: Callable[..., Any], *values: Any) -> Any:
    y, mean, var = function(*values)
    return jnp.sum(jnp.sin(y) * DIRECTION) + jnp.sum(mean**3) + jnp.sum(jnp.sqrt(var + 1.0))


def close(found: Any, expected: Any) -> None:
    jax.tree.map(partial(assert_allclose, rtol=1e-9, atol=1e-10), found, expected)


def same(transform: Callable[[Callable[..., Any]], Any]) -> None:
    """Compare what `transform` makes of the devices' function with what it makes of one device's."""
    close(*(jax.jit(transform(function))(X, WEIGHT, BIAS) for function in (mapped, whole)))


def check_forward_is_that_of_one_device() -> None:
    same(lambda f: f)


def check_reverse_mode_is_that_of_one_device() -> None:
    same(lambda f: jax.grad(partial(loss, f), (0, 1, 2)))


def check_forward_mode_is_that_of_one_device() -> None:
    same(lambda f: lambda *v: jax.jvp(f, v, (DIRECTION, BIAS, WEIGHT))[1])


def check_second_derivative_is_that_of_one_device() -> None:
    same(lambda f: lambda *v: jax.jvp(jax.grad(partial(loss, f), (0, 1, 2)), v, (DIRECTION, BIAS, WEIGHT))[1])


def check_mask_is_that_of_one_device() -> None:
    for function in (lambda f: f, lambda f: jax.grad(partial(loss, f), (0, 1, 2))):
        close(*(jax.jit(function(f))(X, WEIGHT, BIAS, MASK) for f in (mapped, whole)))


def shared(x: Any) -> Any:
    """y, mean and var of x over the devices."""
    function = jax.shard_map(
        lambda x: batch_norm(x, axis_name="d"), mesh=MESH, in_specs=(P("d"),), out_specs=(P("d"), P(), P())
    )
    return jax.jit(function)(x)


def check_large_means_lose_no_digits(apart: float = 0.0) -> None:
    shift = 1e6 if apart == 0.0 else np.repeat(np.arange(4.0), 2).reshape(8, 1, 1) * apart
    x = jnp.asarray(np.asarray(array(8, 64, 2)) + shift, jnp.float32)
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1)), exact.var((0, 1))
    for found, expected, error in zip(
        shared(x),
        ((exact - mean) / np.sqrt(var + 1e-5), mean, var),
        (1e-6, 1e-7 * mean.max(), 1e-6 * var.max()),
        strict=True,
    ):
        assert_allclose(found, expected, rtol=0, atol=error)


def check_means_far_apart_lose_no_digits() -> None:
    check_large_means_lose_no_digits(apart=1e4)


def check_pmap_and_vmap_share_statistics() -> None:
    x, direction = X.reshape(4, 2, 3, 2), DIRECTION.reshape(4, 2, 3, 2)
    expected = whole(X, WEIGHT, BIAS)
    (gradient,) = jax.vjp(lambda x: whole(x, WEIGHT, BIAS)[0], X)[1](DIRECTION)
    for transform in (jax.pmap, jax.vmap):
        y, mean, _ = transform(local, axis_name="d", in_axes=(0, None, None))(x, WEIGHT, BIAS)
        close((y.reshape(X.shape), mean[3]), expected[:2])

        def pulled(x: Any, dy: Any) -> Any:
            return jax.vjp(lambda x: local(x, WEIGHT, BIAS)[0], x)[1](dy)[0]

        close(transform(pulled, axis_name="d")(x, direction).reshape(X.shape), gradient)


def check_groups_of_devices_have_their_own_statistics() -> None:
    from batchnorm.jax.function import train

    def one(x: Any) -> Any:
        groups = [[0, 1], [2, 3]]
        return train("test", x, None, None, None, axis=-1, eps=1e-3, activation="none", axis_name="d",
                     axis_index_groups=groups)[0]  # fmt: skip

    y = jax.pmap(one, axis_name="d")(X.reshape(4, 2, 3, 2)).reshape(X.shape)
    close(y, jnp.concatenate([batch_norm(half, eps=1e-3)[0] for half in jnp.split(X, 2)]))


def check_sharded_arrays_under_jit_are_not_gathered() -> None:
    x = jax.device_put(X, NamedSharding(MESH, P("d")))
    for function in (whole, jax.grad(partial(loss, whole), (0, 1, 2))):
        compiled = jax.jit(function).lower(x, WEIGHT, BIAS).compile()
        text = compiled.as_text()
        assert "all-gather" not in text and "all-reduce" in text
        close(compiled(x, WEIGHT, BIAS), jax.jit(function)(X, WEIGHT, BIAS))
    assert jax.jit(whole)(x, WEIGHT, BIAS)[0].sharding.is_equivalent_to(x.sharding, 3)


def check_each_device_runs_the_kernels_within_shard_map() -> None:
    text = jax.jit(mapped).lower(X, WEIGHT, BIAS).as_text()
    assert ("batchnorm_xla_moments" in text) == kernels.REGISTERED


def check_one_value_per_device_is_allowed_but_not_one_in_all() -> None:
    close(jax.pmap(local, axis_name="d", in_axes=(0, None, None))(X[:4, :1], WEIGHT, BIAS)[1][0], X[:4, 0].mean(0))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        jax.vmap(local, axis_name="d", in_axes=(0, None, None))(X[:1, :1], WEIGHT, BIAS)


if __name__ == "__main__":
    failed = 0
    for name, check in [item for item in globals().items() if item[0].startswith("check_")]:
        try:
            check()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}")
    sys.exit(failed > 0)
