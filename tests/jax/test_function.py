"""`batchnorm.jax.batch_norm` and `normalize` against the float64 reference, and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.compiled import xla_kernels
from tests.tolerance import Terms, bound

jax = pytest.importorskip("jax")
jnp = jax.numpy

from batchnorm.jax import batch_norm, kernels  # noqa: E402
from batchnorm.jax.activations import ACTIVATIONS  # noqa: E402

EPS, PARAMETER = 1e-5, 0.2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Problem:
    """Random arrays, and what the reference computes from them."""

    def __init__(
        self,
        shape: tuple[int, ...] = (6, 4, 5, 3),
        axis: int = -1,
        dtype: str = "float32",
        activation: str = "none",
        residual: bool = False,
        mask: Any = None,
        offset: float = 0.0,
    ) -> None:
        rng = np.random.default_rng(0)
        channels = shape[axis]
        self.options = {"axis": axis, "eps": EPS, "activation": activation}
        self.dtype, self.mask = dtype, mask
        x = rng.normal(size=shape) + offset
        dy = rng.normal(size=shape)
        r = rng.normal(size=shape) if residual else None
        self.x, self.dy, self.residual = (None if a is None else jnp.asarray(a, dtype) for a in (x, dy, r))
        wide = "float64" if dtype == "float64" else "float32"
        self.weight = jnp.asarray(rng.uniform(-1.5, 1.5, channels), wide)
        self.bias = jnp.asarray(rng.uniform(-1, 1, channels), wide)

        def exact(a: Any) -> Any:
            return None if a is None else np.asarray(a, np.float64)

        self.forward = reference.forward_training(
            exact(self.x), exact(self.weight), exact(self.bias), residual=exact(self.residual),
            weights=exact(mask), negative_slope=PARAMETER, **self.options,
        )  # fmt: skip
        self.gradients = reference.backward(exact(self.dy), self.forward)
        self.terms = Terms(self.forward, exact(self.residual), exact(self.bias))

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.bias, self.residual

    def run(self, *arguments: Any) -> Any:
        return batch_norm(*arguments, mask=self.mask, negative_slope=PARAMETER, alpha=PARAMETER, **self.options)

    def check(self) -> None:
        """Compare y, mean, var and every gradient."""

        @jax.jit
        def step(dy: Any, *arguments: Any) -> Any:
            out, pull = jax.vjp(self.run, *arguments)
            return out, pull((dy, *map(jnp.zeros_like, out[1:])))

        (y, mean, var), (dx, dweight, dbias, dresidual) = step(self.dy, *self.arguments())
        assert y.dtype == self.dtype and y.shape == self.x.shape
        self._close("y", y, self.forward.y, self.terms.z)
        self._close("mean", mean, self.forward.mean, np.abs(self.forward.mean) + self.terms.deviation(), False)
        self._close("var", var, self.forward.var, self.forward.var, False)
        dy = np.asarray(self.dy, np.float64)
        dz = self.terms.dz(dy, smooth=self.options["activation"] not in ("none", "relu", "relu6", "leaky_relu"))
        sum_dz, sum_dz_xhat = self.terms.sums(dz, self.forward.mean)
        self._close("dx", dx, self.gradients.dx, self.terms.dx(dz))
        self._close("dweight", dweight, self.gradients.dweight, sum_dz_xhat, False)
        self._close("dbias", dbias, self.gradients.dbias, sum_dz, False)
        if self.residual is not None:
            self._close("dresidual", dresidual, self.gradients.dz, dz)

    def _close(self, what: str, got: Any, expected: Any, terms: Any, rounded: bool = True) -> None:
        allowed = bound(terms, DTYPES[self.dtype], expected if rounded else None)
        excess = np.abs(np.asarray(got, np.float64) - expected) - allowed
        assert not np.isnan(excess).any() and excess.max(initial=0.0) <= 0.0, f"{what}: off by {excess.max()} too much"


@pytest.fixture(params=["kernels", "composition"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test with the kernels, and with the composition."""
    if request.param == "composition":
        monkeypatch.setattr(kernels, "REGISTERED", False)
        jax.clear_caches()
    yield
    if request.param == "composition":
        jax.clear_caches()


@pytest.mark.skipif(bool(xla_kernels().reason), reason=xla_kernels().reason)
def test_the_kernels_are_called() -> None:
    text = jax.jit(lambda x: batch_norm(x)[0]).lower(jnp.ones((4, 3))).as_text()
    assert "batchnorm_xla_train_forward" in text


@pytest.mark.parametrize(("shape", "axis"), [((6, 3), -1), ((4, 5, 6, 3), 1), ((2, 3, 4, 5), 0), ((3, 2, 2, 3, 4), 2)])
def test_every_axis_matches_the_reference(shape: tuple[int, ...], axis: int, implementation: None) -> None:
    Problem(shape, axis, residual=True, activation="relu").check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_matches_the_reference(activation: str, implementation: None) -> None:
    Problem(activation=activation).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_matches_the_reference(dtype: str, implementation: None) -> None:
    with jax.enable_x64(dtype == "float64"):
        Problem(dtype=dtype, activation="silu", residual=True).check()


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("axis", [1, 3])
def test_a_large_mean_costs_no_precision(axis: int, offset: float, implementation: None) -> None:
    Problem((16, 9, 9, 9), axis, offset=offset).check()
