"""The estimator protocol of scikit-learn, without a dependency on it."""

from __future__ import annotations

import copy
import html
import inspect
import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from batchnorm import _options
from batchnorm.standardize import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OUTPUTS = ("default", "pandas", "polars")
_UNCHANGED = "$UNCHANGED$"  # scikit-learn's word

E = TypeVar("E", bound="Estimator")


class NotFittedError(ValueError, AttributeError):
    """A `Standardizer` was used before it was fitted."""


class Estimator:
    """The parameters, feature names, requests and tags of an estimator. Names of fitted attributes end in `_`."""

    with_mean: bool
    nan_policy: str
    n_features_in_: int

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters
                if name != "self"}  # fmt: skip

    def set_params(self: E, **params: Any) -> E:
        """Set arguments of the constructor by name, for the next `fit`."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(
                    f"Standardizer expects parameters among {', '.join(known)}, got {name!r}. Choose one of them."
                )
            setattr(self, name, value)
        return self

    def set_output(self: E, *, transform: str | None = None) -> E:
        """Choose the type that `transform` returns for arrays `[N, C]` and data frames; tensors stay tensors.

        Args:
            transform: "default" for arrays, "pandas" or "polars" for data frames, None for no change. Before the first
                call of this method, scikit-learn's setting applies (`sklearn.set_config(transform_output=...)`).
        """
        if transform is not None:
            _options.check_choice("Standardizer.set_output", "transform", transform, _OUTPUTS)
            self._sklearn_output_config = {"transform": transform}  # scikit-learn's clone copies this name
        return self

    def _framed(self, result: Any, X: object) -> Any:
        """Return the result in the type that the user chose."""
        sklearn = sys.modules.get("sklearn")  # scikit-learn has a setting only if it was imported
        everywhere = {"transform": "default" if sklearn is None else sklearn.get_config()["transform_output"]}
        wanted = getattr(self, "_sklearn_output_config", everywhere)["transform"]
        if wanted != "default" and sparse.is_sparse(result):
            raise ValueError(
                f"Standardizer expects dense data for output in {wanted}, got sparse data. Use "
                'set_output(transform="default").'
            )
        if wanted == "default" or not isinstance(result, np.ndarray) or result.ndim != 2:
            return result
        names = self.get_feature_names_out()
        if wanted == "pandas":
            import pandas  # type: ignore[import-untyped]

            return pandas.DataFrame(result, index=getattr(X, "index", None), columns=names, copy=False)
        import polars  # type: ignore[import-not-found]

        return polars.DataFrame(result, schema=list(names), orient="row")

    def set_fit_request(self: E, *, sample_weight: bool | str | None = _UNCHANGED) -> E:
        """Choose whether pipelines and searches of scikit-learn pass `sample_weight` to `fit`.

        Args:
            sample_weight: True to request it, False to ignore it, None to raise an error if it is given, or the name
                under which the user gives it.

        Raises:
            RuntimeError: metadata routing is not enabled: `sklearn.set_config(enable_metadata_routing=True)`.
        """
        return self._set_request("fit", sample_weight)

    def set_partial_fit_request(self: E, *, sample_weight: bool | str | None = _UNCHANGED) -> E:
        """Choose the same for `partial_fit`."""
        return self._set_request("partial_fit", sample_weight)

    def _set_request(self: E, method: str, sample_weight: bool | str | None) -> E:
        sklearn = sys.modules.get("sklearn")  # routing can only be enabled if it was imported
        if sklearn is None or not sklearn.get_config()["enable_metadata_routing"]:
            raise RuntimeError(
                f"Standardizer.set_{method}_request expects metadata routing to be enabled, and it is not. Call "
                "sklearn.set_config(enable_metadata_routing=True) first."
            )
        if sample_weight != _UNCHANGED:
            requests = self.get_metadata_routing()
            getattr(requests, method).add_request(param="sample_weight", alias=sample_weight)
            self._metadata_request = requests  # scikit-learn's clone copies this name
        return self

    def get_metadata_routing(self) -> Any:
        """Return the requests of `fit` and `partial_fit`, as scikit-learn's `MetadataRequest`."""
        from sklearn.utils.metadata_routing import MetadataRequest  # type: ignore[import-untyped]

        if hasattr(self, "_metadata_request"):
            return copy.deepcopy(self._metadata_request)
        requests = MetadataRequest(owner=type(self).__name__)
        for method in (requests.fit, requests.partial_fit):
            method.add_request(param="sample_weight", alias=None)
        return requests

    def _repr_html_(self) -> str:
        """Return scikit-learn's diagram for notebooks, or the text if scikit-learn is not imported or shows text."""
        sklearn = sys.modules.get("sklearn")
        if sklearn is None or sklearn.get_config()["display"] != "diagram":
            return f"<pre>{html.escape(repr(self))}</pre>"
        from sklearn.utils import estimator_html_repr  # type: ignore[import-untyped]

        return str(estimator_html_repr(self))

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """Return the names of the output features: those of the input, or x0, x1, ..."""
        self._check_fitted()
        fitted: NDArray[Any] | None = getattr(self, "feature_names_in_", None)
        if input_features is None:
            return fitted if fitted is not None else np.array([f"x{i}" for i in range(self.n_features_in_)], object)
        names = np.asarray(input_features, dtype=object)
        if fitted is not None and list(names) != list(fitted):
            raise ValueError("input_features is not equal to feature_names_in_. Leave it out.")
        if len(names) != self.n_features_in_:
            raise ValueError(
                f"input_features should have length equal to {self.n_features_in_}, got {len(names)}. Pass one name "
                "for each feature."
            )
        return names

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_features")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import (
            InputTags,
            Tags,
            TargetTags,
            TransformerTags,
        )  # fmt: skip

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(three_d_array=True, sparse=not self.with_mean, allow_nan=self.nan_policy != "raise"),
        )

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [f"{k}={v!r}" for k, v in self.get_params().items() if v is not defaults[k].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _check_fitted(self) -> None:
        if not hasattr(self, "_features"):
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. Call fit with data before using it."
            )

    def _names_of(self, X: object) -> NDArray[Any] | None:
        """Return the column names of a data frame, and check that they are those of `fit`."""
        columns = getattr(X, "columns", None)
        names = None if columns is None else np.asarray(columns, dtype=object)
        if names is not None and not all(isinstance(name, str) for name in names):
            names = None
        fitted: NDArray[Any] | None = getattr(self, "feature_names_in_", None)
        if not hasattr(self, "_features"):
            return names
        if names is None and fitted is not None:
            warnings.warn(
                f"X does not have valid feature names, but {type(self).__name__} was fitted with feature names",
                UserWarning,
                stacklevel=4,
            )
        if names is not None and fitted is None:
            warnings.warn(
                f"X has feature names, but {type(self).__name__} was fitted without feature names",
                UserWarning,
                stacklevel=4,
            )
        if names is not None and fitted is not None and list(names) != list(fitted):
            raise ValueError(_name_message(list(names), list(fitted)))
        return names

    def _unfitted(self: E) -> E:
        fresh = copy.copy(self)
        fresh._forget()
        return fresh

    def _forget(self) -> None:
        for name in [name for name in vars(self) if name in ("_features", "_ndim") or _is_fitted_name(name)]:
            delattr(self, name)


def _is_fitted_name(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


def _name_message(names: list[str], fitted: list[str]) -> str:
    message = "The feature names should match those that were passed during fit.\n"
    for title, listed in (
        ("Feature names unseen at fit time", sorted(set(names) - set(fitted))),
        ("Feature names seen at fit time, yet now missing", sorted(set(fitted) - set(names))),
    ):
        if listed:
            shown = listed[:5] + ["..."] * (len(listed) > 5)
            message += "\n".join((f"{title}:", *(f"- {name}" if name != "..." else name for name in shown), ""))
    if set(names) == set(fitted):
        message += "Feature names must be in the same order as they were in fit.\n"
    return message
