"""The Standardizer with scikit-learn: its checks, pipelines, searches, and data frames."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.standardize import Standardizer
from tests.standardize.tables import assert_same, table


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
