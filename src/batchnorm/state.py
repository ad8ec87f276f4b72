"""Move the state of a batch-normalization layer between PyTorch, Keras and Flax.

The frameworks name and define the same state differently:

| | PyTorch | Keras | Flax |
|---|---|---|---|
| γ, β | `weight`, `bias` | `gamma`, `beta` | `scale`, `bias` |
| running statistics | `running_mean`, `running_var` | `moving_mean`, `moving_variance` | `mean`, `var` |
| momentum | weight of the new batch | weight of the old average | weight of the old average |
| ε | `eps` | `epsilon` | `epsilon` |
| averaged variance | unbiased | biased | biased |

A `State` uses PyTorch's momentum. The functions `from_...` read it from a layer, `to_..._` write it into a layer that
already exists, and `to_linen` returns new variables. The running variance is copied unchanged, so a layer computes the
same in evaluation as the layer that its state comes from. From then on, it averages the variance that its framework
uses. `State.to_biased` and `State.to_unbiased` convert what was averaged so far.

Examples:
    >>> import torch
    >>> layer = torch.nn.BatchNorm2d(3, momentum=0.1)
    >>> state = from_torch(layer)
    >>> state.momentum, state.unbiased, state.batches
    (0.1, True, 0)
    >>> to_torch_(torch.nn.BatchNorm1d(3), state)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm._options import check_eps, check_momentum, checked_integer

Array = NDArray[np.float64]

# In the order of the names below.
_ROLES = ("weight", "bias", "mean", "var")
_TORCH = ("weight", "bias", "running_mean", "running_var")
_KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
_FLAX = ("scale", "bias", "mean", "var")


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """The state of one layer, with float64 copies of its vectors.

    Attributes:
        mean: Running mean, `[C]`.
        var: Running variance, `[C]`.
        weight: γ, `[C]`; None if the layer has none.
        bias: β, `[C]`; None if the layer has none.
        momentum: Weight of the new batch, in [0, 1]; None for the cumulative average, which only PyTorch has.
        eps: ε.
        unbiased: Whether `var` is an average of unbiased variances, as in PyTorch.
        batches: Number of batches in the running statistics; None if the framework does not count them.

    Raises:
        ValueError: a vector is not `[C]`, or a value is out of range.
    """

    mean: Array
    var: Array
    weight: Array | None = None
    bias: Array | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    unbiased: bool = True
    batches: int | None = None

    def __post_init__(self) -> None:
        check_eps("State", self.eps, zero_allowed=True)
        check_momentum("State", self.momentum)
        for role in _ROLES:
            value = getattr(self, role)
            if value is None and role in ("weight", "bias"):
                continue
            vector = np.array(value, np.float64)
            if vector.ndim != 1 or vector.shape != np.shape(self.mean):
                raise ValueError(
                    f"State expects {role} of shape [C], as long as mean, got {list(vector.shape)} for a mean of "
                    f"{list(np.shape(self.mean))}. Use a layer with one set of statistics, over one axis of channels."
                )
            object.__setattr__(self, role, vector)

    def to_biased(self, values: int) -> State:
        """Return the state with an average of biased variances, as Keras and Flax compute it.

        This is exact if every batch had the same number of values per channel, and the running variance started at 1.
        Without `batches`, that 1 is assumed to have decayed. The results of evaluation change with the variance.

        Args:
            values: Values per channel in each training batch, N·H·W for images; at least 2.

        Raises:
            TypeError: `values` is not an int.
            ValueError: `values` is below 2.

        Examples:
            >>> State(mean=[0.0], var=[4.0]).to_biased(values=4).var
            array([3.])
        """
        return self._converted("to_biased", values, unbiased=False)

    def to_unbiased(self, values: int) -> State:
        """Return the state with an average of unbiased variances, as PyTorch computes it; the inverse of `to_biased`.

        Args:
            values: Values per channel in each training batch, N·H·W for images; at least 2.

        Raises:
            TypeError: `values` is not an int.
            ValueError: `values` is below 2.
        """
        return self._converted("to_unbiased", values, unbiased=True)

    def _converted(self, caller: str, values: int, unbiased: bool) -> State:
        values = checked_integer(caller, "values", values, 2, "Pass the number of values per channel in a batch.")
        if self.unbiased == unbiased:
            return self
        start = self._share_of_start()
        factor = values / (values - 1) if unbiased else (values - 1) / values
        return dataclasses.replace(self, var=start + (self.var - start) * factor, unbiased=unbiased)

    def _share_of_start(self) -> float:
        """Return what is left in the running variance of the 1 that it started at."""
        if self.batches is None:
            return 0.0
        return float((0.0 if self.momentum is None else 1.0 - self.momentum) ** self.batches)


def from_torch(layer: Any) -> State:
    """Read the state of a layer of torch.nn or of this library.

    Args:
        layer: A batch normalization with running statistics over one axis of channels. Frozen layers without momentum
            give a momentum of 0.

    Raises:
        TypeError: `layer` is not such a layer.
    """
    vectors = _torch_vectors("from_torch", layer)
    batches = getattr(layer, "num_batches_tracked", None)
    arrays: dict[str, Any] = {r: None if v is None else v.detach().cpu().double().numpy() for r, v in vectors.items()}
    return State(
        **arrays,
        momentum=getattr(layer, "momentum", 0.0),
        eps=layer.eps,
        unbiased=True,
        batches=None if batches is None else int(batches),
    )


def to_torch_(layer: Any, state: State) -> None:
    """Write the state into a layer of torch.nn or of this library: vectors, momentum, ε and the number of batches.

    Args:
        layer: A batch normalization like that of `from_torch`. Its counter is left as it is if `state.batches` is None.
        state: The state, with the vectors that the layer has.

    Raises:
        TypeError: `layer` is not such a layer.
        ValueError: the layer has other vectors than the state, or other sizes.
    """
    import torch

    vectors = _torch_vectors("to_torch_", layer)
    _check_same("to_torch_", vectors, state)
    with torch.no_grad():
        for role, vector in vectors.items():
            if vector is not None:
                vector.copy_(torch.from_numpy(getattr(state, role)))
        if state.batches is not None and getattr(layer, "num_batches_tracked", None) is not None:
            layer.num_batches_tracked.fill_(state.batches)
    layer.eps = state.eps
    if hasattr(layer, "momentum"):
        layer.momentum = state.momentum


def from_keras(layer: Any) -> State:
    """Read the state of a built `keras.layers.BatchNormalization`, or of this library's.

    Args:
        layer: The layer, after its first call or `layer.build(shape)`. Any axis.

    Raises:
        TypeError: `layer` is not such a layer, or is not built.
    """
    from keras.ops import convert_to_numpy

    vectors = _vectors("from_keras", layer, _KERAS, "epsilon", _BUILD)
    return _from_biased(layer, {role: None if v is None else convert_to_numpy(v.value) for role, v in vectors.items()})


def to_keras_(layer: Any, state: State) -> None:
    """Write the state into a built `keras.layers.BatchNormalization`, or this library's: vectors, momentum and ε.

    Compiled functions keep the old momentum and ε, so call this before `model.compile`.

    Args:
        layer: The layer, after its first call or `layer.build(shape)`. Any axis, but not `renorm=True`, which has
            further statistics.
        state: The state, with the vectors that the layer has.

    Raises:
        TypeError: `layer` is not such a layer, or is not built.
        ValueError: the layer has other vectors than the state, or other sizes; it has `renorm=True`; or the state has
            the momentum None.
    """
    vectors = _vectors("to_keras_", layer, _KERAS, "epsilon", _BUILD)
    if getattr(layer, "renorm", False):
        raise ValueError(
            "to_keras_ expects a layer with renorm=False, got one with renorm=True, which keeps further statistics. "
            "Use a layer without renorm, or set the weights of this one."
        )
    _check_same("to_keras_", vectors, state)
    momentum = _weight_of_old("to_keras_", state)
    for role, vector in vectors.items():
        if vector is not None:
            vector.assign(getattr(state, role))
    layer.momentum, layer.epsilon = momentum, state.eps


def from_nnx(layer: Any) -> State:
    """Read the state of a `flax.nnx.BatchNorm`, or of this library's.

    Raises:
        TypeError: `layer` is not such a layer.
    """
    vectors = _vectors("from_nnx", layer, _FLAX, "epsilon", "For linen, use from_linen.")
    return _from_biased(layer, {role: None if v is None else v[...] for role, v in vectors.items()})


def to_nnx_(layer: Any, state: State) -> None:
    """Write the state into a `flax.nnx.BatchNorm`, or this library's: vectors, momentum and ε.

    Args:
        layer: The layer.
        state: The state, with the vectors that the layer has.

    Raises:
        TypeError: `layer` is not such a layer.
        ValueError: the layer has other vectors than the state, or other sizes; or the state has the momentum None.
    """
    import jax.numpy as jnp

    vectors = _vectors("to_nnx_", layer, _FLAX, "epsilon", "For linen, use to_linen.")
    _check_same("to_nnx_", vectors, state)
    momentum = _weight_of_old("to_nnx_", state)
    for role, vector in vectors.items():
        if vector is not None:
            vector[...] = jnp.asarray(getattr(state, role), vector[...].dtype)
    layer.momentum, layer.epsilon = momentum, state.eps


def from_linen(layer: Any, variables: Mapping[str, Mapping[str, ArrayLike]]) -> State:
    """Read the state of a `flax.linen.BatchNorm`, or of this library's.

    Args:
        layer: The module, which has momentum and ε.
        variables: Its variables, such as `{"params": {"scale": ..., "bias": ...}, "batch_stats": {"mean": ..., "var":
            ...}}`. In the variables of a model, these are the entries under the module's name.

    Raises:
        TypeError: `layer` is not such a layer, or `variables` lacks its running statistics.
    """
    _check_layer("from_linen", layer, ("momentum", "epsilon"), "For nnx, use from_nnx.")
    found = {**variables.get("params", {}), **variables.get("batch_stats", {})}
    missing = [name for name in ("mean", "var") if name not in found]
    if missing:
        raise TypeError(
            f"from_linen expects the variables of one BatchNorm, got {sorted(variables)} without {missing[0]}. Pass "
            "the entries of 'params' and 'batch_stats' under the module's name."
        )
    return _from_biased(layer, {role: found.get(name) for role, name in zip(_ROLES, _FLAX, strict=True)})


def to_linen(layer: Any, state: State) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return a copy of a `flax.linen.BatchNorm` with the state's momentum and ε, and its variables.

    Args:
        layer: The module, or this library's, with the same `use_scale` and `use_bias` as the state.
        state: The state.

    Returns:
        The module, and `{"params": {...}, "batch_stats": {...}}`, with γ and β in the module's `param_dtype`, and the
        running statistics in float32.

    Raises:
        TypeError: `layer` is not such a layer.
        ValueError: the layer has other vectors than the state; or the state has the momentum None.
    """
    import jax.numpy as jnp

    _check_layer("to_linen", layer, ("momentum", "epsilon", "use_scale", "use_bias"), "For nnx, use to_nnx_.")
    has = {"weight": layer.use_scale, "bias": layer.use_bias}
    _check_same("to_linen", {role: state.mean if has.get(role, True) else None for role in _ROLES}, state)
    module = layer.clone(momentum=_weight_of_old("to_linen", state), epsilon=state.eps)
    variables: dict[str, dict[str, Any]] = {
        "params": {
            name: jnp.asarray(value, layer.param_dtype)
            for name, value in (("scale", state.weight), ("bias", state.bias))
            if value is not None
        },
        "batch_stats": {name: jnp.asarray(getattr(state, name), jnp.float32) for name in ("mean", "var")},
    }
    return module, variables


