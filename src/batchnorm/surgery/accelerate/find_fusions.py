"""Find the additions and activations that follow batch normalization, in the graphs of the modules around it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import ops
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.graphs import forward_graph as forward_tracing
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.surgery.accelerate.fused_forward import (
    Activation,
    Assumed,
    Rewrite,
    fused_class,
    named_activation,
    norm_act,
    why_not_rewritten,
)
from batchnorm.walk import is_hooked

_ADDITION_TAKEN = "the addition after it is fused with another layer"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE_FUNCTIONS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, setattr,
)  # fmt: skip


@dataclass(frozen=True)
class Fused:
    """The operations that are fused with one layer, and the module whose `forward` is rewritten for it."""

    holder: str
    residual: bool
    activation: str

    def __str__(self) -> str:
        return " + ".join(["residual"] * self.residual + [self.activation] * (self.activation != "none"))


@dataclass
class Fusions:
    """The fusions found in a model.

    Attributes:
        rewrites: The rewritten `forward` of each module, by the module's path.
        fused: The operations fused with each layer, by the layer's path.
        reasons: Why nothing is fused with a layer, by the layer's path.
    """

    rewrites: dict[str, Rewrite] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def find_fusions(model: nn.Module, norms: dict[str, nn.Module], calls: dict[str, Inputs] | None) -> Fusions:
    """Find the operations after each layer, in the module that calls it or in an outer module that gets its result.

    Args:
        model: A copy that may be changed.
        norms: Its layers, by path.
        calls: The inputs that each module was called with, by path; None if the model was not run.
    """
    found = Fusions()
    through: dict[str, set[str]] = {}  # the modules that the graph of a rewritten module inlines, by path
    waiting: dict[str, tuple[str, tuple[str, ...]]] = {}
    waiting.update({path: (caller, ()) for path in norms if (caller := caller_of(model, path)) is not None})
    while waiting:
        # Inner modules come first; in a module, the layers that it calls itself come before deeper ones.
        place = max(waiting.values(), key=lambda at: (at[0].count(".") + bool(at[0]), at[0], -len(at[1]), at[1]))
        group = [path for path, at in waiting.items() if at == place]
        holder, passed = place
        steps = through.get(holder, set()) | set(passed)
        try:
            matches, rewrite = _match_in(model, holder, sorted(steps), norms, calls)
        except Untraceable as reason:
            why = f"{holder or 'the model'} ({type(model.get_submodule(holder)).__name__}) {reason}"
            matches, rewrite = dict.fromkeys(group, why), None
        fused = {path: match for path, match in matches.items() if isinstance(match, Fused)}
        former = {path for path, match in found.fused.items() if match.holder == holder}
        accepted = rewrite is not None and fused.keys() > former
        if rewrite is not None and accepted:
            found.rewrites[holder] = rewrite
            found.fused.update({path: match for path, match in fused.items() if path not in found.fused})
            through[holder] = steps
        for path in group:
            match = matches.get(path, _Leaves("no call of it can be traced"))
            further = caller_of(model, holder)
            if isinstance(match, _Leaves) and further is not None:
                waiting[path] = (further, (*passed, holder))
                continue
            del waiting[path]
            if not isinstance(match, Fused):
                found.reasons[path] = str(match)
            elif path not in found.fused:
                found.reasons[path] = _ADDITION_TAKEN
    return found


class _Leaves(str):
    """A reason to look in an outer module: the result leaves this one, or this one does not call the layer."""


def caller_of(model: nn.Module, path: str) -> str | None:
    """Return the nearest module around a path that has a `forward`; None for the model itself."""
    while path:
        path = path.rpartition(".")[0]
        if type(model.get_submodule(path)).forward is not nn.Module.forward:
            return path
    return None


def _match_in(
    model: nn.Module, holder: str, through: list[str], norms: dict[str, nn.Module], calls: dict[str, Inputs] | None
) -> tuple[dict[str, Fused | str], Rewrite | None]:
    """Return the operations to fuse with each layer in a holder's graph, or why there are none, and the new code."""
    root = model.get_submodule(holder)
    prefix = f"{holder}." if holder else ""
    inner = [path.removeprefix(prefix) for path in through]
    inlined = [root.get_submodule(path) for path in inner]
    for module in (root, *inlined):
        if why := why_not_rewritten(module):
            raise Untraceable(why if module is root else f"calls a module that {why}")
    graph, expected = forward_tracing.graph_as_called(root, holder, inlined, calls, "on the way to the layer")

    paths = {id(module): path for path, module in norms.items()}
    matches: dict[str, Fused | str] = {}
    skipped: set[str] = set()
    for node in list(graph.nodes):
        if node.op == "call_module" and (path := paths.get(id(root.get_submodule(node.target)))):
            call = _LayerCall(graph, root, node)
            fusion = call.match()
            match = fusion if isinstance(fusion, str) else Fused(holder, call.residual is not None, fusion[0])
            if isinstance(match, Fused):
                call.rewrite()
                skipped.update(call.identities)
            if not isinstance(matches.get(path), Fused):  # a layer that is called twice
                matches[path] = match
    if not any(isinstance(match, Fused) for match in matches.values()):
        return matches, None
    graph.lint()
    assumed = [Assumed.of(root), *(Assumed.of(m, path, True) for m, path in zip(inlined, inner, strict=True))]
    assumed += [Assumed.of(root.get_submodule(path), path, True) for path in sorted(skipped)]
    assumed += [Assumed.of(m, path) for path, m in root.named_modules() if isinstance(m, _CONTAINERS)]
    code = forward_tracing.source(graph.python_code("self"))
    rewrite = Rewrite(type(root), code, expected, forward_tracing.positional_arguments(root), tuple(assumed))
    try:
        fused_class(rewrite)
    except Exception as error:
        raise Untraceable(f"is of a class that cannot be subclassed: {error}") from error
    return matches, rewrite


