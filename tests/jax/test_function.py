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

from batchnorm.jax import batch_norm, kernels, normalize  # noqa: E402
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


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("axis", [1, 3])
def test_a_large_mean_costs_no_precision(axis: int, offset: float, implementation: None) -> None:
    Problem((16, 9, 9, 9), axis, offset=offset).check()


@pytest.mark.parametrize(("shape", "axis"), [((7, 3, 13, 11), 1), ((7, 13, 11, 3), 3)])
def test_values_on_a_coarse_grid_cost_no_precision(shape: tuple[int, ...], axis: int, implementation: None) -> None:
    # A large mean leaves few bits to the deviations. The sums of their squares then round to one side.
    rng = np.random.default_rng(1)
    x, dy = rng.normal(1e4, 1.0, shape).astype("float32"), rng.normal(size=shape).astype("float32")
    exact = reference.forward_training(x.astype(np.float64), axis=axis, eps=EPS)
    (y, mean, var), pull = jax.vjp(lambda x: batch_norm(x, axis=axis, eps=EPS), x)
    (dx,) = pull((dy, jnp.zeros_like(mean), jnp.zeros_like(var)))
    assert np.abs(y - exact.y).max() <= 1e-6
    assert np.abs(dx - reference.backward(dy.astype(np.float64), exact).dx).max() <= 1e-6
    assert np.abs(var / exact.var - 1).max() <= 5e-7


def test_rounding_of_the_variance_favors_no_side(implementation: None) -> None:
    x = np.random.default_rng(0).normal(1.0, 1.0, (32, 256, 8, 8)).astype("float32")
    _, _, var = batch_norm(x, axis=1)
    errors = np.asarray(var, np.float64) / x.astype(np.float64).var((0, 2, 3)) - 1
    assert abs(errors.mean()) <= 2e-8


MASK = np.random.default_rng(1).random((6, 4, 5)) > 0.4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_matches_the_reference(dtype: str, implementation: None) -> None:
    Problem(dtype=dtype, activation="relu", residual=True, mask=MASK).check()


def test_weights_match_the_reference() -> None:
    Problem(mask=np.random.default_rng(1).random((6, 4, 5)).astype("float32")).check()


