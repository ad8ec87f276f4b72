"""Trace one module's `forward` as a graph that is valid in training and in evaluation."""

from __future__ import annotations

import importlib
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from batchnorm.models.data.inputs import Inputs
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.models.graphs.tracing.symbolic import Tracer
from batchnorm.walk import is_hooked, set_mode

ABSENT: Any = object()
_SIMPLE = (type(None), bool, int, float, str)
_DEVICES = ("cpu", "cuda")
_BRANCHES = "branches on shapes or values in its forward"


@dataclass(frozen=True)
class Expected:
    """One argument that a rewritten `forward` expects.

    Attributes:
        name: The parameter's name.
        kind: "tensor"; "list" or "tuple" of tensors; "constant"; or "absent".
        count: The number of tensors in a list or tuple.
        value: The constant.
        optional: Whether the argument may be omitted; it then has the value of the constant.
    """

    name: str
    kind: str
    count: int = 1
    value: Any = None
    optional: bool = False

    def tensors(self, argument: Any) -> Sequence[Tensor] | None:
        """Return the tensors in the argument, or None if the argument is not as expected."""
        if self.kind == "tensor":
            return (argument,) if isinstance(argument, Tensor) else None
        if self.kind == "constant":
            same = type(argument) is type(self.value) and argument == self.value
            return () if same or (self.optional and argument is ABSENT) else None
        if self.kind == "absent":
            return () if argument is ABSENT else None
        if type(argument) is not (list if self.kind == "list" else tuple) or len(argument) != self.count:
            return None
        return argument if all(isinstance(part, Tensor) for part in argument) else None


def expected_arguments(module: nn.Module, call: Inputs | None) -> tuple[Expected, ...]:
    """Describe the arguments of the module's `forward` as in this call, or else as tensors and defaults.

    Raises:
        Untraceable: an argument is neither a tensor, a list or tuple of tensors, nor a plain constant.
    """
    parameters = _parameters(module)
    given: dict[str, Any] = {}
    if call is not None:
        bound = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
    expected = []
    for parameter in parameters:
        default = parameter.default
        if parameter.name in given:
            expected.append(_expected(parameter.name, given[parameter.name], default))
        elif default is parameter.empty:
            expected.append(Expected(parameter.name, "tensor"))
        elif isinstance(default, _SIMPLE):
            expected.append(Expected(parameter.name, "constant", value=default, optional=True))
        else:
            expected.append(Expected(parameter.name, "absent"))
    if call is not None and sum(e.name in given for e in expected) < len(call.args) + len(call.kwargs):
        raise Untraceable("is called with arguments that its forward does not name")
    return tuple(expected)


def graph_as_called(
    root: nn.Module, holder: str, inlined: Sequence[nn.Module], calls: dict[str, Inputs] | None, where: str
) -> tuple[fx.Graph, tuple[Expected, ...]]:
    """Return the graph of the module at `holder` for its recorded call, with modules inlined, and its arguments.

    Raises:
        Untraceable: an inlined module has hooks (the message ends with `where`), the module was not called, or `trace`
            fails.
    """
    if any(map(is_hooked, inlined)):
        raise Untraceable(f"calls a module that has hooks, {where}")
    if calls is not None and holder not in calls:
        raise Untraceable("is not called with the example inputs")
    expected = expected_arguments(root, None if calls is None else calls[holder])
    graph, _ = trace(root, expected, inlined, known=calls is not None)
    return graph, expected


def positional_arguments(module: nn.Module) -> int:
    """Return the number of arguments that the module's `forward` accepts by position."""
    return sum(p.kind is not p.KEYWORD_ONLY for p in _parameters(module))


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _expected(name: str, argument: Any, default: Any) -> Expected:
    if isinstance(argument, Tensor):
        return Expected(name, "tensor")
    if type(argument) in (list, tuple) and argument and all(isinstance(part, Tensor) for part in argument):
        return Expected(name, type(argument).__name__, len(argument))
    if isinstance(argument, _SIMPLE):
        same = type(argument) is type(default) and argument == default
        return Expected(name, "constant", value=argument, optional=same)
    raise Untraceable(f"is called with {name} of type {type(argument).__name__}")


def trace(
    module: nn.Module, expected: Sequence[Expected], inlined: Sequence[nn.Module], known: bool
) -> tuple[fx.Graph, fx.graph.PythonCode]:
    """Return the graph of the module's `forward`, which must be the same in training and evaluation, and its code.

    Args:
        module: A copy of the module, because tracing may change its modes and attributes.
        expected: The arguments of its `forward`.
        inlined: The submodules to trace through; every other submodule becomes one node.
        known: Whether the arguments come from a real call, so that their types are known.

    Raises:
        Untraceable: there is no such graph.
    """
    try:
        return _trace(module, expected, inlined, known, functions=False)
    except Untraceable:
        return _trace(module, expected, inlined, known, functions=True)


def _trace(
    module: nn.Module, expected: Sequence[Expected], inlined: Sequence[nn.Module], known: bool, functions: bool
) -> tuple[fx.Graph, fx.graph.PythonCode]:
    graphs = []
    for training in (True, False):
        set_mode(module, training)
        before, drawn = [_attributes_of(m) for m in (module, *inlined)], _random_state()
        tracer = _Tracer(expected, inlined, known, functions)
        try:
            with _gradients_and_autocast(training):
                graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:  # user code may fail in any way on symbolic values
            reason = str(error).partition("\n")[0].strip() or type(error).__name__
            raise Untraceable(f"cannot be traced: {reason}") from error
        if _random_state() != drawn:
            raise Untraceable("draws random numbers in its forward")
        if any(_changed(m, was) for m, was in zip((module, *inlined), before, strict=True)):
            raise Untraceable("changes its own attributes in its forward")
        for node in graph.nodes:
            node.type = None  # only the original file defines the names in annotations
        graphs.append((graph, graph.python_code("self")))
    (graph, code), (_, other) = graphs
    if code.src != other.src or code.globals != other.globals:
        raise Untraceable("does not compute the same in training and in evaluation")
    return graph, code


