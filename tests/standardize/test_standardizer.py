"""The Standardizer: scikit-learn's results, more exact, for every kind of data, in constant memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from batchnorm.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d
from batchnorm.standardize import Standardizer
from batchnorm.standardize import data as data_module
from tests.processes import spawn


def table(rows: int = 60, columns: int = 4, offset: float = 3.0, seed: int = 0) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    return offset + generator.normal(size=(rows, columns)) * np.arange(1, columns + 1)


def fitted(standardizer: Standardizer) -> tuple[Any, ...]:
    return standardizer.mean_, standardizer.var_, standardizer.scale_, np.asarray(standardizer.n_samples_seen_)


def assert_same(first: Standardizer, second: Standardizer, rtol: float = 1e-12) -> None:
    for ours, theirs in zip(fitted(first), fitted(second), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-14)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every array is read in several parts."""
    monkeypatch.setattr(data_module, "_PART", 24)
    monkeypatch.setattr(data_module, "_LARGE_PART", 24)
    monkeypatch.setattr(data_module, "_BLOCK", 72)


# Statistics


@pytest.mark.usefixtures("small_parts")
def test_mean_and_deviation_are_those_of_two_passes() -> None:
    x = table()
    s = Standardizer().fit(x)
    np.testing.assert_allclose(s.mean_, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(s.var_, x.var(0), rtol=1e-13)
    np.testing.assert_allclose(s.transform(x), (x - x.mean(0)) / x.std(0), rtol=1e-12, atol=1e-13)
    assert (s.n_samples_seen_, s.n_features_in_) == (60, 4)


def test_a_mean_of_1e8_deviations_costs_what_float64_loses_itself() -> None:
    x = np.arange(1001.0)[:, None] + 5e10
    s = Standardizer().fit(x)
    assert s.mean_.item() == 5e10 + 500
    assert s.var_.item() == (1001**2 - 1) / 12
    assert s.transform(x)[500].item() == 0.0


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bfloat16])
def test_images_are_standardized_per_channel(axis: int, dtype: torch.dtype) -> None:
    x = (40 * torch.rand(6, 3, 5, 4)).to(dtype)
    x = x.movedim(1, axis)
    y = Standardizer(channel_axis=axis).fit_transform(x)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape
    assert y.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    z = x.movedim(axis, 1).double().transpose(0, 1).flatten(1)
    expected = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)).to(y.dtype)
    assert_close(y.movedim(axis, 1).transpose(0, 1).flatten(1), expected)


def test_constant_features_are_centred_only() -> None:
    x = table()
    x[:, 1] = 0.1
    s = Standardizer().fit(x)
    assert s.scale_[1] == 1.0 and s.var_[1] == 0.0
    assert (s.transform(x)[:, 1] == 0.0).all()


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
def test_inverse_transform_undoes_transform(with_mean: bool, with_std: bool) -> None:
    x = table()
    s = Standardizer(with_mean=with_mean, with_std=with_std).fit(x)
    y = s.transform(x)
    np.testing.assert_allclose(s.inverse_transform(y), x, rtol=1e-13)
    assert np.allclose(y.mean(0), 0) == with_mean
    assert np.allclose(y.std(0), 1) == with_std


def test_weights_count_like_repeated_samples() -> None:
    x, w = table(), np.arange(60) % 3
    assert_same(Standardizer().fit(x, sample_weight=w), Standardizer().fit(np.repeat(x, w, axis=0)))
    assert Standardizer().fit(x, sample_weight=w / 2).n_samples_seen_ == w.sum() / 2
    for wrong in (-np.ones(60), np.full(60, np.nan), np.zeros(60)):
        with pytest.raises(ValueError, match="sample_weight >= 0, finite and not all zero"):
            Standardizer().fit(x, sample_weight=wrong)
    with pytest.raises(ValueError, match="of shape \\[N\\] = \\[60\\], got \\[59\\]"):
        Standardizer().fit(x, sample_weight=w[1:])


