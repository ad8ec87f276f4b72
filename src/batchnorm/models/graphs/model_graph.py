"""Trace a whole model as one graph: by `torch.fx`, valid for every size, or by `torch.export` with dynamic sizes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Node
from torch.utils import _pytree as pytree

from batchnorm import walk
from batchnorm._options import in_one_line
from batchnorm.foreign import foreign_eps
from batchnorm.models.data.inputs import Inputs, evaluate
from batchnorm.models.data.outputs import outputs, same_containers
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.models.graphs.tracing.exported import exported
from batchnorm.models.graphs.tracing.symbolic import Tracer, graph_module

# The sizes of one dimension in all recorded runs. Equal tuples mean that two dimensions are equal for every input.
Dim = tuple[int, ...]
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Trace:
    """A graph that computes the same as a model.

    Attributes:
        module: The graph module, with the model's own parameters and buffers.
        how: "fx" or "export".
        sizes: The inputs that the graph accepts: the example, and the example with other sizes.
        refused: Inputs that the model accepts and the graph does not; only if no graph accepts all sizes.
        shapes: The shape of every node with a tensor result.
        values: The results of these nodes for the example inputs.
        paths: The path of the module that each node comes from.
    """

    module: fx.GraphModule
    how: str
    sizes: tuple[Inputs, ...]
    refused: tuple[Inputs, ...]
    shapes: dict[Node, Shape]
    values: dict[Node, Tensor]
    paths: dict[Node, str]

    @property
    def graph(self) -> fx.Graph:
        """The graph module's graph."""
        return self.module.graph


