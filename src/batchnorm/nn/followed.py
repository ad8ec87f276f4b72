"""Normalization that applies two modules to its result, `act(drop(norm(x)))`, as timm's `BatchNormAct2d` does.

A converted layer of another library keeps its modules `drop` and `act`. They stay in effect: they can be replaced, and
their hooks run. If dropout does nothing and the operators know the activation, all of it is one operation.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from batchnorm import ops
from batchnorm.foreign import FOLLOWERS, applies_followers
from batchnorm.nn.layer import NormLayer
from batchnorm.walk import is_hooked

_BASE = "_follows"
_made: dict[type[nn.Module], type[nn.Module]] = {}


def followed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass, with the same name, whose objects have `drop` and `act` and apply them.

    Args:
        kind: A normalization of torch or of this library; or another library's layer for which `applies_followers` is
            true, which is normalized by this library instead.
    """
    if _BASE in vars(kind):
        return kind
    if kind not in _made:
        _made[kind] = _make(kind)
    return _made[kind]


def _make(kind: type[nn.Module]) -> type[nn.Module]:
    foreign = not kind.__module__.startswith(("torch.", "batchnorm."))
    bases = (NormLayer, kind) if foreign else (kind,)
    normalized: Any = NormLayer._normalize if foreign else kind.forward
    fuses = foreign or (issubclass(kind, NormLayer) and kind._normalize is NormLayer._normalize)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fuses and not args and not kwargs and (named := fused_activation(self)) is not None:
            y: Tensor = self._normalize(x, activation=named)
        else:
            y = self._modules["act"](self._modules["drop"](normalized(self, x, *args, **kwargs)))
        return y

    def reduce(self: nn.Module, protocol: Any) -> Any:
        default: tuple[Any, ...] = object.__reduce_ex__(self, max(int(protocol), 2))  # type: ignore[assignment]
        # Instances of a further subclass must not become instances of this class.
        return (_new, (kind,), *default[2:]) if type(self) is made else default

    namespace = {
        "__module__": __name__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": reduce,
        "forward": forward,
        _BASE: kind,
        **({"layer_name": kind.__name__} if foreign else {}),
    }
    made = types.new_class(kind.__name__, bases, exec_body=lambda body: body.update(namespace))
    return made


def _new(kind: type[nn.Module]) -> nn.Module:
    """Return an empty instance, for unpickling and copying."""
    made = followed(kind)
    return made.__new__(made)


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class from which `followed` made this one, or the class itself."""
    return vars(kind).get(_BASE, kind)


def is_foreign(kind: type[nn.Module]) -> bool:
    """Return whether `followed` made the class from another library's."""
    return _BASE in vars(kind) and issubclass(kind, NormLayer) and not issubclass(plain_class(kind), NormLayer)


def followers(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules `drop` and `act` that a layer applies to its result; empty if it applies none."""
    if _BASE not in vars(type(layer)) and not applies_followers(layer):
        return {}
    return {name: layer._modules[name] for name in FOLLOWERS}  # type: ignore[misc]


def follow(layer: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Give a layer, whose class `followed` made, its modules."""
    for name, module in modules.items():
        setattr(layer, name, module)


def fused_activation(layer: Any) -> tuple[str, float] | None:
    """Return the activation that a layer applies in one operation, and its parameter; None if it applies modules."""
    drop, act = layer._modules["drop"], layer._modules["act"]
    if getattr(layer, "activation", "none") != "none" or is_hooked(drop) or is_hooked(act):
        return None
    if type(drop) is not nn.Identity and not (isinstance(drop, _DropoutNd) and (drop.p == 0.0 or not drop.training)):
        return None
    return ("none", 0.0) if type(act) is nn.Identity else ops.module_activation(act)
