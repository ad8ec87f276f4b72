"""The calls of a Keras model, as the search sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

from batchnorm.keras.models.copying import is_graph, nodes_of
from batchnorm.keras.models.layers import children, named, walk


@dataclass(eq=False)
class Call:
    """A call in a graph.

    Attributes:
        operation: The layer or operation that is called.
        inputs: The symbolic tensors that it reads, with repetitions.
        results: The symbolic tensors that it computes.
        arguments: Whether it has arguments beside the tensors, such as `training=True`.
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

    @property
    def plain(self) -> bool:
        """Whether its only argument is one tensor."""
        return len(self.inputs) == 1 and not self.arguments


class Graph:
    """The calls of a functional or sequential model, in order, with those of the models inside that are called once.

    Attributes:
        model: The model.
        calls: The calls, without those that stand for inputs.
        results: The ids of the model's results.
    """

    def __init__(self, model: Any, inlined: Collection[int] = ()) -> None:
        self.model = model
        self.calls: list[Call] = []
        self._current: dict[int, Any] = {}  # the tensor that another one is equal to
        self._joined: dict[int, set[int]] = {}
        self._read(model, inlined)
        self.results = {id(self._now(tensor)) for tensor in model.outputs}

    def _read(self, model: Any, inlined: Collection[int]) -> None:
        for node in nodes_of(model):
            inner = node.operation
            if node.is_input:
                continue
            if id(inner) in inlined:
                self._join_all(inner.inputs, node.input_tensors)
                self._read(inner, inlined)
                self._join_all(node.outputs, inner.outputs)
            else:
                inputs = [self._now(tensor) for tensor in node.input_tensors]
                self.calls.append(Call(inner, inputs, list(node.outputs), _has_arguments(node)))

    def _now(self, tensor: Any) -> Any:
        return self._current.get(id(tensor), tensor)

    def _join_all(self, others: list[Any], tensors: list[Any]) -> None:
        for other, tensor in zip(others, tensors, strict=True):
            self._join(other, self._now(tensor))

    def _join(self, other: Any, tensor: Any) -> None:
        """Note that a tensor is equal to another, which takes its place."""
        self._current[id(other)] = tensor
        self._joined[id(tensor)] = self.ids(tensor) | self.ids(other)

    def writer(self, tensor: Any) -> Call | None:
        """Return the call that computes the tensor; None for the model's inputs."""
        return next((call for call in self.calls if not call.gone and any(t is tensor for t in call.results)), None)

    def readers(self, tensor: Any) -> list[Call]:
        """Return the calls that read the tensor."""
        return [call for call in self.calls if not call.gone and any(t is tensor for t in call.inputs)]

    def ids(self, tensor: Any) -> set[int]:
        """Return the ids of the tensor, and of those that are equal to it now."""
        return self._joined.get(id(tensor), {id(tensor)})

    def remove(self, call: Call) -> None:
        """Let the readers of the call's result read its input."""
        source, result = call.inputs[0], call.results[0]
        call.gone = True
        self._join(result, source)
        for reader in self.readers(result):
            reader.inputs = [source if tensor is result else tensor for tensor in reader.inputs]
        if id(result) in self.results:
            self.results.add(id(source))


class Graphs:
    """The graphs of a model and of the models inside.

    A model inside that is called once, by a graph, without arguments, belongs to that graph: a scale and shift can move
    into it and out of it. Every other one is a graph of its own.

    Attributes:
        graphs: The graphs.
    """

    def __init__(self, model: Any) -> None:
        layers = list({id(layer): layer for _, layer in [("", model), *walk(model)]}.values())
        models = [layer for layer in layers if is_graph(layer)]
        calls = [call for each in models for call in Graph(each).calls]
        in_python = [child for layer in layers if not is_graph(layer) for child in children(layer)]
        self._times = Counter(id(called) for called in [*(call.operation for call in calls), *in_python])
        given = [call.operation for call in calls if call.arguments and is_graph(call.operation)]
        self._with_arguments = {id(layer) for outer in given for _, layer in [("", outer), *walk(outer)]}
        inlined = {
            id(call.operation) for call in calls
            if is_graph(call.operation) and self._times[id(call.operation)] == 1 and not call.arguments
            and len(call.inputs) == len(call.operation.inputs)
        }  # fmt: skip
        self.graphs = [Graph(each, inlined) for each in models if id(each) not in inlined]

    def times(self, layer: Any) -> int:
        """Return how often graphs call a layer. Being held by a layer whose call is Python code counts as a call."""
        return self._times[id(layer)]

    def place(self, layer: Any) -> tuple[Graph, Call] | None:
        """Return a call of the layer, and its graph; None if no graph calls it."""
        return next(((graph, call) for graph in self.graphs for call in graph.calls if call.operation is layer), None)

    def has_arguments(self, graph: Graph) -> bool:
        """Return whether the graph's model, or one that contains it, is called with arguments."""
        return id(graph.model) in self._with_arguments


def _has_arguments(node: Any) -> bool:
    given = tree.flatten((node.arguments.args, node.arguments.kwargs))
    return any(value is not None and value is not False and not keras.backend.is_keras_tensor(value) for value in given)
