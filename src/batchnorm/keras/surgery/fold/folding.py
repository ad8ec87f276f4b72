"""Fold the batch normalization of a Keras model, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
from keras import tree

from batchnorm.keras.models.copying import Copy, copied, is_graph
from batchnorm.keras.models.layers import Found, as_numpy, check_model, describe, norm_layers, reason_of
from batchnorm.keras.surgery.fold.linear import Linear
from batchnorm.keras.surgery.fold.search import Search, has_activation
from batchnorm.keras.surgery.fold.trial import Values, in_float64, random_inputs, values_of
from batchnorm.models.execution.progress import PATIENCE, Bar, bar
from batchnorm.models.gate import AMPLIFICATION, Error, Results, check_whole, tolerance_for
from batchnorm.models.report import FLOAT64, Change, FoldReport, Result


def fold(
    model: keras.Model,
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
    progress: bool | None = None,
) -> Result[FoldReport]:
    """Return a copy for inference without the batch normalization that other layers can absorb.

    A batch normalization is absorbed by the convolution (transposed, depthwise and separable ones too) or dense layer
    that computes its input, or by those that read its result, also past dropout, pooling, padding, cropping,
    flattening and concatenations where that is exact. After an addition, subtraction, average, maximum or minimum, the
    layers of all branches absorb it. A nested model is folded together with the layers around it if it is called once,
    without arguments. A convolution with an activation only absorbs one that comes before it. A shift does not pass
    padding with zeros. An activation of the batch normalization becomes a layer of its own.

    The copy is compared with the model, and the model in float64, on random inputs and on the example, at the result of
    each fold and of the model. A fold that adds more error than `batchnorm.fold` allows is left out.

    Args:
        model: A built Sequential or functional model, also with models inside; it stays unchanged.
        example_inputs: Inputs of the model, as arrays in the structure that it takes. By default only random inputs are
            used, of the model's shapes; open sizes are 32.
        tolerance: The relative error that one fold may add: by default 1e-5 in float32, 1e-12 in float64, 1e-2 in
            float16 and 5e-2 in bfloat16. Twice the model's own error is always allowed.
        progress: Whether to show a progress bar on standard error after 3 seconds (needs rich); by default, if that is
            a terminal and rich is installed.

    Returns:
        The copy, which is not compiled, and the report: the layers that were removed, and the reason why each other one
        stays.

    Raises:
        TypeError: the model is not a Keras model.
        ValueError: it is a subclassed model, whose graph Keras does not know; it has no batch normalization or is not
            built; a layer cannot be created from its configuration; it does not take the example.
        ImportError: progress is true, and rich is not installed.
        FoldError: the copy's results are not the model's.

    Source: the tutorial, "Fusing into a convolution".

    Examples:
        >>> from keras import layers
        >>> model = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"),
        ...                           layers.BatchNormalization(name="norm"), layers.ReLU()])
        >>> folded, report = fold(model)
        >>> [layer.name.rstrip("_0123456789") for layer in folded.layers], report.changed[0].now
        (['conv', 're_lu'], 'in conv')
    """
    found = check_model("fold", model)
    if not is_graph(model):
        raise ValueError(
            f"fold expects a Sequential or functional model, got {type(model).__name__} {model.name!r}, whose call is "
            "Python code. Fold the functional models inside it, or build it from keras.Input."
        )
    with bar("fold", progress, after=PATIENCE) as shown:
        return _verified(model, found, _Runs(model, example_inputs, tolerance, shown), shown)


def _verified(model: keras.Model, found: list[Found], runs: _Runs, shown: Bar) -> Result[FoldReport]:
    """Return the copy without the folds that add too much error."""
    refused: dict[int, str] = {}
    while True:
        shown.during("folding")
        search = Search(model, refused)
        copy = _folded(model, search)
        after = runs.of(copy, [tensor for each in search.folds for tensor in each.same])
        wrong = next((each for each in search.folds if not runs.allowed(after, each.same)), None)
        if wrong is None:
            break
        error = runs.error(after, wrong.same)
        refused[id(wrong.norm.module)] = (
            f"folding it has an error of {error.after:.1e}, the layer itself of {error.before:.1e}"
        )
    whole = runs.error(after, model.outputs)
    check_whole(whole, runs.tolerance)
    paths = {id(layer.module): layer.path for layer in norm_layers(model, lambda layer: True)}
    absorbed = {id(each.norm.module): each for each in search.folds}
    changed, left = [], []
    for layer in found:
        was, key = describe(layer.module), id(layer.module)
        if key in absorbed:
            into = ", ".join(paths[absorber] for absorber in absorbed[key].weights)
            changed.append(Change(layer.path, was, f"in {into}" if into else "removed: nothing reads its result"))
        else:
            left.append(Change.unchanged(layer.path, was, search.left[key]))
    report = FoldReport(
        "fold", tuple(changed), tuple(left), how="graph", error=whole.after, error_before=whole.before,
        reference=FLOAT64, remaining=len(left), before=len(found),
    )  # fmt: skip
    return Result(copy.model, report)


class _Runs:
    """The original's values for each input, in its own dtype and in float64."""

    def __init__(self, model: Any, example: Any, tolerance: float | None, shown: Bar) -> None:
        self._model, self._shown = model, shown
        self._inputs = [random_inputs(model)]
        if example is not None:
            self._inputs.append(tree.map_structure(as_numpy, example))
        self._before: list[tuple[Values, Values]] = [({}, {}) for _ in self._inputs]
        self._wide: Copy | None = None
        dtypes = {norm.module.compute_dtype for norm in norm_layers(model)}
        self.tolerance = tolerance_for(tolerance, dtypes)

    def of(self, copy: Copy, tensors: Sequence[Any]) -> list[Values]:
        """Return the values of a copy; compute the original's that are not known yet."""
        new = [tensor for tensor in (*self._model.outputs, *tensors) if id(tensor) not in self._before[0][0]]
        if new:
            self._measure(new)
        self._shown.during("running the folded model")
        return [values_of(self._model, copy, inputs, tensors) for inputs in self._inputs]

    def _measure(self, tensors: Sequence[Any]) -> None:
        self._shown.during("running the original")
        with in_float64():
            self._wide = self._wide or copied("fold", self._model, dtype="float64")
        for inputs, (own, exact) in zip(self._inputs, self._before, strict=True):
            try:
                own |= values_of(self._model, None, inputs, tensors)
            except Exception as error:
                raise ValueError(
                    f"fold expects inputs that the model takes, got inputs for which it fails: {reason_of(error)}. "
                    "Pass example_inputs that fit it."
                ) from error
            with in_float64():
                exact |= values_of(self._model, self._wide, inputs, tensors)

    def error(self, after: list[Values], tensors: Sequence[Any]) -> Error:
        """Return the errors at these tensors, for the input at which folding adds most."""
        keys = [id(tensor) for tensor in tensors]
        return Error.worst(
            Error.of(Results([own[key] for key in keys], [new[key] for key in keys], [exact[key] for key in keys]))
            for new, (own, exact) in zip(after, self._before, strict=True)
        )

    def allowed(self, after: list[Values], tensors: Sequence[Any]) -> bool:
        """Return whether the errors are within the limit for a whole network, as the folds before it add theirs."""
        return self.error(after, tensors).allowed(self.tolerance, AMPLIFICATION)


def _folded(model: Any, search: Search) -> Copy:
    """Return a copy with the weights that the search found."""
    makers = {key: partial(_with_bias, linear) for key, linear in search.weights.items()}
    removed = set()
    for each in search.folds:
        norm = each.norm.module
        if has_activation(norm):
            makers[id(norm)] = partial(
                keras.layers.Activation, norm.activation, name=norm.name, dtype=norm.dtype_policy
            )
        else:
            removed.add(id(norm))
    copy = copied("fold", model, makers, removed=removed)
    for old, new in copy.replaced:
        if id(old) in search.weights:
            search.weights[id(old)].assign(new)
    return copy


def _with_bias(linear: Linear) -> Any:
    config = {**linear.layer.get_config(), "use_bias": linear.bias is not None}
    return type(linear.layer).from_config(config)
