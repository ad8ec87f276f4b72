"""The two operators of whitening, by torch and compiled, against their definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.ops import compiled, whitening, whitening_operators

SHAPES = [(5, 7), (4, 37, 9, 11), (2, 33, 40, 40), (3, 5, 1, 1), (2, 130, 3), (0, 3, 4), (2, 3, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 16, 64]


@pytest.fixture(params=["eager", *compiled.cpu_capabilities()])
def operators(request: pytest.FixtureRequest) -> Any:
    if request.param == "eager":
        # torch may sum the values of a channel one by one.
        yield whitening_operators.whiten_products, whitening_operators.whiten_map, whitening.LONGEST_SUM
        return
    before = compiled.cpu_capability()
    compiled.set_cpu_capability(request.param)
    yield torch.ops.batchnorm.whiten_products, torch.ops.batchnorm.whiten_map, 64
    compiled.set_cpu_capability(before)


class Data:
    """Values around a large mean, and their float64 copies `[C, m]`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str, size: int) -> None:
        generator = torch.Generator().manual_seed(sum(shape) + size)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        wide, channels = torch.float64 if dtype == torch.float64 else torch.float32, shape[1]
        far = 1e6 if dtype == torch.float64 else 30.0
        self.mean = (far + random(channels)).to(wide)
        centers = self.mean.reshape(-1, *(1,) * (len(shape) - 2))
        self.x, self.dy = (random(*shape) + centers).to(dtype), random(*shape).to(dtype)
        if layout == "channels_last":
            self.x, self.dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (self.x, self.dy))
        self.weights = torch.rand(shape[0], *shape[2:], generator=generator, dtype=wide)
        self.size = min(size, channels)
        self.belongs = torch.arange(channels) // size == (torch.arange(channels) // size)[:, None]
        self.matrices, self.dy_matrices = (self.pack(random(channels, channels)).to(wide) for _ in range(2))
        self.shift = random(channels).to(wide)
        self.deviations = flat(self.x) - self.mean.double()[:, None]
        self.unit = torch.finfo(dtype).eps

    def pack(self, square: Tensor) -> Tensor:
        """Return the blocks of a matrix `[C, C]` that belong to the groups, `[C, size]`, with zeros at the end."""
        packed = square.new_zeros(square.shape[0], self.size)
        for c, row in enumerate(self.belongs):
            packed[c, : int(row.sum())] = square[c, row]
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        square = torch.zeros(self.belongs.shape, dtype=torch.float64)
        for c, row in enumerate(self.belongs):
            square[c, row] = packed.double()[c, : int(row.sum())]
        return square


def flat(t: Tensor) -> Tensor:
    return t.double().movedim(1, 0).flatten(1)


def cases(check: Callable[..., None]) -> Any:
    for name, values in {"size": SIZES, "layout": ["contiguous", "channels_last"], "dtype": DTYPES}.items():
        check = pytest.mark.parametrize(name, values, ids=str)(check)
    return pytest.mark.parametrize("shape", SHAPES, ids=str)(check)


def summed(terms: Tensor, wide: torch.dtype, roundings: int) -> Tensor:
    """Return the error that a sum of these magnitudes may have after this number of roundings of the whole sum."""
    return roundings * torch.finfo(wide).eps / 2 * terms + 1e-300


@cases
def test_products(operators: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, size: int) -> None:
    data, wide = Data(shape, dtype, layout, size), torch.float64 if dtype == torch.float64 else torch.float32
    weighted = data.deviations * data.weights.double().flatten()
    for dy, weights, left in (
        (None, None, data.deviations), (data.dy, None, flat(data.dy)), (None, data.weights, weighted)
    ):  # fmt: skip
        products, sums = operators[0](data.x, data.mean, dy, weights, size)
        assert products.dtype == sums.dtype == torch.float64
        allowed = data.pack(summed(left.abs() @ data.deviations.abs().T, wide, operators[2]))
        assert ((products - data.pack(left @ data.deviations.T)).abs() <= allowed).all()
        assert ((sums - left.sum(1)).abs() <= summed(left.abs().sum(1), wide, operators[2])).all()


