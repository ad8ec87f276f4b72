from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from batchnorm.compare import ComparisonError, from_arrays, load
from batchnorm.compare.inputs.data import KEYS, _mean_and_deviation


def test_mnist_mini_is_balanced_and_standardized():
    data = load("mnist-mini")
    assert data.x_train.shape == (10_000, 1, 28, 28)
    assert data.x_test.shape == (2_000, 1, 28, 28)
    assert data.y_train.bincount().tolist() == [1000] * 10
    assert data.y_test.bincount().tolist() == [200] * 10
    assert data.num_classes == 10
    assert data.x_train.mean().item() == pytest.approx(0, abs=1e-4)
    assert data.x_train.std().item() == pytest.approx(1, abs=1e-4)


def test_load_reads_a_file(arrays, tmp_path: Path):
    np.savez(tmp_path / "mine.npz", **arrays)
    data = load(tmp_path / "mine.npz")
    assert data.name == "mine.npz"
    torch.testing.assert_close(data.x_train, torch.from_numpy(arrays["x_train"]))
    assert data.y_test.dtype == torch.int64
    assert data.in_shape == (8,)
    assert data.num_classes == 3


def test_load_gives_images_without_channels_one(arrays):
    for split in ("train", "test"):
        arrays[f"x_{split}"] = arrays[f"x_{split}"].reshape(-1, 2, 4)
    assert from_arrays(arrays, "x").in_shape == (1, 2, 4)


def test_bytes_are_standardized_with_the_training_statistics(arrays):
    for split, shift in (("train", 10), ("test", 90)):
        arrays[f"x_{split}"] = (np.arange(96 * 8).reshape(96, 8) % 100 + shift).astype(np.uint8)
    data = from_arrays(arrays, "x")
    mean, deviation = arrays["x_train"].mean(), arrays["x_train"].std()
    np.testing.assert_allclose(data.x_test.numpy(), (arrays["x_test"] - mean) / deviation, rtol=1e-5, atol=1e-6)


def test_a_stored_number_of_classes_permits_missing_ones(arrays):
    arrays["num_classes"] = np.int64(5)
    arrays["y_test"] = arrays["y_test"] + 2
    assert from_arrays(arrays, "x").num_classes == 5


def _set(key, change):
    def apply(arrays):
        arrays[key] = change(arrays[key].copy())

    return apply


def _put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.pop("y_test"), "must hold x_train, y_train, x_test, y_test, got .* Add y_test"),
        (_set("x_train", _put((5, 2), np.nan)), "x_train must be finite .* in 1 of 96 samples, the first at index 5"),
        (_set("x_test", _put((7, 0), np.inf)), "x_test must be finite .* at index 7"),
        (_set("x_train", lambda x: x.astype(np.int64)), "x_train must be uint8 or floating point, got int64"),
        (_set("x_train", lambda x: x[:, 0]), r"x_train must be \[N, D\].* got shape \[96\]"),
        (_set("x_train", lambda x: x[:0]), "with at least one sample"),
        (_set("x_test", lambda x: x[:, :5]), "x_test must have the sample shape and dtype of x_train"),
        (_set("y_train", lambda y: y.astype(float)), "y_train must be integers, got float64"),
        (_set("y_train", lambda y: y[:-1]), r"one label for each of the 96 samples in x_train, got shape \[95\]"),
        (_set("y_train", lambda y: y - 1), "y_train must not be negative, got -1. Number the classes from 0"),
        (_set("y_train", lambda y: y + 1), "every class from 0 .* got 3 different labels from 1 to 3"),
        (_set("y_train", _put(0, 255)), "every class from 0 .* got 4 different labels from 0 to 255"),
        (_set("y_test", _put(0, 3)), "y_test must be among the 3 classes 0 to 2, got 3"),
        (lambda a: a.update(num_classes=np.int64(2)), "y_train must be below num_classes = 2, got 2"),
        (lambda a: a.update(num_classes=np.float64(2)), "num_classes must be one integer"),
        (lambda a: a.update(y_train=0 * a["y_train"], y_test=0 * a["y_test"]), "at least two classes, got 1"),
    ],
)
def test_unusable_arrays_are_refused_with_the_reason(arrays, spoil, message):
    spoil(arrays)
    with pytest.raises(ComparisonError, match=message):
        from_arrays(arrays, "mine.npz")


def test_without_standardizing_bytes_are_divided_by_255(arrays):
    for split in ("train", "test"):
        arrays[f"x_{split}"] = (np.arange(96 * 8).reshape(96, 8) % 256).astype(np.uint8)
    data = from_arrays(arrays, "x", standardize=False)
    np.testing.assert_allclose(data.x_test.numpy(), arrays["x_test"] / 255, rtol=1e-6)
    assert data.scaling == "bytes, divided by 255"
    assert load("mnist-mini", standardize=False).x_train.max().item() == 1


