"""An estimator that standardizes a data set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import _options
from batchnorm.models.execution.processes import Processes
from batchnorm.nn import frozen
from batchnorm.standardize import data, sparse
from batchnorm.standardize.data import Array
from batchnorm.standardize.features import Features
from batchnorm.standardize.layer import frozen_layer
from batchnorm.standardize.protocol import Estimator

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAN_POLICIES = ("raise", "omit", "propagate")


class Standardizer(Estimator):
    """Scale every feature or channel of a data set to zero mean and unit variance: `(x - mean)/std`.

    The statistics are those of batch normalization, but of a whole data set instead of a batch: over samples for
    `[N, C]`, over samples and positions for data such as images `[N, C, H, W]`. The standard deviation is the biased
    one. Methods and results are those of scikit-learn's `StandardScaler`. Constant features are centered but not
    scaled. Data may be tensors on any device, NumPy arrays, memory maps, data frames, sparse matrices of SciPy, or
    iterables of batches such as a `DataLoader`. Only a part of the data is converted to float64 at a time. The class
    works in scikit-learn's pipelines and searches, with metadata routing, but does not require scikit-learn.

    Args:
        with_mean: Whether to subtract the mean. Sparse data need False, because their zeros would not stay zeros.
        with_std: Whether to divide by the standard deviation.
        nan_policy: "omit" excludes NaN from the statistics, keeps it in the result, and rejects infinity, as
            `StandardScaler` does. "raise" also rejects NaN. "propagate" accepts both. A masked value of a NumPy masked
            array counts as NaN, and the result has the same mask.
        channel_axis: The axis of features: 1 for `[N, C, *S]`, -1 for channels last.

    Attributes:
        mean_: The mean, float64 `[C]`.
        var_: The biased variance, float64 `[C]`.
        scale_: The divisor, float64 `[C]`: the standard deviation, or 1 for constant features and without `with_std`.
        n_samples_seen_: Values per feature (N·H·W for images, the sum of the weights if given); an array if features
            have different numbers of NaN.
        n_features_in_: C.
        feature_names_in_: The column names of the data frame that it was fitted on, if any.

    Raises:
        TypeError: the data are a sparse tensor, or batches are dicts; `out` holds integers.
        ValueError: data are empty, not numbers, of the wrong shape or not finite; sparse data with `with_mean=True`; a
            weight is negative.
        NotFittedError: data are transformed before `fit`.

    Numerics: statistics are computed in float64, as deviations from a value near the mean, and merged by Chan's
        formula. The mean is stored as two float64 values. Neither a large mean nor many parts reduce accuracy. Results
        are computed in float64 and rounded once to the data's dtype. Integers give float64 arrays, or tensors of the
        default dtype. Results have no gradient; those of the layer from `to_layer` do.

    Examples:
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> Standardizer().fit_transform(x)
        array([[-1., -1.],
               [ 1.,  1.]])
        >>> images = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
        >>> layer = Standardizer().fit(images).to_layer()
        >>> layer(images.float()).mean((0, 2, 3)).abs().max() < 1e-5
        tensor(True)
    """

    def __init__(
        self, *, with_mean: bool = True, with_std: bool = True, nan_policy: str = "omit", channel_axis: int = 1
    ) -> None:
        self.with_mean = with_mean
        self.with_std = with_std
        self.nan_policy = nan_policy
        self.channel_axis = channel_axis

    # Fitting

    def fit(self, X: Any, y: object = None, sample_weight: Any = None) -> Standardizer:
        """Measure the data, and discard earlier measurements.

        Args:
            X: A tensor, array, memory map or data frame `[N, C]` or `[N, C, *S]`, a sparse matrix `[N, C]`, or an
                iterable of such batches. A batch may be a tuple whose first item is the data.
            y: Ignored.
            sample_weight: The weight of each sample, `[N]`, >= 0; for arrays only.
        """
        fresh = self._unfitted().partial_fit(X, y, sample_weight)
        self._forget()
        vars(self).update(vars(fresh))
        return self

    def partial_fit(self, X: Any, y: object = None, sample_weight: Any = None) -> Standardizer:
        """Add further data to the measurements, with the arguments of `fit`.

        If any of the data are invalid, the earlier measurements do not change.
        """
        _options.check_choice("Standardizer", "nan_policy", self.nan_policy, _NAN_POLICIES)
        names = self._names_of(X)
        if data.is_batches(X):
            if sample_weight is not None:
                raise ValueError(
                    "Standardizer expects sample_weight with an array only, got it with batches. Call partial_fit "
                    "for each batch with its own weights."
                )
            batches: Iterable[Array] = map(data.batch_of, X)
        else:
            batches = (data.as_array(X),)
        measured: Features | None = getattr(self, "_features", None)
        ndim = None
        for x in batches:
            x = self._checked(x, None if measured is None else len(measured.mean))
            ndim = x.ndim
            found = self._measure(x, sample_weight)
            measured = found if measured is None else measured.merge(found)
        if measured is None or ndim is None:
            raise ValueError("Standardizer expects at least one batch, got empty data. Pass more data.")
        settled = copy.copy(self)
        if not hasattr(self, "_features") and names is not None:
            settled.feature_names_in_ = names
        settled._set_fitted(measured, ndim)
        vars(self).update(vars(settled))
        return self

    def _measure(self, x: Array, sample_weight: Any) -> Features:
        weights = None if sample_weight is None else data.weights(sample_weight, x.shape[0])
        if sparse.is_sparse(x):
            self._check_finite(sparse.values(x))
            return sparse.moments(x, weights, omit_nan=self.nan_policy == "omit")
        x = _channels_second(x, self.channel_axis)
        measured = Features.empty(x.shape[1])
        for block in data.blocks(x):
            here = None if weights is None else weights[block]
            measured = measured.merge(self._measure_block(x[block], here, measured))
        return measured

    def _measure_block(self, x: Array, weights: Tensor | None, before: Features) -> Features:
        def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
            for part in data.parts(x):
                values = data.float64(x[part])
                if weights is not None:  # values with a weight of 0 are checked, too
                    self._check_finite(values)
                yield values, None if weights is None else weights[part].to(values.device)

        values, _ = next(parts())
        near = torch.where(before.count > 0, before.mean, values.mean([0, *range(2, values.dim())]).cpu())
        found = Features.of(parts, near.nan_to_num(0.0, 0.0, 0.0))
        rest = ~found.finite
        if rest.any():
            incomplete = Features.empty(int(rest.sum()))
            for values, here in parts():
                self._check_finite(values)
                chosen = values[:, rest.to(values.device)]
                incomplete = incomplete.merge(Features.of_incomplete(chosen, here, omit_nan=self.nan_policy == "omit"))
            found = found.replaced(rest, incomplete)
        return found

    def _set_fitted(self, measured: Features, ndim: int) -> None:
        self._features, self._ndim = measured, ndim
        self.n_features_in_ = len(measured.mean)
        seen = measured.count.numpy()
        same = bool((seen == seen[0]).all())
        self.n_samples_seen_ = _int_if_whole(seen[0].item()) if same else seen.copy()
        self.mean_: NDArray[np.float64] = torch.where(measured.count > 0, measured.mean, float("nan")).numpy()
        self.var_: NDArray[np.float64] = measured.var.numpy()
        scale = measured.var.sqrt()
        # Treat a deviation below float64's rounding as zero, because (x - mean)² of a constant feature may exceed 0.
        rounding = measured.mean.abs() * 2 * torch.finfo(torch.float64).eps
        scale = torch.where(scale <= rounding, 1.0, scale)
        self.scale_: NDArray[np.float64] = (scale if self.with_std else torch.ones_like(scale)).numpy()

    # Transforming

    def transform(self, X: Any, out: Array | None = None) -> Any:
        """Return `(x - mean_)/scale_` in x's dtype.

        Args:
            X: As in `fit`. For batches, the result is an iterator of standardized batches. The other items of a tuple
                stay unchanged.
            out: An array, memory map or tensor to write to, for data larger than memory. It has x's shape and a
                floating-point dtype, and may be x itself.

        Returns:
            An array, or the type chosen by `set_output`. For a tensor, a tensor on its device. For a sparse matrix, one
            in CSR or CSC. `out` if given.
        """
        result = self._apply(X, out, inverse=False)
        return result if out is not None else self._framed(result, X)

    def inverse_transform(self, X: Any, out: Array | None = None) -> Any:
        """Return `x·scale_ + mean_`, the inverse of `transform`, with the same arguments and results."""
        return self._apply(X, out, inverse=True)

    def fit_transform(self, X: Any, y: object = None, sample_weight: Any = None) -> Any:
        """Call `fit` and then `transform` with the same data, which must not be an iterator, because both read it."""
        if data.is_batches(X) and iter(X) is X:
            raise ValueError(
                f"Standardizer.fit_transform expects data that can be read twice, got an iterator "
                f"({type(X).__name__}). Pass a list or a DataLoader, or call fit and transform with one iterator each."
            )
        return self.fit(X, y, sample_weight).transform(X)

    def _apply(self, X: Any, out: Array | None, *, inverse: bool) -> Any:
        self._check_fitted()
        if data.is_batches(X):
            if out is not None:
                raise ValueError("Standardizer expects out with an array only, got it with batches. Pass it per batch.")
            return self._apply_to_batches(X, inverse)
        self._names_of(X)
        x = self._checked(data.as_array(X), self.n_features_in_, least=0)
        if sparse.is_sparse(x):
            if out is not None:
                raise ValueError("Standardizer expects out with dense data only, got it with sparse data. Omit it.")
            self._check_finite(sparse.values(x))
            return sparse.scaled(x, self.scale_, divide=not inverse)
        if out is None:
            out = data.new_like(x)
        else:  # check everything before writing anything
            data.check_out(out, x)
            for part in data.parts(x):
                self._check_finite(data.float64(x[part]))
        source, target = _channels_second(x, self.channel_axis), _channels_second(out, self.channel_axis)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        means = (torch.from_numpy(self.mean_), self._features.mean_low) if self.with_mean else ()
        vectors = [v.view(shape) for v in (torch.from_numpy(self.scale_), *means)]
        change_ = _restore_ if inverse else _standardize_
        for part in data.parts(source):
            values = data.float64(source[part])
            self._check_finite(values)
            data.write(target, part, change_(values, *(v.to(values.device) for v in vectors)))
        if isinstance(out, np.ma.MaskedArray):
            out.mask = data.mask_of(x)
        return out

    def _apply_to_batches(self, X: Iterable[Any], inverse: bool) -> Iterator[Any]:
        for batch in X:
            done = self._apply(data.batch_of(batch), None, inverse=inverse)
            yield (done, *batch[1:]) if isinstance(batch, (tuple, list)) else done

    # Merging

    def merge(self, *others: Standardizer) -> Standardizer:
        """Return a new `Standardizer` with the arguments of this one, as if fitted on the data of all.

        Raises:
            NotFittedError: one of them is not fitted.
            ValueError: they have different numbers of features.
        """
        self._check_fitted()
        merged, measured = copy.copy(self), self._features
        for other in others:
            other._check_fitted()
            if other.n_features_in_ != self.n_features_in_:
                raise ValueError(
                    f"Standardizer.merge expects {self.n_features_in_} features, got one with {other.n_features_in_}. "
                    "Merge only estimators with the same features."
                )
            measured = measured.merge(other._features)
        merged._set_fitted(measured, self._ndim)
        return merged

    def all_reduce(self, process_group: Any = None) -> Standardizer:
        """Merge the statistics of all ranks of `torch.distributed`, so that they are bitwise equal on every rank.

        Call it once, after each rank has fitted its share of the data. A rank may have no data. Without an initialized
        process group, this does nothing.

        Raises:
            NotFittedError: no rank is fitted.
            ValueError: ranks have different numbers of features.
        """
        if not (dist.is_available() and dist.is_initialized()):
            self._check_fitted()
            return self
        with Processes("Standardizer.all_reduce", process_group) as processes:
            mine = copy.copy(self) if hasattr(self, "_features") else None
            fitted: list[Any] = [other for other in processes.gather(mine) if other is not None]
            if not fitted:
                self._check_fitted()
            merged = fitted[0].merge(*fitted[1:])
        if hasattr(merged, "feature_names_in_"):
            self.feature_names_in_ = merged.feature_names_in_
        self._set_fitted(merged._features, merged._ndim)
        return self

    def to_layer(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> frozen.FrozenBatchNorm:
        """Return a frozen batch normalization that computes `transform`, as the first layer of a model.

        The model then accepts raw data, and `batchnorm.fold` can fold the layer into the first convolution or linear
        layer. The layer's channels are on axis 1 for any `channel_axis`.

        Args:
            dtype: The dtype of its buffers; by default torch's default.
            device: The device of its buffers.

        Raises:
            ValueError: a feature has no finite mean or standard deviation, or the dtype cannot represent them.

        Numerics: if the mean is m standard deviations, its rounding to float32 shifts the result by up to 6e-8·m. If a
            variance is outside the range of the dtype, the layer has a weight that contains the rest of the scale.
        """
        self._check_fitted()
        if not (np.isfinite(self.mean_).all() and np.isfinite(self.scale_).all()):
            raise ValueError(
                "Standardizer.to_layer expects finite statistics of every feature, got NaN or infinity. Fit it on data "
                "with finite values of every feature."
            )
        scale = torch.from_numpy(self.scale_)
        mean = torch.from_numpy(self.mean_) if self.with_mean else torch.zeros_like(scale)
        return frozen_layer(mean, scale, self._ndim, dtype or torch.get_default_dtype(), device)

    # Checks

    def _checked(self, x: Array, features: int | None, least: int = 1) -> Array:
        """Check the shape of the array, and return it."""
        shape = tuple(x.shape)
        if self.with_mean and sparse.is_sparse(x):
            raise ValueError(
                f"Standardizer expects dense data or with_mean=False, got sparse data ({type(x).__name__}). Cannot "
                "center sparse matrices: pass with_mean=False, which keeps the zeros, or x.toarray()."
            )
        if x.ndim < 2 or not -x.ndim <= self.channel_axis < x.ndim or self.channel_axis in (0, -x.ndim):
            raise ValueError(
                f"Standardizer expects data of shape [N, C] or [N, C, *S] with features on axis {self.channel_axis}, "
                f"got {list(shape)}. Reshape your data, x.reshape(-1, 1) for a single feature and x.reshape(1, -1) "
                "for a single sample."
            )
        width = shape[self.channel_axis]
        if width == 0:
            raise ValueError(
                f"Standardizer expects features, found array with 0 feature(s) (shape={shape}) while a minimum of 1 "
                "is required. Pass data with at least one feature."
            )
        if self.nan_policy == "raise" and data.mask_of(x).any():
            raise ValueError(
                f"Standardizer expects no masked values, got {int(data.mask_of(x).sum())} of them. "
                "nan_policy='omit' leaves them out of the statistics; x.filled(value) replaces them."
            )
        if shape[0] < least:
            raise ValueError(
                f"Standardizer expects samples, found array with 0 sample(s) (shape={shape}) while a minimum of "
                f"{least} is required. Pass data with at least one sample."
            )
        if features is not None and width != features:
            raise ValueError(
                f"X has {width} features, but Standardizer is expecting {features} features as input. "
                "Pass data with the features that it was fitted on."
            )
        return x

    def _check_finite(self, values: Tensor) -> None:
        if self.nan_policy == "propagate" or bool(values.sum().isfinite()):
            return
        if values.isinf().any():
            raise ValueError(
                "Standardizer expects finite values, got infinity in its data. Remove them, or use "
                "nan_policy='propagate'."
            )
        if self.nan_policy == "raise" and values.isnan().any():
            raise ValueError(
                "Standardizer expects finite values, got NaN in its data. nan_policy='omit' leaves NaN out of the "
                "statistics."
            )


def _standardize_(x: Tensor, scale: Tensor, mean: Tensor | None = None, low: Tensor | None = None) -> Tensor:
    if mean is not None and low is not None:
        x.sub_(mean).sub_(low)
    return x.div_(scale)


def _restore_(x: Tensor, scale: Tensor, mean: Tensor | None = None, low: Tensor | None = None) -> Tensor:
    x.mul_(scale)
    return x if mean is None or low is None else x.add_(low).add_(mean)


def _channels_second(x: Array, axis: int) -> Array:
    return x.movedim(axis, 1) if isinstance(x, Tensor) else np.moveaxis(x, axis, 1)


def _int_if_whole(count: float) -> int | float:
    return int(count) if count.is_integer() else count