def test_a_mask_for_each_channel_is_one_problem_for_each_channel() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 3)), "float32")
    mask = np.random.default_rng(1).random((6, 5, 3)) > 0.4
    y, mean, var = batch_norm(x, mask=mask)
    for c in range(3):
        one = batch_norm(x[..., c : c + 1], mask=mask[..., c])
        for got, expected in zip((y[..., c : c + 1], mean[c : c + 1], var[c : c + 1]), one, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_masked_positions_may_hold_any_value(implementation: None) -> None:
    problem = Problem(mask=MASK)
    for value in (np.nan, np.inf, 1e38):
        x = jnp.where(MASK[..., None], problem.x, value)
        y, mean, _ = problem.run(x, *problem.arguments()[1:])
        np.testing.assert_array_equal(y[MASK], problem.run(*problem.arguments())[0][MASK])
        assert jnp.isfinite(mean).all()
        _, pull = jax.vjp(lambda x: problem.run(x, None, None, None)[0], x)
        assert jnp.isfinite(pull(jnp.where(MASK[..., None], x, 0))[0][MASK]).all()


def test_nan_at_a_position_that_counts_shows(implementation: None) -> None:
    x = jnp.ones((4, 3)).at[0, 0].set(jnp.nan)
    y, mean, var = batch_norm(x, mask=jnp.ones(4, bool))
    for result in (y[0], mean, var):
        assert jnp.isnan(result).tolist() == [True, False, False]


@pytest.mark.parametrize("mask", [None, np.zeros(4, bool)], ids=["empty", "nothing counts"])
def test_without_values_y_is_finite_and_statistics_are_zero(mask: Any, implementation: None) -> None:
    x = jnp.ones((4 if mask is not None else 0, 3))
    (y, mean, var), pull = jax.vjp(lambda *v: batch_norm(*v, mask=mask), x, jnp.ones(3), jnp.full(3, 2.0))
    gradients = pull((jnp.ones_like(y), mean, var))
    assert y.shape == x.shape and all(jnp.isfinite(a).all() for a in (y, *gradients))
    assert mean.tolist() == var.tolist() == [0.0] * 3


def test_a_single_value_that_counts_gives_the_bias(implementation: None) -> None:
    mask = np.array([True, False, False, False])
    y, mean, var = batch_norm(jnp.arange(12.0).reshape(4, 3), jnp.ones(3), jnp.full(3, 2.0), mask=mask)
    assert y[0].tolist() == [2.0] * 3 and mean.tolist() == [0.0, 1.0, 2.0] and var.tolist() == [0.0] * 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_normalize_matches_the_reference(activation: str) -> None:
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    mean, weight, bias, var = (rng.uniform(0.5, 1.5, 3).astype("float32") for _ in range(4))
    y = normalize(x, mean, var, weight, bias, residual, axis=1, activation=activation, alpha=0.2, negative_slope=0.2)
    expected = reference.normalize(
        x, mean, var, weight, bias, residual=residual, activation=activation, negative_slope=0.2
    )
    np.testing.assert_allclose(y, expected.y, atol=2e-6)


X = np.ones((4, 3), "float32")
ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "list": (TypeError, "batch_norm expects x to be an array, got list. Pass", lambda: batch_norm([[1.0]])),
    "integers": (TypeError, "expects x of dtype .*, got int32. Convert", lambda: batch_norm(np.ones((4, 3), "int32"))),
    "one axis": (ValueError, "at least one other axis, got shape .4.. Add", lambda: batch_norm(X[:, 0])),
    "axis": (ValueError, "expects axis from -2 to 1 .*, got 2. Pass", lambda: batch_norm(X, axis=2)),
    "axes": (TypeError, r"axis to be an int, got \(0, 1\) .tuple.. Pass", lambda: batch_norm(X, axis=(0, 1))),
    "axis is a float": (TypeError, "axis to be an int, got 1.0 .float.. Pass", lambda: batch_norm(X, axis=1.0)),
    "eps": (ValueError, "expects eps > 0, got 0. It", lambda: batch_norm(X, eps=0)),
    "activation": (ValueError, "activation to be one of .*, got 'selu'.", lambda: batch_norm(X, activation="selu")),
    "weight": (ValueError, "weight of shape .3., .*, got .4.. Pass", lambda: batch_norm(X, np.ones(4))),
    "integer bias": (TypeError, "bias of a floating-point dtype, got int", lambda: batch_norm(X, bias=np.ones(3, int))),
    "residual": (ValueError, "residual of x's shape .*, got .1, 3.", lambda: batch_norm(X, None, None, X[:1])),
    "residual's dtype": (
        TypeError, "residual of x's dtype float32, got float16. Convert",
        lambda: batch_norm(X, residual=X.astype("float16")),
    ),
    "mask": (ValueError, "a mask that broadcasts to .4., .*, got .3.. Insert", lambda: batch_norm(X, mask=np.ones(3))),
    "negative mask": (ValueError, "weights >= 0, got values from -1.0 to", lambda: batch_norm(X, mask=-np.ones(4))),
    "tiny mask": (ValueError, "largest weight of a mask from 1e-15", lambda: batch_norm(X, mask=np.full(4, 1e-20))),
    "complex mask": (TypeError, "booleans or of weights, got complex64", lambda: batch_norm(X, mask=np.ones(4, "F"))),
    "one value": (ValueError, "more than 1 value per channel in training, got", lambda: batch_norm(X[:1])),
    "statistics": (ValueError, "normalize expects mean of shape .3.", lambda: normalize(X, np.ones(2), np.ones(3))),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_state_what_must_hold_what_came_and_what_to_do(name: str) -> None:
    kind, message, call = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
