"""Set the moving statistics of a Keras model to the population statistics of data."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from batchnorm._options import check_choice, check_prior
from batchnorm.keras.models.batches import Batches, Forward, default_forward
from batchnorm.keras.models.copying import IN_PLACE, copied
from batchnorm.keras.models.layers import Found, as_numpy, check_model, describe, largest
from batchnorm.keras.models.observe import Observer, Statistics, put_statistics, statistics_of
from batchnorm.keras.passes import sequential, single
from batchnorm.keras.surgery.replacement import start_renorm
from batchnorm.models.report import Change, LayerStatistics, Recalibration, Result
from batchnorm.models.selection import Selection, select
from batchnorm.reference.statistics import Moments, merge

_CALLER = "recalibrate"


def recalibrate(
    model: keras.layers.Layer,
    data: Any,
    *,
    only: Selection | None = None,
    passes: str = "single",
    prior: float = 0.0,
    forward: Forward | None = None,
    batch_size: int = 32,
    max_samples: int | None = None,
    inplace: bool = False,
) -> Result[Recalibration]:
    """Set the moving statistics of a trained model to the population statistics of `data`.

    `moving_mean` becomes the mean of all values that reach a layer, and `moving_variance` their biased variance M2/m,
    as Keras defines it. Deviations within and between batches both count, so the result does not depend on the batch
    size. Use this function for weights that were averaged, fine-tuned or pruned, for moving averages that lag behind
    (Keras's default momentum of 0.99 takes some 500 steps), and for data of another domain.

    All other layers run in evaluation. Masks are respected. If anything fails, the model does not change.

    Args:
        model: A built Keras model.
        data: An array, a dict of arrays, or an iterable of batches: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            loader of PyTorch, a list, or a generator. Of a tuple `(x, y)`, x is used.
        only: The layers to recalibrate, as in `convert`. By default, all layers except frozen ones (`trainable=False`).
        passes: "single" makes one pass, and normalizes each batch by its own statistics, as in training. "sequential"
            goes layer by layer from the input. Each layer gets the output of the recalibrated layers before it, as in
            evaluation. For each layer, this runs the model on all data, up to that layer. It keeps the data in memory.
        prior: The weight of the former statistics, as a number of samples: `(prior·former + n·measured)/(prior + n)`,
            with n samples of data. 0 discards the former ones.
        forward: `forward(model, batch)` calls the model. By default, it calls `model(x, training=False)`.
        batch_size: The number of samples in a batch, for data that are arrays.
        max_samples: Stop after the batch that reaches this number of samples.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model, which is not compiled if it is a copy, and a `Recalibration`: the change of each layer, and the
        moments of every layer and call.

    Raises:
        TypeError: the model is not a Keras model; data are none of these.
        ValueError: an argument is out of range; no layer is selected or reached; a batch has a single value per
            channel and `passes` is "single"; values are not finite; data are empty; the model cannot be copied.

    Numerics: moments are float64, merged as by Chan et al. 1979, and rounded once to the variables' dtype.

    Source: Wu & Johnson 2021, Rethinking "Batch" in BatchNorm (population statistics); Li et al. 2016, Revisiting
        Batch Normalization for Practical Domain Adaptation (AdaBN).

    Examples:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
        >>> data = np.array([[1.0], [2.0], [3.0], [4.0], [10.0]])
        >>> model, report = recalibrate(model, data, batch_size=3)
        >>> float(model.layers[0].moving_mean[0]), float(model.layers[0].moving_variance[0])
        (4.0, 10.0)
    """
    check_prior(_CALLER, prior)
    check_choice(_CALLER, "passes", passes, ("single", "sequential"))
    batches = Batches(_CALLER, data, batch_size, max_samples)
    _select(model, only)  # fail before anything is copied
    if not inplace:
        model = copied(_CALLER, model, advice=IN_PLACE).model
    selected, left = _select(model, only)
    before = [statistics_of(found.module) for found in selected]

    def own_statistics(number: int, moments: Moments) -> Statistics:
        return _own_statistics(selected[number], moments)

    def new_statistics(number: int, moments: Moments) -> Statistics:
        return _new_statistics(selected[number], before[number], moments, prior, batches.samples)

    observer, call_model = Observer(model, selected), forward or default_forward(_CALLER)
    if passes == "single":
        calls = single(observer, batches, call_model, own_statistics)
    else:
        calls = sequential(observer, batches, call_model, new_statistics)
    if not batches.count:
        raise ValueError(f"{_CALLER} expects at least one batch, got empty data. Pass more data.")
    layers, changed = [], []
    for number, found in enumerate(selected):
        own = [moments for call, moments in sorted(calls.items()) if call.layer == number]
        total = merge(own) if own else None
        if total is None or not total.count > 0:
            reason = "all its values are masked" if own else "not reached by the data"
            left.append(Change.unchanged(found.path, describe(found.module), reason))
            continue
        new = new_statistics(number, total)
        layers.append(LayerStatistics(found.paths, (total,), tuple((each,) for each in own), *before[number], *new))
        changed.append(Change(found.path, describe(found.module), layers[-1].change(), layers[-1].remarks()))
    if not layers:
        raise ValueError(
            f"{_CALLER} expects the data to reach the selected layers, got values at none of them. Pass a forward= "
            "that calls them."
        )
    report = Recalibration(_CALLER, tuple(changed), tuple(left), tuple(layers), passes, batches.count, batches.samples)
    result = Result(model, report)
    _write({layer.path: Statistics(layer.mean, layer.var) for layer in layers}, selected)
    return result


def _select(model: Any, only: Selection | None) -> tuple[list[Found], list[Change]]:
    every = check_model(_CALLER, model)
    chosen = select(_CALLER, every, only)
    selected, left = [], []
    for found in every:
        frozen = only is None and not found.module.trainable
        if found in chosen and not frozen:
            selected.append(found)
        else:
            left.append(Change.unchanged(found.path, describe(found.module), "frozen" if frozen else "not named"))
    if not selected:
        raise ValueError(
            f"{_CALLER} expects a model with batch normalization to recalibrate, got {model.name!r}, in which all is "
            "frozen. Name frozen layers in only= to include them."
        )
    return selected, left


def _own_statistics(found: Found, moments: Moments) -> Statistics:
    """Return the statistics of one batch, by which training would normalize."""
    if moments.count <= 1:
        raise ValueError(
            f"{_CALLER} expects more than one value per channel in every batch, got one at {found.path!r}. One value "
            'has no variance: use larger batches, or passes="sequential", which accepts any batch.'
        )
    own = Statistics(moments.mean, moments.var)
    _check_finite(found, own)
    return own


def _new_statistics(found: Found, before: Statistics, total: Moments, prior: float, samples: int) -> Statistics:
    weight = samples / (prior + samples)
    mean, var = (old + weight * (new - old) for old, new in zip(before, (total.mean, total.var), strict=True))
    if not prior:
        mean, var = total.mean, total.var
    new = Statistics(mean, var)
    _check_finite(found, new)
    return new


def _check_finite(found: Found, statistics: Statistics) -> None:
    """Check that the layer's variables can hold the statistics."""
    dtype = found.module.variable_dtype
    for what, values in zip(("mean", "variance"), statistics, strict=True):
        if not (np.abs(values) <= largest(dtype)).all():
            raise ValueError(
                f"{_CALLER} expects finite values at every layer, got a {what} that is not finite in {dtype} at "
                f"{found.path!r}. Check the data and the layers before it for NaN and overflow."
            )


def _write(statistics: dict[str, Statistics], layers: list[Found]) -> None:
    """Write the statistics of all layers, or, after an exception, of none."""
    former = [(variable, as_numpy(variable)) for found in layers for variable in found.module.non_trainable_variables]
    try:
        for found in layers:
            if found.path in statistics:
                put_statistics(found.module, statistics[found.path])
                if getattr(found.module, "renorm", False):
                    start_renorm(found.module)
    except BaseException:
        for variable, values in former:
            variable.assign(values)
        raise
