"""Find the layers that absorb each batch normalization of a Keras model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras import activations

from batchnorm.keras.models.layers import Found, is_known_norm, norm_layers
from batchnorm.keras.surgery.fold import merges
from batchnorm.keras.surgery.fold.graph import Call, Graph, Graphs
from batchnorm.keras.surgery.fold.linear import CannotFold, Linear, ScaleShift, is_linear, read
from batchnorm.keras.surgery.fold.moves import move


@dataclass
class Fold:
    """A batch normalization that is removed.

    Attributes:
        norm: The layer.
        weights: The new weights of the layers that absorb it, by the layer's id.
        same: The tensors of the original whose values must not change.
        changed: The ids of the tensors whose values change.
    """

    norm: Found
    weights: dict[int, Linear] = field(default_factory=dict)
    same: list[Any] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)

    def follow(self, later: Fold) -> None:
        """Compare the tensors of a later fold instead of those whose values it changes."""
        kept = [tensor for tensor in self.same if id(tensor) not in later.changed]
        if len(kept) < len(self.same):
            self.same = [*kept, *later.same]


@dataclass
class Search:
    """The folds of a model, which is only read.

    Attributes:
        model: The model.
        refused: Batch normalization that must stay, by the layer's id, with the reason.
        folds: The folds, in the order in which they were found.
        left: The reasons why other layers stay.
        weights: The new weights of layers, by the layer's id.
    """

    model: Any
    refused: Mapping[int, str] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    left: dict[int, str] = field(default_factory=dict)
    weights: dict[int, Linear] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._graphs = Graphs(self.model)
        layers, known = norm_layers(self.model), 0
        while len(layers) != known:  # a fold may remove the layer that was next to another one
            known = len(layers)
            layers = [found for found in layers if not self._try(found)]

    def _try(self, found: Found) -> bool:
        """Fold a layer, or note why it stays."""
        layer = found.module
        place = self._graphs.place(layer)
        try:
            if id(layer) in self.refused:
                raise CannotFold(self.refused[id(layer)])
            if place is None:
                raise CannotFold("it is inside a layer whose call is Python code")
            self._fold(found, *place)
        except CannotFold as reason:
            self.left[id(layer)] = str(reason)
            return False
        self.left.pop(id(layer), None)
        return True

    def _fold(self, found: Found, graph: Graph, call: Call) -> None:
        layer = found.module
        if not is_known_norm(layer):
            raise CannotFold("it has a call of its own")
        if self._graphs.times(layer) > 1:
            raise CannotFold(f"it is used {self._graphs.times(layer)} times")
        if not call.plain:
            raise CannotFold("it is called with arguments such as training=True or a mask")
        if self._graphs.has_arguments(graph):
            raise CannotFold(f"{graph.model.name}, or a model around it, is called with training=True or a mask")
        s = ScaleShift.of(layer, len(call.results[0].shape))
        reasons = []
        for direction in (self._backward, self._forward):
            fold = Fold(found)
            try:
                direction(graph, call, s, fold)
                for linear in fold.weights.values():
                    linear.check_range()
            except CannotFold as reason:
                reasons.append(str(reason))
                continue
            self.weights |= fold.weights
            for earlier in self.folds:
                earlier.follow(fold)
            self.folds.append(fold)
            if not has_activation(layer):
                graph.remove(call)
            return
        raise CannotFold("; ".join(dict.fromkeys(reasons)))

    def _linear(self, call: Call, fold: Fold) -> Linear:
        layer = call.operation
        if self._graphs.times(layer) > 1:
            raise CannotFold(f"{call.name} is used {self._graphs.times(layer)} times")
        if not call.plain:
            raise CannotFold(f"{call.name} is called with several arguments")
        return fold.weights.get(id(layer)) or self.weights.get(id(layer)) or read(layer)

    def _backward(self, graph: Graph, call: Call, s: ScaleShift, fold: Fold) -> None:
        """Fold into the layers that compute the input."""
        fold.same += call.results
        self._into_result(graph, call.inputs[0], call, s, fold)

    def _into_result(self, graph: Graph, tensor: Any, reader: Call, s: ScaleShift, fold: Fold) -> None:
        """Apply `s` to the tensor, for its only reader."""
        fold.changed |= graph.ids(tensor)
        others = [other for other in graph.readers(tensor) if other is not reader]
        if others:
            raise CannotFold(f"its input is also read by {others[0].name}")
        if sum(given is tensor for given in reader.inputs) > 1:
            raise CannotFold(f"{reader.name} reads its input twice")
        if id(tensor) in graph.results:
            raise CannotFold("its input is a result of the model")
        writer = graph.writer(tensor)
        if writer is None:
            raise CannotFold("it follows an input")
        if is_linear(writer.operation):
            fold.weights[id(writer.operation)] = self._linear(writer, fold).after(s, len(tensor.shape))
            return
        for given, part in zip(writer.inputs, self._before(writer, s), strict=True):
            self._into_result(graph, given, writer, part, fold)

    def _before(self, call: Call, s: ScaleShift) -> list[ScaleShift]:
        """Return the scale and shift of each input of a call that equal one of its result."""
        found: list[ScaleShift] | None = None
        if call.plain:
            moved = move(call.operation, s, call.inputs[0].shape, back=True)
            found = None if moved is None else [moved]
        elif not call.arguments:
            found = merges.parts(call.operation, s, _shapes(call))
        if found is None:
            raise CannotFold(f"it follows {call.name}")
        return found

    def _forward(self, graph: Graph, call: Call, s: ScaleShift, fold: Fold) -> None:
        """Fold into the layers that read the result."""
        if has_activation(call.operation):
            raise CannotFold("its activation is between it and the next layer")
        self._into_readers(graph, call.results[0], s, fold)

    def _into_readers(self, graph: Graph, tensor: Any, s: ScaleShift, fold: Fold) -> None:
        """Let every reader of the tensor apply `s`, which is no longer part of the tensor."""
        fold.changed |= graph.ids(tensor)
        if id(tensor) in graph.results:
            raise CannotFold("it is a result of the model")
        for reader in graph.readers(tensor):
            if is_linear(reader.operation):
                fold.weights[id(reader.operation)] = self._linear(reader, fold).before(s, len(tensor.shape))
                fold.same += reader.results
            else:
                self._into_readers(graph, reader.results[0], self._after(reader, tensor, s), fold)

    def _after(self, call: Call, tensor: Any, s: ScaleShift) -> ScaleShift:
        """Return the scale and shift of a call's result that equals one of a tensor that it reads."""
        found: ScaleShift | None = None
        if call.plain:
            found = move(call.operation, s, tensor.shape, back=False)
        elif not call.arguments:
            positions = [i for i, given in enumerate(call.inputs) if given is tensor]
            found = merges.whole(call.operation, s, _shapes(call), positions)
        if found is None:
            raise CannotFold(f"{call.name} reads its result")
        return found


def _shapes(call: Call) -> list[Any]:
    return [tensor.shape for tensor in call.inputs]


def has_activation(norm: Any) -> bool:
    """Return whether batch normalization has an activation of its own."""
    return getattr(norm, "activation", activations.linear) is not activations.linear
