"""Copy a Keras model, with some layers replaced or removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.saving.serialization_lib import SafeModeScope

from batchnorm.keras.models.layers import Layer, as_numpy, reason_of, walk

# For functions that can also change the model itself.
IN_PLACE = ", or pass inplace=True"


@dataclass
class Copy:
    """A copy of a model, and what each part of it became.

    Attributes:
        model: The copy.
        replaced: The layers that were replaced, each with the layer in its place.
        same: The other layers, each with its copy.
        holders: The copies that hold replaced layers in attributes, each with the original.
        tensors: The symbolic tensor of the copy, by the id of the original's.
    """

    model: Any = None
    replaced: list[tuple[Any, Any]] = field(default_factory=list)
    same: list[tuple[Any, Any]] = field(default_factory=list)
    holders: list[tuple[Any, Any]] = field(default_factory=list)
    tensors: dict[int, Any] = field(default_factory=dict)


def is_graph(layer: Any) -> bool:
    """Return whether the layer is a functional or sequential model, whose graph is all that its call runs."""
    if isinstance(layer, keras.Sequential):
        return type(layer).call is keras.Sequential.call and layer._functional is not None
    return isinstance(layer, Functional) and type(layer).call is Functional.call


def functional(model: Any) -> Any:
    """Return the functional model that a graph consists of: the model itself, or the one of a sequential model."""
    return model._functional if isinstance(model, keras.Sequential) else model


def nodes_of(model: Any) -> list[Any]:
    """Return the calls of a built graph, in order, with one for each input."""
    by_depth = functional(model)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def copied(
    caller: str,
    model: Any,
    replacements: Mapping[int, Callable[[], Any]] | None = None,
    *,
    removed: Collection[int] = (),
    dtype: str | None = None,
    advice: str = "",
) -> Copy:
    """Return a copy of a built model, with the same values of its variables and the same frozen layers.

    Args:
        caller: The function that the user called.
        model: A layer or model; it stays unchanged.
        replacements: Functions that create an unbuilt layer for the place of a layer, by the layer's id. Its variables
            keep their initial values.
        removed: The ids of layers in graphs that pass their input on.
        dtype: The dtype of every layer; by default, each keeps its own. With a dtype, the copies' initializers are
            zeros.
        advice: What else the user can do if a layer has no configuration.

    Raises:
        ValueError: a layer cannot be created from its configuration.
    """
    copier = _Copier(replacements or {}, removed, dtype)
    classes = {type(layer).__name__: type(layer) for _, layer in [("", model), *walk(model)]}
    try:
        with keras.saving.custom_object_scope(classes), SafeModeScope(False):  # the classes and functions are in memory
            copier.result.model = copier.layer(model)
            if not copier.result.model.built:
                copier.result.model.build_from_config(model.get_build_config())
    except Exception as error:
        raise ValueError(
            f"{caller} expects a model that its configuration describes completely, got {type(model).__name__} "
            f"{model.name!r}, whose copy failed: {reason_of(error)}. Define get_config, and register the class of "
            f"every layer{advice}."
        ) from error
    _copy_values(copier.result)
    return copier.result


def _copy_values(copy: Copy) -> None:
    pairs = [(old.variables, new.variables) for old, new in copy.same]
    pairs += [(_own_variables(old), _own_variables(new)) for old, new in copy.holders]
    for values, variables in pairs:
        for value, variable in zip(values, variables, strict=True):
            variable.assign(as_numpy(value))
    for old, new in copy.same:
        for (_, layer), (_, other) in zip(walk(old), walk(new), strict=True):
            if other.trainable != layer.trainable:  # a configuration may omit which inner layers train
                other.trainable = layer.trainable


def _attributes(layer: Any) -> dict[str, Any]:
    """Return the attributes of a layer; on the torch backend, layers are modules, which PyTorch holds separately."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def _own_variables(layer: Any) -> list[Any]:
    """Return the variables of a layer without those of the layers inside."""
    seeds = [generator.state for generator in layer._seed_generators]
    return [*layer._trainable_variables, *layer._non_trainable_variables, *seeds]


