"""Find the layers that absorb each batch normalization of a Keras model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras import activations

from batchnorm.keras.models.copying import is_graph, nodes_of
from batchnorm.keras.models.layers import Found, is_known_norm, named, norm_layers, walk
from batchnorm.keras.surgery.fold.linear import CannotFold, Linear, ScaleShift, is_linear, read
from batchnorm.keras.surgery.fold.moves import move


@dataclass(eq=False)
class Call:
    """A call in a graph.

    Attributes:
        operation: The layer or operation that is called.
        inputs: The symbolic tensors that it reads, with repetitions.
        results: The symbolic tensors that it computes.
        arguments: Whether it has arguments beside its first input.
        gone: Whether the call has been removed.
    """

    operation: Any
    inputs: list[Any]
    results: list[Any]
    arguments: bool
    gone: bool = False

    @property
    def name(self) -> str:
        """The name and the class of what is called, for messages."""
        return named(self.operation)


class Graph:
    """The calls of a functional or sequential model, in order.

    Attributes:
        calls: The calls, without those that stand for the model's inputs.
        results: The ids of the model's results.
    """

    def __init__(self, model: Any) -> None:
        self.calls = [_call(node) for node in nodes_of(model) if not node.is_input]
        self.results = {id(tensor) for tensor in model.outputs}
        self._joined: dict[int, set[int]] = {}

    def writer(self, tensor: Any) -> Call | None:
        """Return the call that computes the tensor; None for the model's inputs."""
        return next((call for call in self.calls if not call.gone and any(t is tensor for t in call.results)), None)

    def readers(self, tensor: Any) -> list[Call]:
        """Return the calls that read the tensor."""
        return [call for call in self.calls if not call.gone and any(t is tensor for t in call.inputs)]

    def ids(self, tensor: Any) -> set[int]:
        """Return the ids of the tensor, and of the results of removed calls that are this tensor now."""
        return self._joined.get(id(tensor), {id(tensor)})

    def remove(self, call: Call) -> None:
        """Let the readers of the call's result read its input."""
        source, result = call.inputs[0], call.results[0]
        call.gone = True
        self._joined[id(source)] = self.ids(source) | self.ids(result)
        for reader in self.readers(result):
            reader.inputs = [source if tensor is result else tensor for tensor in reader.inputs]
        if id(result) in self.results:
            self.results.add(id(source))


def _call(node: Any) -> Call:
    arguments = node.arguments
    others = (*arguments.args[1:], *arguments.kwargs.values())
    given = any(value is not None and value is not False for value in others)
    return Call(node.operation, list(node.input_tensors), list(node.outputs), given)


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
        graphs = [Graph(model) for model in _graphs(self.model)]
        self._times = Counter(id(call.operation) for graph in graphs for call in graph.calls)
        layers, known = norm_layers(self.model), 0
        while len(layers) != known:  # a fold may remove the layer that was next to another one
            known = len(layers)
            layers = [found for found in layers if not self._try(found, graphs)]

    def _try(self, found: Found, graphs: list[Graph]) -> bool:
        """Fold a layer, or note why it stays."""
        layer = found.module
        place = next(((graph, call) for graph in graphs for call in graph.calls if call.operation is layer), None)
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
        if self._times[id(layer)] > 1:
            raise CannotFold(f"it is used {self._times[id(layer)]} times")
        if call.arguments:
            raise CannotFold("it is called with arguments such as training=True or a mask")
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

    def _linear(self, call: Call) -> Linear:
        layer = call.operation
        if self._times[id(layer)] > 1:
            raise CannotFold(f"{call.name} is used {self._times[id(layer)]} times")
        if call.arguments:
            raise CannotFold(f"{call.name} is called with several arguments")
        return self.weights.get(id(layer)) or read(layer)

    def _backward(self, graph: Graph, call: Call, s: ScaleShift, fold: Fold) -> None:
        """Fold into the layer that computes the input."""
        fold.same += call.results
        tensor, reader = call.inputs[0], call
        while True:
            fold.changed |= graph.ids(tensor)
            others = [other for other in graph.readers(tensor) if other is not reader]
            if others:
                raise CannotFold(f"its input is also read by {others[0].name}")
            if id(tensor) in graph.results:
                raise CannotFold("its input is a result of the model")
            writer = graph.writer(tensor)
            if writer is None:
                raise CannotFold("it follows an input")
            if is_linear(writer.operation):
                fold.weights[id(writer.operation)] = self._linear(writer).after(s, len(tensor.shape))
                return
            s = self._moved(writer, s, back=True)
            tensor, reader = writer.inputs[0], writer

    def _forward(self, graph: Graph, call: Call, s: ScaleShift, fold: Fold) -> None:
        """Fold into the layers that read the result."""
        if has_activation(call.operation):
            raise CannotFold("its activation is between it and the next layer")
        self._into_readers(graph, call.results[0], s, fold)

    def _into_readers(self, graph: Graph, tensor: Any, s: ScaleShift, fold: Fold) -> None:
        fold.changed |= graph.ids(tensor)
        if id(tensor) in graph.results:
            raise CannotFold("it is a result of the model")
        for reader in graph.readers(tensor):
            if is_linear(reader.operation):
                fold.weights[id(reader.operation)] = self._linear(reader).before(s, len(tensor.shape))
                fold.same += reader.results
            else:
                self._into_readers(graph, reader.results[0], self._moved(reader, s, back=False), fold)

    def _moved(self, call: Call, s: ScaleShift, *, back: bool) -> ScaleShift:
        moved = None
        if len(call.inputs) == 1:
            moved = move(call.operation, s, call.inputs[0].shape, back=back)
        if moved is None:
            raise CannotFold(f"it follows {call.name}" if back else f"{call.name} reads its result")
        return moved


def has_activation(norm: Any) -> bool:
    """Return whether batch normalization has an activation of its own."""
    return getattr(norm, "activation", activations.linear) is not activations.linear


def _graphs(model: Any) -> list[Any]:
    """Return the model and the models inside whose calls are graphs, each once."""
    return list({id(layer): layer for _, layer in [("", model), *walk(model)] if is_graph(layer)}.values())