class _LayerCall:
    """One call of a layer in a graph, and the calls that follow it."""

    def __init__(self, graph: fx.Graph, root: nn.Module, norm: fx.Node) -> None:
        self.graph = graph
        self.root = root
        self.norm = norm
        self.add: fx.Node | None = None
        self.residual: fx.Node | None = None
        self.act: fx.Node | None = None
        self.activation: Activation | str = None
        self.identities: list[str] = []
        self.replaced = [norm]

    def match(self) -> tuple[str, float] | str:
        """Return the name and parameter of the activation to fuse with the layer, or why nothing can be fused."""
        if len(self.norm.args) != 1 or self.norm.kwargs or not isinstance(self.norm.args[0], fx.Node):
            return "it is called with more than its input"
        if isinstance(self._module(self.norm), LazyModuleMixin):
            return "it is lazy; after its first batch, accelerate the model again"
        if is_hooked(self._module(self.norm)):
            return "it has hooks"
        value = self._after_identities(self.norm)
        user = self._only_user(value)
        if isinstance(user, fx.Node) and (residual := self._added(user, value)) is not None:
            if reason := self._why_not_as_late_as(user):
                return reason
            self.add, self.residual = user, residual
            self.replaced.append(user)
            value = self._after_identities(user)
            user = self._only_user(value)
        named = self._activation(user, value) if isinstance(user, fx.Node) else None
        if named is not None:
            assert isinstance(user, fx.Node)
            self.act = user
            self.replaced.append(user)
            return named
        if self.add is not None:
            return "none", 0.0
        if isinstance(user, str):
            return user
        if user.target is norm_act:
            return _ADDITION_TAKEN
        return f"its result goes to {self._described(user)}"

    def rewrite(self) -> None:
        """Replace the layer's call and the calls fused with it by one call of `norm_act`."""
        last = self.add or self.norm
        with self.graph.inserting_before(last):
            layer = self.graph.get_attr(self.norm.target)  # type: ignore[arg-type]
            args: list[Any] = [layer, self.norm.args[0]]
            if self.residual is not None or self.act is not None:
                args.append(self.residual)
            if self.act is not None:
                module = self.act.op == "call_module"
                args.append(self.graph.get_attr(self.act.target) if module else self.activation)  # type: ignore[arg-type]
            fused = self.graph.call_function(norm_act, tuple(args))
        end = self.replaced[-1]
        end.replace_all_uses_with(fused)
        for node in reversed(self.replaced):
            self.graph.erase_node(node)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(node.target)  # type: ignore[arg-type]

    def _after_identities(self, value: fx.Node) -> fx.Node:
        """Return the value after each `nn.Identity` that is its only user."""
        while True:
            user = self._only_user(value)
            if not isinstance(user, fx.Node) or user.op != "call_module" or type(self._module(user)) is not nn.Identity:
                return value
            if is_hooked(self._module(user)):
                return value
            self.identities.append(user.target)  # type: ignore[arg-type]
            self.replaced.append(user)
            value = user

    @staticmethod
    def _only_user(value: fx.Node) -> fx.Node | str:
        users = list(value.users)
        if not users:
            return "its result is not used"
        if any(user.op == "output" for user in users):
            return _Leaves("its result is the network's") if len(users) == 1 else "its result goes to several places"
        uses = sum(node is value for user in users for node in _arguments(user))
        return users[0] if uses == 1 else "its result goes to several places"

    def _added(self, user: fx.Node, value: fx.Node) -> fx.Node | None:
        """Return the tensor that is added to the value; None if the user is not a plain addition."""
        function = user.op == "call_function" and user.target in _ADD_FUNCTIONS
        method = user.op == "call_method" and user.target in _ADD_METHODS
        if not (function or method) or len(user.args) != 2 or set(user.kwargs) - {"other"}:
            return None
        first, second = user.args
        in_place = user.target is operator.iadd or user.target in ("add_", "__iadd__")
        other = second if first is value else first if not in_place else None  # x += bn(...) changes x
        return other if isinstance(other, fx.Node) and self._is_tensor(other) else None

    @staticmethod
    def _is_tensor(node: fx.Node) -> bool:
        return node.target is not getattr  # such as x.shape; everything else is checked at the call

    def _why_not_as_late_as(self, add: fx.Node) -> str:
        """Return why the layer cannot be called as late as the addition; empty if it can."""
        x, layer = self.norm.args[0], self._module(self.norm)
        order = list(self.graph.nodes)
        start, end = order.index(self.norm), order.index(add)
        early = set(order[:start])
        for node in order[start + 1 : end]:
            if node in self.replaced:
                continue
            called = self._module(node) if node.op == "call_module" else None
            if called is not None and any(part is layer for part in called.modules()):
                return "it is called again before its result is added"
            in_place = _in_place(node, called) and any(a in early for a in _arguments(node))
            if in_place or x in _arguments(node):
                return "its input may change before its result is added"
        return ""

    def _activation(self, user: fx.Node, value: fx.Node) -> tuple[str, float] | None:
        """Return the activation's name and parameter; None if the user is not an activation that this library fuses."""
        first, *rest = user.args or (None,)
        if first is not value:
            return None
        if user.op == "call_module":
            module = self._module(user)
            named = None if rest or user.kwargs else named_activation(module)
            self.activation = module
            return named
        if user.op not in ("call_function", "call_method"):
            return None
        self.activation = ops.called_activation(user.target, rest, user.kwargs)
        return self.activation

    def _described(self, user: fx.Node) -> str:
        if user.op == "call_module":
            return f"{user.target} ({type(self._module(user)).__name__})"
        return user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))


def _arguments(node: fx.Node) -> list[fx.Node]:
    """Return every node among a node's arguments, with repetitions."""
    found: list[fx.Node] = []
    collect: Callable[[fx.Node], None] = found.append
    fx.map_arg((node.args, node.kwargs), collect)
    return found


def _in_place(node: fx.Node, called: nn.Module | None) -> bool:
    """Return whether a node may change its arguments."""
    if called is not None:
        return any(getattr(part, "inplace", False) for part in called.modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    return named or bool(node.kwargs.get("inplace")) or "out" in node.kwargs or node.target in _IN_PLACE_FUNCTIONS