@pytest.mark.usefixtures("small_parts")
def test_omitted_nan_leaves_the_statistics_of_the_rest() -> None:
    x = table()
    x[3:9, 0] = x[20, 2] = np.nan
    x[:, 3] = np.nan
    with pytest.raises(ValueError, match="got NaN in its data. nan_policy='omit'"):
        Standardizer(nan_policy="raise").fit(x)
    s = Standardizer().fit(x)
    np.testing.assert_allclose(s.mean_[:3], np.nanmean(x[:, :3], 0), rtol=1e-13)
    np.testing.assert_allclose(s.var_[:3], np.nanvar(x[:, :3], 0), rtol=1e-13)
    assert np.isnan(s.mean_[3]) and s.n_samples_seen_.tolist() == [54, 60, 59, 0]
    assert (np.isnan(s.transform(x)) == np.isnan(x)).all()
    with pytest.raises(ValueError, match="finite statistics of every feature, got NaN or infinity"):
        s.to_layer()
    assert np.isnan(Standardizer(nan_policy="propagate").fit(x).mean_).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="got infinity"):
        Standardizer(nan_policy="omit").fit(np.array([[1.0], [np.inf]]))
    with pytest.raises(ValueError, match="nan_policy to be one of 'raise', 'omit', 'propagate', got 'drop'"):
        Standardizer(nan_policy="drop").fit(x)


# Data of every kind


@pytest.mark.usefixtures("small_parts")
def test_every_kind_of_data_gives_the_same(tmp_path: Path) -> None:
    x = table()
    expected = Standardizer().fit(x)
    mapped = np.memmap(tmp_path / "x.bin", x.dtype, "w+", shape=x.shape)
    mapped[:] = x
    tensor = torch.from_numpy(x)
    dataset = torch.utils.data.TensorDataset(tensor, torch.arange(60))
    for kind in (
        mapped, tensor, x.tolist(), np.asfortranarray(x), [x[:7], x[7:]], iter([x[:1], x[1:]]),
        torch.utils.data.DataLoader(dataset, 7), ((part, 0) for part in tensor.split(11)),
    ):  # fmt: skip
        assert_same(Standardizer().fit(kind), expected)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 5))
def test_partial_fit_and_merge_agree_with_one_fit(sizes: list[int], seed: int) -> None:
    x = table(sum(sizes), offset=1e6, seed=seed)
    x[::7, 1] = np.nan
    parts = np.split(x, np.cumsum(sizes)[:-1])
    expected = Standardizer(nan_policy="omit").fit(x)
    step_by_step = Standardizer(nan_policy="omit")
    for part in parts:
        step_by_step.partial_fit(part)
    assert_same(step_by_step, expected, rtol=1e-9)
    each = [Standardizer(nan_policy="omit").fit(part) for part in parts]
    before = copy.deepcopy(each[0])
    assert_same(each[0].merge(*each[1:]), expected, rtol=1e-9)
    assert_same(each[0], before, rtol=0)


def test_fit_forgets_and_partial_fit_does_not() -> None:
    s = Standardizer().fit(table(seed=1))
    assert_same(s.fit(table()), Standardizer().fit(table()), rtol=0)
    assert s.partial_fit(table()).n_samples_seen_ == 120


def test_batches_are_transformed_one_by_one_and_labels_passed_on() -> None:
    x = torch.from_numpy(table())
    s = Standardizer().fit(x)
    found = list(s.transform((part, "label") for part in x.split(9)))
    assert {label for _, label in found} == {"label"}
    assert_close(torch.cat([part for part, _ in found]), s.transform(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="data that can be read twice, got an iterator \\(generator\\)"):
        s.fit_transform(part for part in x.split(9))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("axis", [1, -1])
def test_results_can_be_written_where_the_user_says(axis: int, tmp_path: Path) -> None:
    x = table()
    s = Standardizer(channel_axis=axis).fit(x)
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", shape=x.shape)
    assert s.transform(x, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), s.transform(x).astype(np.float32))
    own = x.copy()
    s.transform(own, out=own)
    np.testing.assert_array_equal(own, s.transform(x))
    with pytest.raises(ValueError, match="out of x's shape \\[60, 4\\], got \\[60, 3\\]"):
        s.transform(x, out=out[:, :3])