class _Copier:
    def __init__(
        self, replacements: Mapping[int, Callable[[], Any]], removed: Collection[int], dtype: str | None
    ) -> None:
        self.result = Copy()
        self._replacements, self._removed, self._dtype = replacements, removed, dtype
        self._done: dict[int, Any] = {}

    def layer(self, old: Any) -> Any:
        """Return the layer in the place of another; a layer that is used twice stays one."""
        if id(old) not in self._done:
            if id(old) in self._replacements:
                new = self._replacements[id(old)]()
                self.result.replaced.append((old, new))
            elif isinstance(old, keras.Sequential) and is_graph(old):
                new = self._sequential(old)
            elif is_graph(old):
                new = self._functional(old)
            else:
                new = self._from_config(old)
            self._done[id(old)] = new
        return self._done[id(old)]

    def _from_config(self, old: Any) -> Any:
        config = old.get_config()
        new = type(old).from_config(config if self._dtype is None else _for_values(config, self._dtype))
        if isinstance(old, Layer):
            if any(id(layer) in self._replacements or is_graph(layer) for _, layer in walk(old)):
                self._replace_inside(old, new)
                self.result.holders.append((old, new))
            else:
                self.result.same.append((old, new))
        return new

    def _replace_inside(self, old: Any, new: Any) -> None:
        """Replace the layers that an unbuilt copy holds in its attributes, lists and dicts."""
        for name, value in _attributes(old).items():
            held = getattr(new, name, None)
            if name.startswith("_") or held is None:
                continue
            if isinstance(value, Layer):
                setattr(new, name, self._tracked(new, held, value))
            elif isinstance(value, (list, dict)):
                for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    if isinstance(part, Layer):
                        held[key] = self._tracked(new, held[key], part)

    def _tracked(self, holder: Any, layer: Any, old: Any) -> Any:
        """Return the layer in the place of `old`, which its holder tracks in the place of another layer."""
        replaced = self.layer(old)
        if holder._tracker.is_in_store("layers", layer):
            holder._tracker.replace_tracked_value("layers", layer, replaced)
        return replaced

    def _sequential(self, model: Any) -> Any:
        nodes = nodes_of(model)
        first = keras.layers.InputLayer.from_config(nodes[0].operation.get_config())
        kept = [self.layer(layer) for layer in model.layers if id(layer) not in self._removed]
        # Keras builds no graph without layers.
        new = keras.Sequential([first, *(kept or [keras.layers.Identity()])], name=model.name)
        new._trainable = model._trainable
        results = iter(nodes_of(new))
        tensors = self.result.tensors
        for node in nodes:
            if id(node.operation) in self._removed:
                tensors[id(node.outputs[0])] = tensors[id(node.input_tensors[0])]
            else:
                pairs = zip(node.outputs, next(results).outputs, strict=True)
                tensors.update({id(tensor): result for tensor, result in pairs})
        return new

    def _functional(self, model: Any) -> Any:
        tensors = self.result.tensors
        for node in nodes_of(model):
            operation = node.operation
            if node.is_input:
                results = [keras.layers.InputLayer.from_config(operation.get_config()).output]
            elif id(operation) in self._removed:
                results = [tensors[id(node.input_tensors[0])]]
            else:
                args, kwargs = node.arguments.fill_in(tensors)
                results = tree.flatten(self.layer(operation)(*args, **_without_empty_masks(kwargs)))
            tensors.update({id(tensor): result for tensor, result in zip(node.outputs, results, strict=True)})
        kind = type(model) if functional_like_constructor(type(model)) else keras.Model
        inputs, outputs = (
            tree.map_structure(lambda tensor: tensors[id(tensor)], part) for part in (model.input, model.output)
        )
        new = kind(inputs, outputs, name=model.name)
        new._trainable = model._trainable
        return new


def _without_empty_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out masks that are not values of the graph: Keras finds them itself."""
    return {name: value for name, value in kwargs.items() if name != "mask" or value is not None}


def _for_values(config: Any, dtype: str) -> Any:
    """Return a layer's configuration with another dtype, and zeros as initial values, also inside.

    The initial values are overwritten. JAX would compile random ones for each shape, which takes most of the time.
    """
    if isinstance(config, list):
        return [_for_values(value, dtype) for value in config]
    if not isinstance(config, dict):
        return config
    if config.get("module") == "keras.initializers":
        return {**config, "class_name": "Zeros", "config": {}}
    return {key: dtype if key == "dtype" else _for_values(value, dtype) for key, value in config.items()}