def source(code: fx.graph.PythonCode) -> str:
    """Return the code with its imports, so that it compiles in any module.

    Raises:
        Untraceable: a value in it cannot be imported by name, or the name of a submodule is not valid in Python.
    """
    try:
        used = compile(code.src, "<traced>", "exec").co_consts
    except (SyntaxError, ValueError) as error:  # torch.fx writes names of submodules without escapes
        raise Untraceable("has a submodule whose name cannot be written as source code") from error
    names = {name for const in used if inspect.iscode(const) for name in const.co_names}
    lines = []
    for name, value in sorted(code.globals.items()):
        if name not in names:
            continue
        if inspect.ismodule(value):
            lines.append(f"import {value.__name__} as {name}")
        elif value is type(None):
            lines.append(f"{name} = type(None)")
        elif isinstance(value, float):
            lines.append(f"{name} = float({str(value)!r})")
        else:
            lines.append(f"{_import(value)} as {name}")
    return "\n".join([*lines, code.src.strip("\n"), ""])


def _import(value: Any) -> str:
    where, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    try:
        found = getattr(importlib.import_module(where), name, None) if where and name.isidentifier() else None
    except ImportError:
        found = None
    if found is not value or where == "__main__":
        raise Untraceable(f"calls {name or value!r}, which cannot be imported by name")
    return f"from {where} import {name}"


class _Value(fx.Proxy):
    """A symbolic value. Its type is `Tensor` if known; otherwise, a check of its type raises an error."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in ("abc", "typing"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "batchnorm"):
            return type(self)
        if self.node.op == "placeholder" and self.tracer.known:  # type: ignore[attr-defined]
            return Tensor
        hint = "; pass example_inputs to make it known" if self.node.op == "placeholder" else ""
        raise Untraceable(f"checks the type of a value in its forward{hint}")

    def __int__(self) -> int:
        raise Untraceable(_BRANCHES)

    __float__ = __complex__ = __int__
    __index__ = __int__


def _in_place(name: str) -> Callable[[_Value, Any], fx.Proxy]:
    """Trace `x += y` and similar statements as in-place operations; fx would trace `x = x + y`."""
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Value, f"__i{_name}__", _in_place(f"i{_name}"))


class _Tracer(Tracer):
    def __init__(
        self, expected: Sequence[Expected], inlined: Sequence[nn.Module], known: bool, functions: bool
    ) -> None:
        super().__init__(functions=functions)
        self.expected = expected
        self.inlined = {id(module) for module in inlined}
        self.known = known
        self.surroundings = _global_settings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.inlined

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        self.surroundings = _global_settings()
        given: dict[str, Any] = {}
        for expected in self.expected:
            if expected.kind == "tensor":
                given[expected.name] = self._placeholder(expected.name)
            elif expected.kind == "constant":
                given[expected.name] = expected.value
            elif expected.kind != "absent":
                parts = [self._placeholder(f"{expected.name}_{i}") for i in range(expected.count)]
                given[expected.name] = parts if expected.kind == "list" else tuple(parts)
        return lambda: root_fn(self.root, **given), []

    def _placeholder(self, name: str) -> fx.Proxy:
        return self.create_proxy("placeholder", name, (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _global_settings() != self.surroundings:
            raise Untraceable("changes how gradients, autocast or saved tensors are handled in its forward")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable(_BRANCHES)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise Untraceable("iterates over a value of unknown length in its forward")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise Untraceable("uses a tensor that is neither argument, parameter nor buffer")
        return super().create_arg(a)


def _global_settings() -> tuple[Any, ...]:
    """Return the global settings that a `with` in a `forward` may change, because a graph loses such changes."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in _DEVICES),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    )


@contextmanager
def _gradients_and_autocast(training: bool) -> Iterator[None]:
    """Turn gradients and autocast on for training and off for evaluation, to detect code that sets them."""
    before = [torch.is_autocast_enabled(device) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, training)
        with torch.set_grad_enabled(training):
            yield
    finally:
        for device, enabled in zip(_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


def _random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (other code may draw from it)
    generators = [torch.random.get_rng_state()]
    if torch.cuda.is_initialized():
        generators += torch.cuda.get_rng_state_all()
    return random.getstate(), name, np.asarray(keys).tobytes(), rest, [g.numpy().tobytes() for g in generators]


def _attributes_of(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """Return every attribute, parameter, buffer and submodule, with the sizes of containers."""
    attributes = {name: value for name, value in vars(module).items() if name != "training"}
    for holder in ("_parameters", "_buffers", "_modules"):
        attributes.update({f"{holder}.{name}": value for name, value in attributes[holder].items()})
    return {name: (value, _size(value)) for name, value in attributes.items()}


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict, set)) else 0


def _changed(module: nn.Module, before: dict[str, tuple[Any, int]]) -> bool:
    now = _attributes_of(module)
    return now.keys() != before.keys() or any(now[k][0] is not v or now[k][1] != n for k, (v, n) in before.items())