def test_nothing_is_written_where_the_data_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_PART", 24)
    x = table()
    s = Standardizer(nan_policy="raise").fit(x)
    for wrong in (np.nan, np.inf):
        x[-1, 0] = wrong
        before = x.copy()
        with pytest.raises(ValueError, match=f"got {'NaN' if wrong != wrong else 'infinity'}"):
            s.transform(x, out=x)
        np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_layout_changes_nothing_and_the_data_stay(order: Any, dtype: type) -> None:
    x = np.array(table(500), dtype, order=order)
    x.flags.writeable = False
    before, s = x.copy(), Standardizer().fit(x)
    own = x.astype(np.float64)
    assert_same(s, Standardizer().fit(own))
    np.testing.assert_allclose(s.transform(own), (own - own.mean(0)) / own.std(0), rtol=1e-12, atol=1e-13)
    restored = s.inverse_transform(s.transform(x))
    np.testing.assert_allclose(restored, x, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-13)
    np.testing.assert_array_equal(x, before)
    tensor = torch.from_numpy(own)
    kept = tensor.clone()
    s.transform(tensor)
    assert torch.equal(tensor, kept)


def test_a_missing_value_leaves_the_bits_of_other_features() -> None:
    x = table(500)
    complete, x[7, 2] = Standardizer().fit(x.copy()), np.nan
    found = Standardizer().fit(x)
    assert found.n_samples_seen_.tolist() == [500, 500, 499, 500]
    for ours, theirs in zip(fitted(found)[:3], fitted(complete)[:3], strict=True):
        np.testing.assert_allclose(np.delete(ours, 2), np.delete(theirs, 2), rtol=1e-15)


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_weights_may_have_any_unit(unit: float) -> None:
    x, w = table(), np.arange(60.0)
    expected = np.cov(x.T, ddof=0, aweights=w).diagonal()
    np.testing.assert_allclose(Standardizer().fit(x, sample_weight=unit * w).var_, expected, rtol=1e-13)


def raising() -> Iterator[np.ndarray[Any, Any]]:
    yield table()
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (raising(), OSError, "disk gone"),
        ([table(), np.full((2, 4), np.inf)], ValueError, "got infinity"),
        ([table(), table(columns=3)], ValueError, "X has 3 features, but Standardizer is expecting 4"),
        (iter(()), ValueError, "at least one batch, got empty data"),
        (iter([{"x": table()}]), TypeError, "got dict. Select one, for example"),
        (np.zeros(3), ValueError, "got \\[3\\]. Reshape your data"),
        (np.zeros((0, 4)), ValueError, "0 sample\\(s\\)"),
        (np.array([["a"]]), ValueError, "expects numbers, got an array of dtype <U1"),
        (torch.ones(3, 4, dtype=torch.complex64), ValueError, "Complex data not supported"),
        (
            torch.eye(4).to_sparse(),
            TypeError,
            "a dense tensor or a sparse matrix of SciPy, got a tensor of layout",
        ),
    ],
    ids=["raises", "infinity", "features", "nothing", "dict", "1d", "empty", "text", "complex", "sparse"],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_failure_leaves_what_was_fitted(x: Any, error: type[Exception], message: str, method: str) -> None:
    s = Standardizer().fit(table(seed=3))
    before = copy.deepcopy(s)
    if isinstance(x, Iterator):
        x = copy.copy(x) if not hasattr(x, "gi_frame") else raising()
    with pytest.raises(error, match=message):
        getattr(s, method)(x)
    assert_same(s, before, rtol=0)


def test_an_unfitted_standardizer_raises_an_error() -> None:
    for use in (lambda s: s.transform(table()), lambda s: s.to_layer(), lambda s: s.merge(), lambda s: s.all_reduce()):
        with pytest.raises(ValueError, match="Standardizer instance is not fitted yet"):
            use(Standardizer())
    with pytest.raises(ValueError, match="expects 4 features, got one with 3"):
        Standardizer().fit(table()).merge(Standardizer().fit(table(columns=3)))


