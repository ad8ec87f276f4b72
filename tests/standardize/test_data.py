"""The data that a Standardizer reads: of every kind, in parts, larger than memory, over processes, and wrong."""

from __future__ import annotations

import copy
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
from torch.testing import assert_close

from batchnorm.standardize import Standardizer
from batchnorm.standardize import data as data_module
from tests.processes import spawn
from tests.standardize.tables import assert_same, fitted, table

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


# Larger than memory

LARGER_THAN_MEMORY = """
import resource, sys
import numpy as np, torch
from batchnorm.standardize import Standardizer
Standardizer().fit_transform(np.ones((9, 4)))  # load everything that is loaded at the first use
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
