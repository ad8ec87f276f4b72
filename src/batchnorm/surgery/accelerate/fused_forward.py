"""A module's `forward`, rewritten so that batch normalization takes addition and activation with it.

The layers themselves stay what they are: the rewritten `forward` of their holder calls them through `norm_act`, which
makes one operation of them where it may and calls them one by one otherwise. So nothing is lost to who replaces,
folds or hooks a layer afterwards, and to put the class's own `forward` back is enough to undo it.
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
from batchnorm.models.forward_graph import ABSENT, Expected
from batchnorm.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.walk import is_hooked

# An activation by name with its parameter, a module that may be one, or nothing.
Activation = tuple[str, float] | nn.Module | None

_FUSABLE = (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)


def named_activation(activation: Activation) -> tuple[str, float] | None:
    """Return an activation's name and parameter; None for a module that is no activation we fuse, or that has hooks."""
    if activation is None:
        return "none", 0.0
    if isinstance(activation, tuple):
        return activation
    return None if is_hooked(activation) else ops.module_activation(activation)


def norm_act(norm: nn.Module, x: Tensor, residual: Tensor | None = None, activation: Activation = None) -> Tensor:
    """`activation(norm(x) + residual)`: one operation where layer, activation and residual allow it, else three."""
    named = named_activation(activation)
    if named is not None and type(norm) in _FUSABLE and not is_hooked(norm) and _same_kind(x, residual):
        return norm._normalize(x, residual, activation=named)  # type: ignore[operator]
    y: Tensor = norm(x)
    if residual is not None:
        y = y + residual
    if isinstance(activation, nn.Module):
        return activation(y)
    return y if activation is None else ops.ACTIVATIONS[activation[0]].forward(y, activation[1])


def _same_kind(x: Tensor, residual: Any) -> bool:
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


@dataclass(frozen=True)
class Assumed:
    """What a module was like when its `forward` was traced, and has to be for the trace to be what it would do.

    Attributes:
        path: From the rewritten module.
        kind: Its class.
        children: The names of its modules.
        attributes: Its plain attributes: flags, numbers, strings, functions.
        inlined: Whether the trace goes through it, so that its hooks would not run.
    """

    path: tuple[str, ...]
    kind: type[nn.Module]
    children: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    inlined: bool

    @staticmethod
    def of(module: nn.Module, path: str = "", inlined: bool = False) -> Assumed:
        """What the module is like now."""
        plain = (type(None), bool, int, float, str, type, types.FunctionType, types.BuiltinFunctionType)
        attributes = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_" and k != "training"}
        names = tuple(path.split(".")) if path else ()
        return Assumed(names, original_class(module), tuple(module._modules), tuple(attributes.items()), inlined)

    def holds(self, root: nn.Module) -> bool:
        """Whether it still is so in the rewritten module `root`."""
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
class Plan:
    """A rewritten `forward`: its source, and when it stands for the class's own. Plain data, and so pickled.

    Attributes:
        base: The class whose `forward` it stands for.
        source: Python of a function `forward(self, *tensors)`, with its imports.
        arguments: What each argument has to be.
        positional: How many of the arguments may be given by position.
        assumed: What the modules have to be like.
    """

    base: type[nn.Module]
    source: str
    arguments: tuple[Expected, ...]
    positional: int
    assumed: tuple[Assumed, ...]

    def tensors(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors that the rewritten function takes; None where the class's own `forward` has to be called."""
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
    """The compiled function; its lines are known to tracebacks."""
    name = f"<fused forward {len(linecache.cache)}>"
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), namespace)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return namespace["forward"]


@functools.cache
def fused_class(plan: Plan) -> type[nn.Module]:
    """A subclass of the plan's class with the rewritten `forward`, of the same name, whose instances pickle."""
    base, run = plan.base, _function(plan.source)
    own_forward: Callable[..., Any] = base.forward

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = plan.tensors(self, args, kwargs) if base.forward is own_forward else None
        return base.forward(self, *args, **kwargs) if tensors is None else run(self, *tensors)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        default: tuple[Any, ...] = base.__reduce_ex__(self, max(int(protocol), 2))  # type: ignore[assignment]
        # Whose class is a further subclass has to know how that is made.
        return (_new, (plan,), *default[2:]) if type(self) is fused else default

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "forward": forward,
        "_fused_plan": plan,
    }
    fused = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(namespace))
    return fused


def _new(plan: Plan) -> nn.Module:
    """An empty instance, for unpickling and copying."""
    fused = fused_class(plan)
    return fused.__new__(fused)


def can_be_rewritten(module: nn.Module) -> str:
    """Why the module's class cannot be replaced by a subclass with another `forward`; empty where it can."""
    kind = original_class(module)
    if "forward" in module.__dict__:
        return "has a forward of its own, which is not its class's"
    if kind.__call__ is not nn.Module.__call__:
        return "is called by other means than forward"
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return "has its own way to be copied and saved"
    if not isinstance(kind.forward, types.FunctionType):
        return "has a forward that is not a Python function"
    return ""


def plan_of(module: nn.Module) -> Plan | None:
    """How the module's `forward` was rewritten; None where it was not."""
    return vars(type(module)).get("_fused_plan")


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without our rewriting."""
    plan = plan_of(module)
    return type(module) if plan is None else plan.base


def undo_fusion(model: nn.Module) -> list[str]:
    """Give every rewritten module of the model its class's own `forward` again, and return their paths.

    The layers stay as they are: the network computes the same with one operation each.
    """
    paths = []
    for path, module in model.named_modules():
        plan = plan_of(module)
        if plan is not None:
            module.__class__ = plan.base
            paths.append(path)
    return paths