def test_state_survives_pickling_and_copying() -> None:
    s = Standardizer(with_std=False).fit(table())
    for other in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert_same(s, other, rtol=0)
        np.testing.assert_array_equal(other.transform(table()), s.transform(table()))
    assert repr(s) == "Standardizer(with_std=False)"


# As a layer


@pytest.mark.parametrize("options", [{}, {"with_mean": False}, {"with_std": False}])
def test_the_layer_does_what_transform_does(options: dict[str, bool]) -> None:
    x = torch.rand(8, 3, 4, 5) * torch.tensor([1e-6, 1.0, 255.0]).view(3, 1, 1)
    s = Standardizer(**options).fit(x)
    layer = s.to_layer()
    assert type(layer) is FrozenBatchNorm2d and not layer.training and layer.weight is None
    assert_close(layer(x), s.transform(x), rtol=1e-5, atol=1e-5)
    exact = s.to_layer(dtype=torch.float64)
    assert_close(exact(x.double()), s.transform(x.double()), rtol=1e-11, atol=1e-11)
    assert type(Standardizer().fit(table()).to_layer()) is FrozenBatchNorm1d
    assert_close(nn.Sequential(layer, nn.Flatten()).train()(x[:1]), s.transform(x[:1]).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_layer_is_right_for_every_unit_or_says_that_it_cannot_be(dtype: torch.dtype, offset: float) -> None:
    number, right = torch.finfo(dtype), set()
    # All units whose values and reciprocals the dtype has.
    small, large = {torch.float16: (-4, 3), torch.float64: (-150, 150)}.get(dtype, (-36, 36))
    exponents = range(-310, 300, 3 if dtype == torch.float64 else 1)
    for exponent in exponents:
        x = torch.from_numpy(table(40, 2, offset=offset) * np.array([10.0**exponent, 1.0]))
        given = x.to(dtype)
        with contextlib.suppress(ValueError):  # the data overflow, or the error says what cannot be represented
            s = Standardizer().fit(x)
            layer, expected = s.to_layer(dtype=dtype), s.transform(given.double())
            right.add(exponent)
            assert_close(layer(given).double(), expected, rtol=16 * number.eps, atol=64 * number.eps)
    assert {e for e in exponents if small <= e <= large} <= right


def test_only_variances_out_of_range_need_a_weight() -> None:
    x = torch.from_numpy(table(columns=3) * np.array([1e-22, 1.0, 1e20]))
    layer = Standardizer().fit(x).to_layer(dtype=torch.float32)
    assert layer.weight.tolist()[1] == 1 and layer.bias is None and not layer.weight.requires_grad
    assert_close(layer.running_var[1].item(), float(x[:, 1].var(correction=0)), rtol=1e-6, atol=0)
    with pytest.raises(
        ValueError, match=r"that torch.float16 can represent, got mean .*e-22 .* of feature 0. Use another"
    ):
        Standardizer().fit(x).to_layer(dtype=torch.float16)


# Masked arrays and outputs


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(30, 4), (9, 4, 3)])
def test_masked_values_count_as_missing(dtype: Any, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    x = np.ma.MaskedArray(generator.integers(0, 99, shape).astype(dtype), generator.random(shape) < 0.3)
    missing = x.astype(float).filled(np.nan)
    s = Standardizer(nan_policy="omit").fit(x)
    assert_same(s, Standardizer(nan_policy="omit").fit(missing))
    assert_same(s, Standardizer(nan_policy="omit").partial_fit(x[:5]).partial_fit(x[5:]))
    assert_same(s, Standardizer(nan_policy="omit").fit([x[:5], x[5:]]))
    for change in (s.transform, s.inverse_transform):
        y = change(x)
        assert isinstance(y, np.ma.MaskedArray) and (y.mask == x.mask).all()
        np.testing.assert_allclose(y.filled(np.nan), change(missing), rtol=1e-5)
        out = np.ma.MaskedArray(np.empty(shape), mask=True)
        assert change(x, out=out) is out and (out.mask == x.mask).all()
        np.testing.assert_allclose(change(x, out=np.empty(shape)), change(missing), rtol=1e-12)
    assert np.isnan(Standardizer(nan_policy="propagate").fit(x).mean_).all()
    strict = Standardizer(nan_policy="raise")
    for use in (strict.fit, strict.partial_fit, Standardizer(nan_policy="raise").fit(x.filled(0)).transform):
        with pytest.raises(ValueError, match=rf"expects no masked values, got {x.mask.sum()} of them"):
            use(x)
    whole = np.ma.MaskedArray(x.filled(0))
    assert_same(Standardizer().fit(whole), Standardizer().fit(x.filled(0)))


def test_a_masked_tensor_is_refused() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        x = torch.masked.masked_tensor(torch.ones(3, 2), torch.ones(3, 2) > 0)
    with pytest.raises(TypeError, match="expects a plain tensor, got a MaskedTensor"):
        Standardizer().fit(x)


@pytest.mark.parametrize("name", ["transform", "inverse_transform"])
def test_an_output_that_cannot_hold_fractions_is_refused(name: str) -> None:
    x = table()
    change = getattr(Standardizer().fit(x), name)
    for out in (np.zeros(x.shape, int), np.zeros(x.shape, bool), np.zeros(x.shape, complex), np.zeros(x.shape, object),
                torch.zeros(x.shape, dtype=torch.int32), x.tolist()):  # fmt: skip
        before = copy.deepcopy(out)
        with pytest.raises(TypeError, match="expects out to be an array or tensor of a floating-point dtype, got"):
            change(x, out=out)
        assert np.array_equal(np.asarray(out), np.asarray(before))
    for out in (np.zeros(x.shape, np.float32), torch.zeros(x.shape, dtype=torch.float64)):
        np.testing.assert_allclose(np.asarray(change(x, out=out)), change(x), rtol=1e-5, atol=1e-5)


# Larger than memory

LARGER_THAN_MEMORY = """
import resource, sys
import numpy as np, torch
from batchnorm.standardize import Standardizer
Standardizer().fit_transform(np.ones((9, 4)))  # what is loaded late is loaded
shape = (int(sys.argv[2]), 64)
x = np.memmap(sys.argv[1], np.float32, "r", shape=shape)
y = np.memmap(sys.argv[1] + ".out", np.float32, "w+", shape=shape)
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + int(sys.argv[3]),) * 2)
try:
    np.array(x)
    raise SystemExit("the limit does not hold")
except MemoryError:
    pass
s = Standardizer().fit(x)
s.transform(x, out=y)
print(repr(s.mean_[0].item()), repr(s.var_[0].item()), s.n_samples_seen_)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_file_larger_than_memory_is_standardized(tmp_path: Path) -> None:
    rows, spare = 2**18, 40 * 2**20  # 64 MiB on disk, twice that in float64
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        for block in range(16):
            np.full((rows // 16, 64), block, np.float32).tofile(file)
    run = subprocess.run(
        [sys.executable, "-c", LARGER_THAN_MEMORY, str(path), str(rows), str(spare)],
        capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    mean, var, seen = run.stdout.split()
    assert int(seen) == rows
    assert (float(mean), float(var)) == pytest.approx((7.5, (16**2 - 1) / 12), rel=1e-12)
    written = np.memmap(f"{path}.out", np.float32, "r", shape=(rows, 64))
    assert written[0, 0] == np.float32(-7.5 / 21.25**0.5) and written[-1, -1] == np.float32(7.5 / 21.25**0.5)


# Over processes


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        x = table()
        s = Standardizer().fit(x[:13] if rank else x[13:]).all_reduce()
        late = Standardizer()
        (late.fit(x) if rank == 0 else late).all_reduce()
        with pytest.raises(ValueError, match="expects 4 features, got one with 3"):
            Standardizer().fit(table(columns=3 if rank else 4)).all_reduce()
        with pytest.raises(ValueError, match="not fitted yet"):
            Standardizer().all_reduce()
        torch.save((fitted(s), fitted(late)), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_end_with_the_statistics_of_all(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),))
    expected = fitted(Standardizer().fit(table()))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for found in ranks:
        for each in found:
            for ours, theirs in zip(each, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    for first, second in zip(ranks[0], ranks[1], strict=True):
        for ours, theirs in zip(first, second, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# With scikit-learn


@pytest.mark.filterwarnings("ignore:Estimator Standardizer does not inherit:UserWarning")
def test_it_passes_scikit_learns_own_checks() -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    for options in ({}, {"with_mean": False}, {"nan_policy": "raise"}):
        results = checks.check_estimator(Standardizer(**options), on_fail=None, on_skip=None)
        assert len(results) > 40
        assert {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}.keys() <= {
            "check_array_api_input"  # needs an environment variable, which scikit-learn itself does not set
        }


@pytest.mark.parametrize("name", ["set_output_transform_pandas", "global_output_transform_pandas"])
@pytest.mark.filterwarnings("ignore:X .* feature names:UserWarning")
def test_it_passes_scikit_learns_checks_of_output_in_data_frames(name: str) -> None:
    pytest.importorskip("pandas")
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    getattr(checks, f"check_{name}")("Standardizer", Standardizer())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("weighted", [True, False])
def test_results_are_those_of_standard_scaler(dtype: type, weighted: bool) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x = table().astype(dtype)
    x[5:9, 1] = np.nan
    w = np.arange(60.0) if weighted else None
    ours, theirs = Standardizer().fit(x, sample_weight=w), preprocessing.StandardScaler()
    theirs.fit(x, sample_weight=w)
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-6 if dtype == np.float32 else 1e-13
        )
    np.testing.assert_allclose(
        ours.transform(x), theirs.transform(x), rtol=1e-5 if dtype == np.float32 else 1e-12, atol=1e-6
    )
    assert ours.transform(x).dtype == dtype


@pytest.mark.parametrize("options", [{"with_mean": False}, {"with_std": False}])
def test_results_without_mean_or_deviation_are_those_of_standard_scaler(options: dict[str, bool]) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x = table()
    ours, theirs = Standardizer(**options).fit(x), preprocessing.StandardScaler(**options).fit(x)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, rtol=1e-13)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("offset", [1e8, 1e11])
def test_it_is_more_exact_than_standard_scaler_at_a_large_mean(offset: float) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    deviations = np.random.default_rng(0).integers(0, 9, (20_000, 1)).astype(float)
    exact = (deviations - deviations.mean()) / deviations.std()

    def errors(estimator: Any) -> tuple[float, float]:
        for part in np.array_split(deviations + offset, 20):
            estimator.partial_fit(part)
        of_variance = abs(estimator.var_.item() / deviations.var() - 1)
        return of_variance, np.abs(estimator.transform(deviations + offset) - exact).max()

    ours, theirs = errors(Standardizer()), errors(preprocessing.StandardScaler())
    assert max(ours) < 1e-13
    assert theirs[0] > 100 * ours[0] and theirs[1] > 100 * ours[1]


def test_it_works_in_a_pipeline_and_a_search() -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    x = table()
    search = GridSearchCV(make_pipeline(Standardizer(), Ridge()), {"standardizer__with_std": [True, False]}, cv=2)
    search.fit(x, x.sum(1))
    assert search.best_estimator_[0].n_samples_seen_ == 60
    assert search.best_estimator_[:1].get_feature_names_out().tolist() == ["x0", "x1", "x2", "x3"]
    with pytest.raises(ValueError, match="parameters among with_mean, .* got 'copy'"):
        Standardizer().set_params(copy=False)


def test_weights_reach_it_through_a_search_and_a_pipeline() -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline

    x, w = table(), np.arange(60) % 3
    with pytest.raises(RuntimeError, match=r"set_fit_request expects metadata routing to be enabled, .* Call sklearn"):
        Standardizer().set_fit_request(sample_weight=True)
    with sklearn.config_context(enable_metadata_routing=True):
        s = Standardizer().set_fit_request(sample_weight=True).set_partial_fit_request(sample_weight="w")
        requests = s.get_metadata_routing()
        assert requests.fit.requests == {"sample_weight": True}
        assert requests.partial_fit.requests == {"sample_weight": "w"}
        ridge = Ridge().set_fit_request(sample_weight=False).set_score_request(sample_weight=True)
        steps = [("scale", s), ("ridge", ridge)]
        search = GridSearchCV(Pipeline(steps), {"ridge__alpha": [1.0]}, cv=2).fit(x, x.sum(1), sample_weight=w)
        assert_same(search.best_estimator_[0], Standardizer().fit(x, sample_weight=w))
        steps[0] = ("scale", s.set_fit_request(sample_weight=False))
        ridge.set_fit_request(sample_weight=True)
        assert Pipeline(steps).fit(x, x.sum(1), sample_weight=w)[0].n_samples_seen_ == 60
        with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError, match="sample_weight"):
            Pipeline([("scale", Standardizer()), steps[1]]).fit(x, x.sum(1), sample_weight=w)


def test_a_notebook_shows_it_as_an_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.pipeline import make_pipeline

    s = Standardizer(with_std=False)
    assert "sk-top-container" in s._repr_html_() and "Standardizer" in make_pipeline(s)._repr_html_()
    text = "<pre>Standardizer(with_std=False)</pre>"
    with sklearn.config_context(display="text"):
        assert s._repr_html_() == text
    monkeypatch.delitem(sys.modules, "sklearn")
    assert s._repr_html_() == text
    with pytest.raises(RuntimeError, match="metadata routing to be enabled"):
        s.set_fit_request(sample_weight=True)


def test_missing_values_of_pandas_are_nan() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": pandas.array([1, 2, None, 6], dtype="Int64"), "b": [True, False, True, True]})
    s = Standardizer().fit(frame)
    np.testing.assert_allclose(s.mean_, [3.0, 0.75])
    assert np.isnan(s.transform(frame)).tolist() == [[False, False]] * 2 + [[True, False], [False, False]]


def test_columns_of_a_data_frame_must_be_those_of_fit() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table(), columns=list("abcd"))
    s = Standardizer().fit(frame)
    assert s.get_feature_names_out().tolist() == list("abcd")
    with pytest.raises(ValueError, match="unseen at fit time:\n- e\nFeature names seen at .* missing:\n- d"):
        s.transform(frame.rename(columns={"d": "e"}))
    with pytest.raises(ValueError, match="same order"):
        s.transform(frame[list("badc")])
    with pytest.warns(UserWarning, match="was fitted with feature names"):
        s.transform(table())


def test_results_are_data_frames_where_the_user_says() -> None:
    pandas, sklearn = pytest.importorskip("pandas"), pytest.importorskip("sklearn")
    from sklearn.compose import ColumnTransformer

    frame = pandas.DataFrame(table(), columns=list("abcd"), index=range(100, 160))
    expected = pandas.DataFrame(Standardizer().fit_transform(table()), columns=frame.columns, index=frame.index)
    s = Standardizer().set_output(transform="pandas")
    pandas.testing.assert_frame_equal(s.fit_transform(frame), expected)
    pandas.testing.assert_frame_equal(sklearn.clone(s).fit_transform(frame), expected)
    assert isinstance(s.fit_transform(torch.from_numpy(table())), torch.Tensor)
    some = ColumnTransformer([("some", Standardizer(), ["a", "c"])], verbose_feature_names_out=False)
    pandas.testing.assert_frame_equal(some.set_output(transform="pandas").fit_transform(frame), expected[["a", "c"]])
    with sklearn.config_context(transform_output="pandas"):
        pandas.testing.assert_frame_equal(Standardizer().fit_transform(frame), expected)
        plain = Standardizer().set_output(transform="default").fit_transform(frame)
    assert isinstance(plain, np.ndarray)
    with pytest.raises(ValueError, match="transform to be one of 'default', 'pandas', 'polars', got 'list'"):
        Standardizer().set_output(transform="list")