_BUILD = "Build it first: call it once, or layer.build(shape)."


def _torch_vectors(caller: str, layer: Any) -> dict[str, Any]:
    from torch.nn.modules.instancenorm import _InstanceNorm

    vectors = _vectors(caller, layer, _TORCH, "eps", "Running statistics need track_running_stats=True.")
    if isinstance(layer, _InstanceNorm) or any(type(v).__name__.startswith("Uninitialized") for v in vectors.values()):
        raise TypeError(
            f"{caller} expects an initialized batch normalization, got {type(layer).__name__}. Call a lazy layer once "
            "before; instance normalization has no counterpart in the other frameworks."
        )
    if vectors["mean"].dim() != 1:
        raise TypeError(
            f"{caller} expects running statistics of shape [C], got {list(vectors['mean'].shape)}. A layer of several "
            "domains has several states: pass a layer with one."
        )
    return vectors


def _from_biased(layer: Any, vectors: Mapping[str, Any]) -> State:
    """Return the state of a layer of Keras or Flax."""
    return State(**vectors, momentum=_complement(layer.momentum), eps=layer.epsilon, unbiased=False)


def _complement(momentum: float) -> float:
    """Return 1 - momentum, so that 0.9 gives 0.1 and not the nearest difference."""
    return round(1.0 - momentum, 15)


