"""A module's `forward`, rewritten to fuse batch normalization with the addition and the activation after it.

The layers themselves do not change. The rewritten `forward` of the module that contains them calls `norm_act`, which
runs them in one operation if it can, and one by one otherwise. A tool can therefore replace, fold or hook a layer
afterwards, and restoring the class's own `forward` undoes everything.
"""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from batchnorm import ops
from batchnorm.models.graphs.forward_graph import ABSENT, Expected
from batchnorm.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.followed import fused_activation, is_foreign
from batchnorm.walk import is_hooked

# A name with its parameter, a module that may be an activation, or None.
Activation = tuple[str, float] | nn.Module | None

_FUSABLE = (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)


def named_activation(activation: Activation) -> tuple[str, float] | None:
    """Return an activation's name and parameter; None for a module that has hooks or computes anything else."""
    if activation is None:
        return "none", 0.0
    if isinstance(activation, tuple):
        return activation
    return None if is_hooked(activation) else ops.module_activation(activation)


def norm_act(norm: nn.Module, x: Tensor, residual: Tensor | None = None, activation: Activation = None) -> Tensor:
    """Return `activation(norm(x) + residual)`: in one operation if layer, activation and residual allow it."""
    named = named_activation(activation)
    if named is not None and _is_fusable(norm) and not is_hooked(norm) and _can_add(x, residual):
        return norm._normalize(x, residual, activation=named)  # type: ignore[operator]
    y: Tensor = norm(x)
    if residual is not None:
        y = y + residual
    if isinstance(activation, nn.Module):
        return activation(y)
    return y if activation is None else ops.ACTIVATIONS[activation[0]].forward(y, activation[1])


def _is_fusable(norm: nn.Module) -> bool:
    kind = type(norm)
    return kind in _FUSABLE or (is_foreign(kind) and fused_activation(norm) == ("none", 0.0))


def _can_add(x: Tensor, residual: Any) -> bool:
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


@dataclass(frozen=True)
class Assumed:
    """The state of a module when its `forward` was traced. The trace is valid only while the module is in this state.

    Attributes:
        path: The path from the rewritten module.
        kind: Its class.
        children: The names of its modules.
        attributes: Its plain attributes: flags, numbers, strings, functions.
        inlined: Whether the trace contains its operations, so that its hooks would not run.
    """

    path: tuple[str, ...]
    kind: type[nn.Module]
    children: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    inlined: bool

    @staticmethod
    def of(module: nn.Module, path: str = "", inlined: bool = False) -> Assumed:
        """Return the module's present state."""
        plain = (type(None), bool, int, float, str, type, types.FunctionType, types.BuiltinFunctionType)
        attributes = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_" and k != "training"}
        names = tuple(path.split(".")) if path else ()
        return Assumed(names, original_class(module), tuple(module._modules), tuple(attributes.items()), inlined)

    def holds(self, root: nn.Module) -> bool:
        """Return whether the module in the rewritten module `root` is still in this state."""
        module: Any = root
        for name in self.path:
            module = module._modules.get(name)
            if module is None:
                return False
        if self.path and original_class(module) is not self.kind:
            return False
        if self.inlined and is_hooked(module):
            return False
        if tuple(module._modules) != self.children:
            return False
        held = module.__dict__
        return all(held.get(name, ABSENT) == value for name, value in self.attributes)


@dataclass(frozen=True)
class Rewrite:
    """A rewritten `forward`: its source, and the conditions for its use. It is plain data, so it can be pickled.

    Attributes:
        base: The class whose `forward` it replaces.
        source: Python source of a function `forward(self, *tensors)`, with its imports.
        arguments: The arguments that it expects.
        positional: The number of arguments that may be passed by position.
        assumed: The states of the modules in which it is valid.
    """

    base: type[nn.Module]
    source: str
    arguments: tuple[Expected, ...]
    positional: int
    assumed: tuple[Assumed, ...]

    def tensors(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Return the tensors that the rewritten function takes; None if the class's own `forward` must be called."""
        if len(args) > self.positional or _has_any_global_hook():
            return None
        tensors: list[Tensor] = []
        named = 0
        for i, expected in enumerate(self.arguments):
            if i < len(args):
                argument = args[i]
            elif expected.name in kwargs:
                argument = kwargs[expected.name]
                named += 1
            else:
                argument = ABSENT
            found = expected.tensors(argument)
            if found is None:
                return None
            tensors.extend(found)
        if named != len(kwargs):
            return None
        for assumed in self.assumed:
            if not assumed.holds(module):
                return None
        return tensors


@functools.cache
def _function(source: str) -> Callable[..., Any]:
    """Compile the function, and make its lines known to tracebacks."""
    name = f"<fused forward {len(linecache.cache)}>"
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), namespace)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return namespace["forward"]


@functools.cache
def fused_class(rewrite: Rewrite) -> type[nn.Module]:
    """Return a subclass with the rewritten `forward` and the same name, whose instances can be pickled."""
    base, run = rewrite.base, _function(rewrite.source)
    own_forward: Callable[..., Any] = base.forward

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = rewrite.tensors(self, args, kwargs) if base.forward is own_forward else None
        return base.forward(self, *args, **kwargs) if tensors is None else run(self, *tensors)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        default: tuple[Any, ...] = base.__reduce_ex__(self, max(int(protocol), 2))  # type: ignore[assignment]
        # Instances of a further subclass must not become instances of this class.
        return (_new, (rewrite,), *default[2:]) if type(self) is fused else default

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "forward": forward,
        "_rewrite": rewrite,
    }
    fused = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(namespace))
    return fused


def _new(rewrite: Rewrite) -> nn.Module:
    """Return an empty instance, for unpickling and copying."""
    fused = fused_class(rewrite)
    return fused.__new__(fused)


def why_not_rewritten(module: nn.Module) -> str:
    """Return why the module's class cannot be replaced by a subclass with another `forward`; empty if it can."""
    kind = original_class(module)
    if "forward" in module.__dict__:
        return "has its own forward instead of its class's"
    if kind.__call__ is not nn.Module.__call__:
        return "is not called through forward"
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return "defines how it is copied and saved"
    if not isinstance(kind.forward, types.FunctionType):
        return "has a forward that is not a Python function"
    return ""


def rewrite_of(module: nn.Module) -> Rewrite | None:
    """Return how the module's `forward` was rewritten; None if it was not."""
    return vars(type(module)).get("_rewrite")


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class before its `forward` was rewritten."""
    rewrite = rewrite_of(module)
    return type(module) if rewrite is None else rewrite.base


def undo_fusion(model: nn.Module) -> list[str]:
    """Restore the original `forward` of every rewritten module of the model, and return the paths of these modules.

    The layers stay as they are: the network computes the same, without fusion.
    """
    paths = []
    for path, module in model.named_modules():
        rewrite = rewrite_of(module)
        if rewrite is not None:
            module.__class__ = rewrite.base
            paths.append(path)
    return paths
