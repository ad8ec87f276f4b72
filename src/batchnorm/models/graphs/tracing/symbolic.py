"""Trace a module with `torch.fx` without a change that other threads see."""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _wrapped_fns_to_patch
from torch.fx.node import map_aggregate

from batchnorm.models.graphs.tracing.containers import construction

# Replaces a module's call, also in torch: `nn.Module.compile` sets it.
_CALL = "_compiled_call_impl"
_HELD = ("_parameters", "_buffers")
_functions_replaced = threading.RLock()


class Tracer(fx.Tracer):
    """Records the calls of one module.

    The tracer of torch replaces `nn.Module.__call__` and `__getattr__` for the whole process: other models fail
    meanwhile, and an interruption may leave the replacements in place. This tracer changes only the traced modules.

    Args:
        functions: Whether to record calls of functions of `math` and of functions that were passed to `torch.fx.wrap`.
            They are then replaced in the namespaces that hold them. Other callers get the same results from the
            replacements.
    """

    def __init__(self, *, functions: bool = False) -> None:
        super().__init__()
        self._with_functions = functions
        self._paths: dict[Tensor, str] = {}
        self._read: dict[str, fx.Proxy] = {}

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        """Return the graph of the module's `forward`.

        Args:
            root: The module. While this runs, it cannot be used in other threads.
            concrete_args: As in torch.
        """
        self.root = root
        self.root_module_name = type(root).__name__
        self.graph = fx.Graph(tracer_cls=type(self))
        modules = dict(root.named_modules())
        self.submodule_paths = {module: path for path, module in modules.items()}
        self._paths = {t: path for path, t in (*root.named_buffers(), *root.named_parameters())}
        self._read = {}
        self.tensor_attrs = {
            value: f"{path}.{name}".lstrip(".")
            for path, module in modules.items()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        function, args = self.create_args_for_root(type(root).forward, True, concrete_args)
        record = functools.partial(self._record, function, args)
        with_modules = functools.partial(with_items, [self._items_of(module) for module in modules.values()], record)
        if self._with_functions:
            # If dynamo were imported meanwhile, as by a checkpoint, it would register the replacements as functions of
            # math, and could no longer compile calls of math.prod.
            importlib.import_module("torch._dynamo")
            with _functions_replaced:
                with_items(_recording_functions(root), with_modules)
        else:
            with_modules()
        self.submodule_paths = None
        return self.graph

    def _record(self, function: Callable[..., Any], args: list[Any]) -> None:
        self.create_node("output", "output", (self.create_arg(function(*args)),), {})

    def _items_of(self, module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the module's attributes, and the ones that make it record its calls, parameters and buffers."""
        held = vars(module)
        items: dict[str, Any] = {_CALL: functools.partial(self._call, module)}
        items.update({name: _Recorded(held[name], self._tensor) for name in _HELD if isinstance(held.get(name), dict)})
        return held, items

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(module).__name__ == "OptimizedModule":  # would compile its forward for symbolic values
            return module._orig_mod(*args, **kwargs)  # type: ignore[operator]
        return self.call_module(module, module._call_impl, args, kwargs)

    def _tensor(self, tensor: Any) -> Any:
        """Return the symbolic value of a parameter or buffer."""
        path = self._paths.get(tensor)
        if path is None:
            return tensor
        if path not in self._read:
            self._read[path] = self.create_proxy("get_attr", path, (), {})
        return self._read[path]

    def create_arg(self, a: Any) -> Any:
        """Return the value as an argument of a node; a container with its own class is constructed."""
        if (call := construction(a)) is not None:
            args, kwargs = tuple(map(self.create_arg, call.args)), self.create_arg(call.kwargs)
            return self.create_node("call_function", call.kind, args, kwargs)
        return super().create_arg(a)

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Remove nodes from the graph, the last one first."""
        for node in nodes:
            self.graph.erase_node(node)
        self._read = {path: proxy for path, proxy in self._read.items() if not proxy.node._erased}


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return a graph module of a class with this name."""
    # Unpickling traces the code again with this class. Torch's class works without this library, but loses containers.
    graph._tracer_cls = Tracer if any(isinstance(node.target, type) for node in graph.nodes) else fx.Tracer
    return fx.GraphModule(root, graph, name)


class _Recorded(dict[str, Any]):
    """The parameters or buffers of a module. Reading one by its name gives a symbolic value; changes pass through."""

    def __init__(self, held: dict[str, Any], read: Callable[[Any], Any]) -> None:
        super().__init__(held)
        self._held, self._symbolic = held, read

    def __getitem__(self, name: str) -> Any:
        return self._symbolic(super().__getitem__(name))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._held[name] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._held[name]


def _recording_functions(root: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each namespace that holds functions to record, and the replacements of these."""
    of_math = {id(value) for name, value in vars(math).items() if callable(value) and not name.startswith("_")}
    spaces = [vars(math), *(getattr(type(m).forward, "__globals__", {}) for m in root.modules())]
    replacements: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for space in spaces:
        found = {name: _recording(value) for name, value in space.items() if id(value) in of_math}
        replacements.setdefault(id(space), (space, found))
    for (_, name), space in list(_wrapped_fns_to_patch.items()):
        function = space.get(name, getattr(builtins, name, None))
        if function is not None:
            replacements.setdefault(id(space), (space, {}))[1][name] = _recording(function)
    return list(replacements.values())


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that records a call with symbolic values, and does the same as `function` otherwise."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        found: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda value: found.append(value) if isinstance(value, fx.Proxy) else None)
        if not found:
            return function(*args, **kwargs)
        return found[0].tracer.create_proxy("call_function", function, args, kwargs)

    return called


def with_items(changes: list[tuple[dict[str, Any], dict[str, Any]]], work: Callable[[], None]) -> None:
    """Put items into dictionaries, do the work, and put the dictionaries' own items back.

    Each step over all dictionaries is one call into C, within which no signal handler runs. An interruption therefore
    leaves nothing changed.
    """
    dictionaries = [held for held, _ in changes]
    own = [{name: held[name] for name in new if name in held} for held, new in changes]
    added = [(held, name) for held, new in changes for name in new if name not in held]
    put = _one_call(dict.update, dictionaries, [new for _, new in changes])
    put_back = _one_call(dict.update, dictionaries, own)
    remove = _one_call(dict.pop, [held for held, _ in added], [name for _, name in added], repeat(None))
    try:
        put()
        work()
    finally:
        try:
            put_back()
        finally:
            remove()


def _one_call(method: Callable[..., Any], *arguments: Iterable[Any]) -> Callable[[], object]:
    """Return a call into C that calls a method of built-in objects with each of the arguments."""
    return functools.partial(deque, map(method, *arguments), maxlen=0)