def test_floating_point_values_are_never_standardized(arrays):
    for standardize in (True, False):
        data = from_arrays(arrays, "x", standardize=standardize)
        assert data.scaling == "used as they are"
        torch.testing.assert_close(data.x_train, torch.from_numpy(arrays["x_train"]))


def test_mean_and_deviation_of_many_bytes_are_numpys():
    values = np.random.default_rng(0).integers(0, 256, (2**12 + 3, 1100), np.uint8)  # in two parts
    assert _mean_and_deviation(values) == pytest.approx((values.mean(), values.std()), rel=1e-12)
    assert _mean_and_deviation(np.full((3, 4), 7, np.uint8)) == (7, 1)


def test_digits_are_scikit_learns():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    data = load("digits", standardize=False)
    assert (data.x_train.shape, data.x_test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    np.testing.assert_allclose(data.x_test.flatten(1).numpy() * 255 / 15, images[1437:], rtol=1e-5)
    assert data.y_test.tolist() == labels[1437:].tolist()


def test_without_scikit_learn_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ComparisonError, match=r"needs scikit-learn.* pip install 'batchnorm\[sklearn\]'"):
        load("digits")


def test_without_pooch_mnist_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ComparisonError, match=r"pip install 'batchnorm\[compare\]', or set data_dir"):
        load("mnist")


@pytest.fixture
def module(arrays, monkeypatch) -> ModuleType:
    made = ModuleType("my_data_of_tests")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    made.lists = lambda: {name: array.tolist() for name, array in arrays.items()}
    made.tensors = lambda: {name: torch.from_numpy(array) for name, array in arrays.items()}
    made.data = lambda: from_arrays(arrays, "mine")
    made.fails = lambda: 1 / 0
    made.nothing = lambda: None
    made.few = lambda: {"x_train": arrays["x_train"]}
    made.arrays = arrays
    return made


@pytest.mark.parametrize(("name", "called"), [("lists", "my_data_of_tests:lists"), ("tensors", None), ("data", "mine")])
def test_a_callable_gives_data(arrays, module, name, called):
    data = load(f"my_data_of_tests:{name}")
    assert data.name == called or called is None
    torch.testing.assert_close(data.x_train, torch.from_numpy(arrays["x_train"]))
    assert data.y_test.tolist() == arrays["y_test"].tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fails",
            "my_data_of_tests:fails must run without errors when it was called, but raised ZeroDivision",
        ),
        ("nothing", "my_data_of_tests:nothing must return a dict of arrays x_train, .* got NoneType"),
        ("few", "my_data_of_tests:few must hold .* Add y_train, x_test, y_test"),
        ("arrays", "data 'my_data_of_tests:arrays' must name a callable, got dict"),
        ("lost", "data 'my_data_of_tests:lost' must name an object that exists, but my_data_of_tests has no 'lost'"),
    ],
)
def test_unusable_data_callables_are_refused_with_the_reason(module, name, message):
    with pytest.raises(ComparisonError, match=message):
        load(f"my_data_of_tests:{name}")


def test_a_folder_goes_with_files_only(arrays, tmp_path: Path):
    for source in ("mnist-mini", "mine.npz", from_arrays(arrays, "mine")):
        with pytest.raises(ComparisonError, match=r"data_dir \(--data-dir\) requires data mnist or fashion-mnist, got"):
            load(source, data_dir=tmp_path)


def test_the_part_of_the_training_data_is_always_the_same(arrays):
    arrays["x_test"], arrays["y_test"] = arrays["x_test"][:30], arrays["y_test"][:30]
    torch.manual_seed(1)
    x, y = from_arrays(arrays, "x").train_part
    torch.manual_seed(2)
    again = from_arrays(arrays, "x").train_part
    assert len(x) == 30
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert len(x.unique(dim=0)) == 30
    assert all((row == torch.from_numpy(arrays["x_train"])).all(1).any() for row in x)


def test_data_move_to_a_device(data):
    moved = data.to("meta")
    assert {getattr(moved, name).device.type for name in KEYS} == {"meta"}
    assert (moved.name, moved.in_shape, moved.num_classes) == (data.name, data.in_shape, data.num_classes)
    assert data.x_train.device.type == "cpu"


def test_load_refuses_what_is_not_a_data_file(tmp_path: Path):
    with pytest.raises(
        ComparisonError, match=r"data must be mnist-mini, mnist, fashion-mnist, digits, the path of .* 'minst'"
    ):
        load("minst")
    with pytest.raises(ComparisonError, match="data must be a file that exists"):
        load(tmp_path / "none.npz")
    for content in ("no archive", ""):  # numpy raises EOFError for an empty file
        (tmp_path / "text.npz").write_text(content)
        with pytest.raises(ComparisonError, match=r"text\.npz must be a readable \.npz file"):
            load(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", x_train=np.array([{}], dtype=object))
    with pytest.raises(ComparisonError, match=r"objects\.npz must be a readable \.npz file without Python objects"):
        load(tmp_path / "objects.npz")
