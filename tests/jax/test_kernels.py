"""The kernels that XLA calls: the same bits as torch's operators, and reasons where they cannot be used."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

import batchnorm
from batchnorm import compiled

jax = pytest.importorskip("jax")
jnp = jax.numpy

from batchnorm.jax import batch_norm, kernels  # noqa: E402

needs_kernels = pytest.mark.skipif(not kernels.REGISTERED, reason=compiled.xla_kernels().reason)


def bits(array: Any) -> Any:
    """Return an array's bits as integers."""
    array = array.view(torch.int16) if isinstance(array, torch.Tensor) and array.element_size() == 2 else array
    array = np.asarray(array)
    return array.view(f"i{array.dtype.itemsize}")


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("masking", ["all", "masked", "weighted"])
@pytest.mark.parametrize(
    ("shape", "axis", "activation"), [((6, 7, 9, 5), 1, "relu"), ((6, 9, 5, 40), -1, "gelu"), ((64, 7), 1, "relu")]
)
def test_jax_and_torch_give_the_same_bits(
    dtype: str, masking: str, shape: tuple[int, ...], axis: int, activation: str
) -> None:
    rng = np.random.default_rng(0)
    x, residual, dy = (torch.tensor(rng.normal(size=shape)).to(getattr(torch, dtype)) for _ in range(3))
    weight, bias = (torch.tensor(rng.normal(size=shape[axis]), dtype=torch.float32) for _ in range(2))
    weights = rng.random(shape[:axis] if axis == -1 else shape[:1] + shape[2:])
    counted = weights > 0.3
    mask = {"all": None, "masked": torch.tensor(counted), "weighted": torch.tensor((weights * counted).astype("f"))}[
        masking
    ]

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    y = batchnorm.functional.batch_norm(
        leaves[0], None, None, *leaves[1:3], training=True, activation=activation, residual=leaves[3], mask=mask,
        channel_dim=axis,
    )  # fmt: skip
    y.backward(dy)
    expected = [y.detach(), *(leaf.grad for leaf in leaves)]

    def of_jax(t: torch.Tensor) -> Any:
        return jnp.asarray(t.float().numpy(), dtype if t.element_size() == 2 else "float32")

    def function(*values: Any) -> Any:
        given = None if mask is None else jnp.asarray(mask.numpy())
        return batch_norm(*values, axis=axis, activation=activation, mask=given)[0]

    @jax.jit
    def step(dy: Any, *values: Any) -> Any:
        out, pull = jax.vjp(function, *values)
        return out, *pull(dy)

    names = ("y", "dx", "dweight", "dbias", "dresidual")
    for name, ours, theirs in zip(names, step(*map(of_jax, (dy, x, weight, bias, residual))), expected, strict=True):
        assert_array_equal(bits(ours), bits(theirs), err_msg=name)


@needs_kernels
def test_padding_whose_square_overflows_changes_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype("f")
    mask = np.ones((6, 5), bool)
    mask[:, 3:] = False
    y, *statistics = batch_norm(np.where(mask[..., None], x, 1e30), mask=mask)
    expected, *expected_statistics = batch_norm(x, mask=mask)
    assert_array_equal(y[mask], expected[mask])
    assert_array_equal(statistics, expected_statistics)


@needs_kernels
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    program = """
import os, numpy as np
if {threads} == 1: os.sched_setaffinity(0, {{next(iter(os.sched_getaffinity(0)))}})
import jax
from batchnorm.jax import batch_norm
x = np.random.default_rng(0).normal(size=(16, 40, 40, 33)).astype("float32")
y, pull = jax.vjp(lambda x: batch_norm(x, axis=1)[0], x)
print(np.asarray(y).tobytes().__hash__(), np.asarray(pull(y)[0]).tobytes().__hash__())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program.format(threads=threads)],
            capture_output=True, text=True, check=True, env=environment,
        ).stdout
        for threads in (1, 2)
    }  # fmt: skip
    assert len(outputs) == 1


def test_backends_describes_jax_without_importing_it() -> None:
    program = "import sys, batchnorm; print(batchnorm.backends()['jax']); assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == compiled.jax_description()


def test_eager_uses_the_composition_and_says_so() -> None:
    program = """
import batchnorm, jax, batchnorm.jax
print(batchnorm.backends()["jax"])
print("batchnorm_xla" in jax.jit(lambda x: batchnorm.jax.batch_norm(x)).lower(jax.numpy.ones((4, 3))).as_text())
"""
    environment = {**os.environ, compiled.CAPABILITY: "eager"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines() == [f"composition: {compiled.CAPABILITY}=eager", "False"]


@pytest.mark.parametrize(
    ("built", "installed", "reason"),
    [
        ((0, 1), (0, 1), ""),
        ((0, 1), (0, 3), ""),
        ((0, 3), (0, 1), "the kernels need version 0.3 of XLA's FFI, and the installed jaxlib has 0.1"),
        ((0, 1), (1, 0), "the kernels need version 0.1 of XLA's FFI, and the installed jaxlib has 1.0"),
        ((0, 1), None, "the version of XLA's FFI is unknown, because jaxlib has no headers"),
    ],
)
def test_a_version_of_the_ffi_that_does_not_fit_is_refused(
    built: tuple[int, int], installed: tuple[int, int] | None, reason: str
) -> None:
    assert compiled._refusal(built, installed) == reason


def test_the_version_of_the_installed_ffi_is_read() -> None:
    version = compiled.ffi_version()
    assert version is not None and version >= (0, 1)


@needs_kernels
def test_an_older_jaxlib_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ffi_version", lambda: (0, 0))
    found = compiled.XlaKernels(compiled.FOLDER, compiled.kernels())
    assert found.library is None
    assert found.reason == "the kernels need version 0.1 of XLA's FFI, and the installed jaxlib has 0.0"


@needs_kernels
def test_without_the_library_for_xla_the_reason_is_given(tmp_path: Path) -> None:
    assert compiled.XlaKernels(tmp_path, compiled.kernels()).reason == "built with BATCHNORM_XLA=OFF"
    (tmp_path / "libbatchnorm_xla.so").write_text("not a library")
    assert "did not load" in compiled.XlaKernels(tmp_path, compiled.kernels()).reason


@needs_kernels
def test_the_library_for_xla_needs_no_other_library_than_the_kernels() -> None:
    path = compiled.find_library(compiled.FOLDER, "batchnorm_xla")
    program = f"import ctypes; ctypes.CDLL({str(path)!r}); print('loaded')"
    run = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "loaded"
    assert isinstance(compiled.xla_kernels().library, ctypes.CDLL)
