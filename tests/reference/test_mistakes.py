"""Mistakes in calls of the reference are errors with three parts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchnorm import reference as ref

X = np.arange(12.0).reshape(4, 3)

BATCH = ref.moments(X)

MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "one_dim": (lambda: ref.moments([1.0, 2.0]), r"x must have a sample and a channel axis, got \[2\]\. Reshape"),
    "axis": (lambda: ref.moments(X, axis=2), r"axis must be in \[-2, 2\), got 2\. The default is 1\."),
    "weights_shape": (lambda: ref.moments(X, weights=X), r"weights must have shape \[4\], got \[4, 3\]\."),
    "weights_sign": (lambda: ref.moments(X, weights=[1, 1, -2, 1]), r"weights must be finite and >= 0, got \[-2\.\]"),
    "weights_nan": (lambda: ref.moments(X, weights=[1, 1, np.nan, 1]), "weights must be finite and >= 0, got"),
    "index_alone": (lambda: ref.moments(X, index=[0, 0, 1, 1]), "index and groups must be given together.*groups None"),
    "groups_alone": (lambda: ref.moments(X, groups=2), "index and groups must be given together.*index None"),
    "groups_too_few": (lambda: ref.moments(X, index=[0, 0, 1, 2], groups=2), "index < groups, got"),
    "index_shape": (lambda: ref.forward_training(X, index=[0, 1]), r"index must hold 4 integers .* got \[0 1\]\."),
    "index_float": (lambda: ref.forward_training(X, index=[0.0] * 4), "index must hold 4 integers"),
    "index_negative": (lambda: ref.forward_training(X, index=[0, 1, -1, 0]), "index must hold 4 integers >= 0"),
    "one_value": (lambda: ref.forward_training(X[:1]), "more than one value per channel, got count = 1.0. Use"),
    "one_in_group": (lambda: ref.forward_training(X, index=[0, 0, 0, 1], groups=2), r"got count = \[3.0, 1.0\]"),
    "one_weighted": (lambda: ref.forward_training(X, weights=[0, 0.3, 0, 0]), "got count = 0.3"),
    "weight": (lambda: ref.forward_training(X, [1.0] * 4), r"weight must have shape \[3\].*got \[4\]\. Pass one"),
    "weight_rows": (lambda: ref.forward_training(X, np.ones((2, 3))), r"weight must have shape \[3\].*got \[2, 3\]"),
    "weight_rows_too_few": (
        lambda: ref.forward_training(X, np.ones((2, 3)), index=[0, 1, 2, 0]),
        r"\[K >= 3, 3\], got \[2, 3\]",
    ),
    "bias": (lambda: ref.forward_training(X, None, [1.0] * 2), r"must have shape \[3\].*got \[2\]"),
    "bias_unlike": (
        lambda: ref.forward_training(X, np.ones((2, 3)), np.ones(3), index=[0, 1, 0, 1]),
        r"weight and bias must have one shape, got \[\(2, 3\), \(3,\)\]\. Expand",
    ),
    "mean": (lambda: ref.forward_inference(X, [0.0], [1.0] * 3), r"mean must have shape \[3\].*got \[1\]"),
    "var": (lambda: ref.forward_inference(X, [0.0] * 3, [1.0, 1.0, -1.0]), "var and eps must be >= 0, got"),
    "eps": (lambda: ref.forward_training(X, eps=-1e-5), "var and eps must be >= 0, got .*-1e-05"),
    "residual": (lambda: ref.forward_training(X, residual=X.T), r"residual must have shape \[4, 3\], got \[3, 4\]"),
    "activation": (lambda: ref.forward_training(X, activation="selu"), r"one of \['none', .*\], got selu\. Choose"),
    "dy": (lambda: ref.backward(X.T, ref.forward_training(X)), r"dy must have shape \[4, 3\], got \[3, 4\]"),
    "no_parts": (lambda: ref.merge([]), "merge needs at least one part, got 0. Pass a list of Moments."),
    "convention": (
        lambda: ref.update_running([0.0] * 3, [1.0] * 3, BATCH, momentum=0.1, convention="jax"),
        r"convention must be one of \['torch', .*\], got jax\.",
    ),
    "momentum": (
        lambda: ref.update_running([0.0] * 3, [1.0] * 3, BATCH, momentum=1.1, convention="torch"),
        r"momentum must be in \[0, 1\], got 1\.1\. Or pass None\.",
    ),
    "running_mean": (
        lambda: ref.update_running([0.0], [1.0] * 3, BATCH, momentum=0.1, convention="torch"),
        r"running_mean must have shape \[3\], got \[1\]",
    ),
    "unbiased_of_one": (
        lambda: ref.update_running([0.0], [1.0], ref.moments([[2.0]]), momentum=0.1, convention="torch"),
        "more than one value per channel, got count = 1.0",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_imports_without_torch() -> None:
    # The package above it does import torch: an empty one takes its place.
    code = (
        "import sys, types; package = types.ModuleType('batchnorm'); package.__path__ = [sys.argv[1]];"
        "sys.modules['batchnorm'] = package; import batchnorm.reference; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(ref.__file__).parents[1])], check=True)


@pytest.mark.parametrize("groups", [None, 2])
def test_long_double_stays_long_double(groups: int | None) -> None:
    x = np.linspace(0.0, 1.0, 24).reshape(4, 2, 3).astype(np.longdouble) + 1e6
    index = None if groups is None else np.array([0, 1, 1, 0])
    forward = ref.forward_training(x, index=index, groups=groups)
    assert forward.y.dtype == ref.backward(x, forward).dx.dtype == np.longdouble
    exact = ref.forward_training((x - 1e6).astype(np.float64), index=index, groups=groups)
    digits = np.finfo(np.longdouble).eps
    assert np.abs(forward.y - exact.y).max() <= max(1e7 * digits, 1e-14)