class _Tracer(Tracer):
    """Inlines all modules except torch's layers; omitted arguments keep their defaults.

    Args:
        inputs: The example.
        lenient: Whether modules that cannot be traced stay whole, and calls of functions are recorded.
    """

    def __init__(self, inputs: Inputs, *, lenient: bool) -> None:
        super().__init__(functions=lenient)
        self._inputs, self._lenient = inputs, lenient

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or foreign_eps(m) is not None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        last, stack = next(reversed(self.graph.nodes), None), list(self.module_stack.items())
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.module_stack.clear()
            self.module_stack.update(stack)
            if not self._lenient or any(map(walk.is_batch_norm, m.modules())):
                raise
            self.erase(itertools.takewhile(lambda node: node is not last, list(reversed(self.graph.nodes))))
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        model = self.root
        bound = inspect.signature(model.forward).bind(*self._inputs.args, **self._inputs.kwargs)
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                proxies = [self._placeholder(f"{name}_{i}", v) for i, v in enumerate(value)]
                bound.arguments[name] = tuple(proxies)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._placeholder(key, v) for key, v in value.items()}
            else:
                bound.arguments[name] = self._placeholder(name, value)
        own = model.__dict__.get("forward")
        forward = own if own is not None else lambda *a, **k: root_fn(model, *a, **k)
        return lambda: forward(*bound.args, **bound.kwargs), []

    def _placeholder(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                raise Untraceable(f"argument {name} holds tensors in a {type(value).__name__}")
            return value
        return self.create_proxy("placeholder", name, (), {})


def _by_fx(model: nn.Module, runs: Runs) -> fx.GraphModule:
    try:
        graph = _Tracer(runs.inputs, lenient=False).trace(model)
    except Exception:
        graph = _Tracer(runs.inputs, lenient=True).trace(model)
    return graph_module(model, graph, type(model).__name__)


def _by_export(model: nn.Module, runs: Runs) -> fx.GraphModule:
    """Export the model; the dimensions that differ between these inputs are dynamic."""
    sizes = [inputs for inputs, _ in runs.found]
    # torch.export specializes a batch of one.
    example = next((i for i in sizes if all(x.shape[0] != 1 for x in i.tensors() if x.dim())), sizes[0])
    shapes = [[tuple(x.shape) for x in i.tensors()] for i in sizes]
    dynamic = iter(
        {axis: torch.export.Dim.AUTO for axis, found in enumerate(zip(*own, strict=True)) if len(set(found)) > 1}
        for own in zip(*shapes, strict=True)
    )

    def dimensions(leaf: Any) -> Any:
        return next(dynamic) if isinstance(leaf, Tensor) else None

    in_order = pytree.tree_map(dimensions, (example.args, example.kwargs))
    names = inspect.signature(model.forward).bind(*in_order[0], **in_order[1]).arguments
    return exported(model, example.args, example.kwargs, dict(names))


class _Recorder(fx.Interpreter):
    """Runs a graph and records the shape of every tensor and, if `keep`, the tensor itself."""

    def __init__(self, module: fx.GraphModule, keep: bool) -> None:
        super().__init__(module, garbage_collect_values=not keep)
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.found: dict[Node, Tensor] = {}
        self._keep = keep

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        return _plain(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
            if self._keep:
                self.found[n] = result
        return result


def _plain(value: Any) -> Any:
    """Return arguments with lists and dictionaries as the module's code makes them; those of a node cannot change."""
    if type(value) is tuple:
        return tuple(map(_plain, value))
    if isinstance(value, immutable_list):
        return list(map(_plain, value))
    if isinstance(value, immutable_dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def flat_arguments(module: fx.GraphModule, inputs: Inputs) -> tuple[Any, ...]:
    """Return the values of the graph's placeholders, in order."""
    given = [x for x in inputs.args if isinstance(x, Tensor)]
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    by_name = {**dict(zip(names, given, strict=False)), **inputs.kwargs}
    return tuple(by_name[name] for name in names)


def _recorded(module: fx.GraphModule, inputs: Inputs, *, keep: bool) -> tuple[_Recorder, Any]:
    """Run the graph; return the shapes of its nodes, their values if `keep`, and the graph's result."""
    recorder = _Recorder(module, keep)
    with torch.no_grad():
        result = recorder.run(*flat_arguments(module, inputs.map(torch.clone)), enable_io_processing=False)
    return recorder, result


def _same_result(found: Any, expected: Any) -> bool:
    theirs, ours = outputs(expected), outputs(found)
    return same_containers(found, expected) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


class Runs:
    """A model's results for an example, and for other sizes that it accepts. It is called only when they are needed.

    Args:
        model: A module in evaluation mode, on the inputs' device.
        inputs: The example.
        expected: The model's result for it, if it is known.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, expected: Any = None) -> None:
        self.inputs = inputs
        self._model, self._expected = model, expected

    @cached_property
    def found(self) -> list[tuple[Inputs, Any]]:
        """The example and the other inputs, each with the result.

        Raises:
            Untraceable: The model cannot be called with the example.
        """
        if self._expected is None:
            try:
                self._expected = evaluate(self._model, self.inputs)
            except Exception as error:
                raise Untraceable(f"it cannot be called again: {in_one_line(error)[:200]}") from error
        found = [(self.inputs, self._expected)]
        for choice in self.inputs.resized():
            for other in choice:
                try:
                    found.append((other, evaluate(self._model, other)))
                    break
                except Exception:  # the model does not accept this size
                    continue
        return found

    @property
    def smallest(self) -> Inputs:
        """The inputs with the fewest values."""
        return min((inputs for inputs, _ in self.found), key=lambda i: sum(x.numel() for x in i.tensors()))


_WAYS: dict[str, Callable[[nn.Module, Runs], fx.GraphModule]] = {"fx": _by_fx, "export": _by_export}


def trace(
    model: nn.Module,
    inputs: Inputs | Runs,
    *,
    expected: Any = None,
    ways: tuple[str, ...] = ("fx", "export"),
    prepare: Callable[[fx.GraphModule], fx.GraphModule] = lambda module: module,
) -> Trace:
    """Return the model as a graph with the same results on the example and on other sizes that the model accepts.

    Args:
        model: A module in evaluation mode, on the inputs' device. This calls it. The graph uses its parameters.
        inputs: The example, or runs with it and other sizes.
        expected: The model's result for the example, if it is known.
        ways: The ways to trace, in this order. A graph that accepts only some sizes is the last resort.
        prepare: A function that rewrites each graph before it is tried.

    Raises:
        Untraceable: no way to trace gives a graph with the model's results.
    """
    runs = inputs if isinstance(inputs, Runs) else Runs(model, inputs, expected)
    reasons, fixed = [], None
    for way in ways:
        try:
            module = prepare(_WAYS[way](model, runs))
            found = _tried(module, way, runs.found)
        except Exception as error:
            reasons.append(f"{way}: {in_one_line(error)[:200]}")
            continue
        if found is None:
            reasons.append(f"{way}: its graph gives different results")
        elif not found.refused:
            return found
        elif fixed is None or len(found.refused) < len(fixed.refused):
            fixed = found
    if fixed is not None:
        return fixed
    raise Untraceable("; ".join(reasons))


def _tried(module: fx.GraphModule, how: str, runs: list[tuple[Inputs, Any]]) -> Trace | None:
    """Return the graph with what is recorded in the runs; None if its result for the example differs."""
    (example, expected), *others = runs
    first, result = _recorded(module, example, keep=True)
    if not _same_result(result, expected):
        return None
    records, sizes, refused = [first], [example], []
    for inputs, expected in others:
        try:
            recorder, result = _recorded(module, inputs, keep=False)
            same = _same_result(result, expected)
        except Exception:
            same = False
        if same:
            records.append(recorder)
            sizes.append(inputs)
        else:
            refused.append(inputs)
    shapes = {
        node: tuple(zip(*(each.shapes[node] for each in records), strict=True))
        for node in first.shapes
        if len({len(each.shapes[node]) for each in records}) == 1
    }
    paths = {node: path_of(node) for node in module.graph.nodes}
    return Trace(module, how, tuple(sizes), tuple(refused), shapes, first.found, paths)


def path_of(node: Node) -> str:
    """Return the path of the module that the call comes from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target) if node.op == "call_module" else ""
    path = next(reversed(stack.values()))[0] if isinstance(stack, dict) else ""
    return str(path).removeprefix("L['self']").lstrip(".")