def _weight_of_old(caller: str, state: State) -> float:
    """Return the momentum as the weight of the old average."""
    if state.momentum is None:
        raise ValueError(
            f"{caller} expects a state with a momentum in [0, 1], got None, the cumulative average, which Keras and "
            "Flax do not have. Choose a momentum: dataclasses.replace(state, momentum=0.01)."
        )
    return _complement(state.momentum)


def _check_layer(caller: str, layer: object, names: Iterable[str], hint: str) -> None:
    missing = [name for name in names if not hasattr(layer, name)]
    if missing:
        raise TypeError(
            f"{caller} expects a batch-normalization layer, got {type(layer).__name__} without {missing[0]}. {hint}"
        )


def _vectors(caller: str, layer: Any, names: tuple[str, ...], eps: str, hint: str) -> dict[str, Any]:
    """Return the layer's variables by their roles; γ or β that it does not have are None."""
    _check_layer(caller, layer, (*names, eps), hint)
    vectors = {role: getattr(layer, name) for role, name in zip(_ROLES, names, strict=True)}
    if vectors["mean"] is None or vectors["var"] is None:
        raise TypeError(
            f"{caller} expects a layer with running statistics, got {type(layer).__name__} without them. {hint}"
        )
    return vectors


def _check_same(caller: str, vectors: Mapping[str, Any], state: State) -> None:
    """Check that the layer has the state's vectors, before any of them is written."""
    for role, vector in vectors.items():
        value = getattr(state, role)
        wanted, came = (None if v is None else tuple(v.shape) for v in (vector, value))
        if wanted != came:
            raise ValueError(
                f"{caller} expects a state with {role} of shape {_shape(wanted)} like the layer, got {_shape(came)}. "
                "Make the layer with the same channels, γ and β."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