@cases
def test_maps(operators: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, size: int) -> None:
    data = Data(shape, dtype, layout, size)
    matrices, dy_matrices = data.unpack(data.matrices), data.unpack(data.dy_matrices)
    mapped, of_dy = matrices @ data.deviations + data.shift.double()[:, None], dy_matrices @ flat(data.dy)
    terms = matrices.abs() @ data.deviations.abs() + data.shift.abs().double()[:, None]
    weights, more_terms = data.weights.double().flatten(), terms + dy_matrices.abs() @ flat(data.dy).abs()
    for dy, of, w, expected, magnitude in (
        (None, None, None, mapped, terms),
        (data.dy, data.dy_matrices, None, mapped + of_dy, more_terms),
        (data.dy, data.dy_matrices, data.weights, mapped * weights + of_dy, more_terms),
    ):
        y = operators[1](data.x, data.mean, data.matrices, data.shift, dy, of, w)
        assert (y.dtype, y.stride()) == (dtype, torch.empty_like(data.x).stride())
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        allowed = summed(magnitude, wide, 64) + data.unit * expected.abs() + (6e-8 if dtype == torch.float16 else 0.0)
        assert ((flat(y) - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_finite_stays_in_its_position_and_group(operators: Any, dtype: torch.dtype) -> None:
    data = Data((3, 7, 50), dtype, "contiguous", 3)
    data.x[1, 4, 17] = float("nan")  # of the second of three groups
    products, sums = operators[0](data.x, data.mean, None, None, 3)
    y = operators[1](data.x, data.mean, data.matrices, data.shift, None, None, None)
    bad = torch.zeros(3, 7, 50, dtype=torch.bool)
    bad[1, 3:6, 17] = True
    assert torch.equal(y.isnan(), bad)
    assert products.isnan().any(1).tolist() == [False, False, False, True, True, True, False]
    assert sums.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 40, 30, 30), (3000, 70)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(operators: Any, shape: tuple[int, ...], layout: str) -> None:
    data, found, before = Data(shape, torch.float32, layout, 16), [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append([
            *operators[0](data.x, data.mean, None, None, 16),
            *operators[0](data.x, data.mean, data.dy, None, 16),
            operators[1](data.x, data.mean, data.matrices, data.shift, data.dy, data.dy_matrices, data.weights),
        ])  # fmt: skip
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_blocks_of_samples_give_the_bits_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = Data((5, 8, 4, 3), torch.float32, "contiguous", 4), []
    for block in (1, 2 * 8 * 12, 1 << 19):  # one sample, two, and all
        monkeypatch.setattr(whitening_operators, "_BLOCK", block)
        arguments = (data.x, data.mean, data.matrices, data.shift, data.dy, data.dy_matrices, data.weights)
        results.append(whitening_operators.whiten_map(*arguments))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_operators_keep_their_contract(dtype: torch.dtype, layout: str) -> None:
    data, ops = Data((3, 5, 4, 2), dtype, layout, 3), torch.ops.batchnorm
    for center in (data.mean, None):
        torch.library.opcheck(ops.whiten_products.default, (data.x, center, data.dy, None, 3))
        torch.library.opcheck(ops.whiten_products.default, (data.x, center, None, data.weights, 3))
        arguments = (data.x, center, data.matrices, data.shift, data.dy, data.dy_matrices, data.weights)
        torch.library.opcheck(ops.whiten_map.default, arguments)


@pytest.mark.skipif(not compiled.cpu_capabilities(), reason="there are no compiled operators")
def test_compiled_operators_refuse_what_would_read_other_memory() -> None:
    x, mean, ops = torch.randn(4, 6, 5), torch.zeros(6), torch.ops.batchnorm
    matrices, shift = torch.zeros(6, 3), torch.zeros(6)
    for call in (
        lambda: ops.whiten_products(x, mean[:5], None, None, 3),
        lambda: ops.whiten_products(x, mean, x[:3], None, 3),
        lambda: ops.whiten_products(x, mean, None, torch.ones(4, 4), 3),
        lambda: ops.whiten_products(x, mean, None, None, 0),
        lambda: ops.whiten_products(x, mean, x, torch.ones(4, 5), 3),
        lambda: ops.whiten_map(x, mean, matrices[:5], shift, None, None, None),
        lambda: ops.whiten_map(x, mean, torch.zeros(6, 7), shift, None, None, None),
        lambda: ops.whiten_map(x, mean, torch.zeros(6, 0), shift, None, None, None),
        lambda: ops.whiten_map(x, mean, matrices, shift[:5], None, None, None),
        lambda: ops.whiten_map(x, mean, matrices, shift, x, None, None),
        lambda: ops.whiten_map(x, mean, matrices, shift, x, torch.zeros(6, 4), None),
    ):
        with pytest.raises(RuntimeError, match="expects"):
            call()
