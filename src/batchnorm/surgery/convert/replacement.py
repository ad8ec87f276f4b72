"""Make a layer that replaces another, with its state, settings and hooks, and that can be converted back."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from batchnorm import walk
from batchnorm.foreign import foreign_eps
from batchnorm.models.description import describe
from batchnorm.nn.followed import follow, followed, followers, plain_class
from batchnorm.nn.frozen import adopted
from batchnorm.nn.layer import NormLayer
from batchnorm.undo import UndoOnFailure

# Parameters and buffers with the same meaning in every batch normalization that has them.
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SETTINGS = ("momentum", "eps", "track_running_stats", "update_running_stats", "on_nonfinite", "on_single")

_ORIGIN = "_converted_from"
_MISSING: Any = object()
# Members that a subclass may define without changing its `forward`.
_HARMLESS = {"_check_input_dim", "extra_repr", "reset_parameters", "layer_name", "cls_to_become"}
_HARMFUL = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}


class Unconvertible(Exception):
    """A layer cannot be replaced; the message is the reason, as a clause about the layer."""


class Refused(Unconvertible):
    """The new class rejected the options that it was given."""


@dataclass
class Origin:
    """The layer that was replaced, with the settings of both layers at that time."""

    layer: nn.Module
    before: dict[str, Any]
    made: dict[str, Any]


@dataclass
class Replacement:
    """A new layer that replaces another. Nothing in the model changes before `commit`."""

    new: nn.Module
    settings: dict[str, Any]
    origin: Origin | None = None
    reason: str = ""

    def commit(self, model: nn.Module, found: walk.Found) -> nn.Module:
        """Put the new layer in every place of the old one, and return the model."""
        for name, value in self.settings.items():
            if name in STATE:
                for parameter, trains in zip(_parameters_of(self.new, name), value, strict=True):
                    if parameter.requires_grad != trains:
                        parameter.requires_grad_(trains)
                        if not trains:
                            parameter.grad = None  # otherwise, momentum and weight decay go on moving the parameter
            elif getattr(self.new, name, value) != value:
                setattr(self.new, name, value)
        _rebind_hooks(self.new)
        vars(self.new).pop(_ORIGIN, None)
        if self.origin is not None:
            self.origin.made = self.origin.made or settings_of(self.new)
            setattr(self.new, _ORIGIN, self.origin)
        return walk.replace(model, found, self.new)

    def withdraw(self, found: walk.Found) -> None:
        """Put the old layer back into its places, whether committed or not."""
        for parent, key in found.slots:
            parent._modules[key] = found.module
        _rebind_hooks(found.module)


def undone_on_failure(model: nn.Module, planned: Sequence[tuple[walk.Found, Replacement]]) -> UndoOnFailure:
    """Withdraw the replacements if the block raises, and restore classes and the gradients of parameters."""
    undo = UndoOnFailure()
    for parameter in model.parameters():
        undo.before(setattr, parameter, "grad", parameter.grad)
        undo.before(parameter.requires_grad_, parameter.requires_grad)
    for module in model.modules():
        undo.before(setattr, module, "__class__", type(module))
    for found, made in planned:
        undo.before(made.withdraw, found)
    return undo


def _rebind_hooks(layer: nn.Module) -> None:
    """Rebind the hooks that refer to the replaced module to this one."""
    for hooks in (h for n, h in vars(layer).items() if "_hooks" in n and isinstance(h, dict)):
        for hook in hooks.values():
            if getattr(hook, "with_module", False):
                hook.module = weakref.ref(layer)


def origin_of(layer: nn.Module) -> Origin | None:
    """Return the layer that this one replaced, if any."""
    return vars(layer).get(_ORIGIN)


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """Return the settings that a user can change on a layer, and which of its parameters require gradients."""
    held = {name: getattr(layer, name, getattr(NormLayer, name, None)) for name in SETTINGS}
    for name in ("weight", "bias"):
        held[name] = [p.requires_grad for p in _parameters_of(layer, name)]
    return held


def adopt(layer: nn.Module) -> nn.Module:
    """Return another library's frozen layer as this library's, and any other layer itself."""
    if foreign_eps(layer) is None:
        return layer
    new = adopted(layer)
    _carry_hooks(layer, new)
    return new


def without_kernels(layer: nn.Module) -> nn.Module:
    """Return another library's layer as it was before `accelerate` changed it, and any other layer itself."""
    kind = plain_class(type(layer))
    if kind is type(layer) or _is_known(kind):
        return layer
    before = object.__new__(kind)
    vars(before).update(vars(layer))
    return before


def check_plain(layer: nn.Module) -> None:
    """Raise Unconvertible if the layer does or holds more than its known class, because a conversion would lose it."""
    kind, applied = walk.class_of(layer), followers(layer)
    harmless = _HARMLESS | {"forward"} if applied else _HARMLESS
    for cls in kind.__mro__:
        if _is_known(cls):
            continue
        for name, value in vars(cls).items():
            is_code = callable(value) or isinstance(value, (property, staticmethod, classmethod))
            dunder = name.startswith("__") and name.endswith("__")
            if is_code and name not in harmless and (not dunder or name in _HARMFUL):
                raise Unconvertible(f"its class {kind.__name__} has its own {name}, which would be lost")
    if "forward" in vars(layer):
        raise Unconvertible("its forward was replaced on the instance, which would be lost")
    for name in ("weight", "bias"):
        if name not in layer._parameters and not parametrize.is_parametrized(layer, name):
            raise Unconvertible(f"its {name} is computed by a hook (weight_norm, pruning): make it permanent first")
    if not kind.__module__.startswith("batchnorm."):
        held = {*layer._parameters, *layer._buffers, *layer._modules} - {*STATE, *applied, "parametrizations"}
        if held:
            raise Unconvertible(f"it also holds {', '.join(sorted(held))}, which would be lost")


def make(old: nn.Module, kind: type[nn.Module], options: dict[str, Any], path: str) -> Replacement:
    """Return a new layer of this class to replace `old`; it also applies the modules that `old` applies.

    Raises:
        Unconvertible: the conversion would lose something, or the class rejects the layer's settings.
        TypeError: the class does not have an option, or requires one that is missing.
    """
    lazy = any(is_lazy(t) for t in (*old.parameters(), *old.buffers()))
    batch_norm = walk.is_batch_norm_class(kind)
    if lazy and not issubclass(kind, nn.modules.lazy.LazyModuleMixin):
        raise Unconvertible("it has not seen its number of channels yet: run one batch first")
    applied = followers(old)
    kind = followed(kind) if applied else kind
    new = _construct(old, kind, _arguments(old, kind, options, path, batch_norm=batch_norm))
    follow(new, applied)
    made = settings_of(new)
    if isinstance(new, nn.Identity):
        _carry_hooks(old, new)
        new.train(old.training)
        return Replacement(new, {})
    _carry_state(old, new, STATE if batch_norm else ("weight", "bias"))
    _carry_hooks(old, new)
    new.train(old.training)
    settings = settings_of(old)
    for name in SETTINGS:
        if not batch_norm or name in options:
            del settings[name]
    for name in ("weight", "bias"):
        # A parameter trains only if it did before and the new class trains it.
        settings[name] = [trains and all(made[name]) for trains in settings[name]]
    ours = kind.__module__.startswith("batchnorm.")
    return Replacement(new, settings, Origin(old, settings_of(old), {}) if ours and batch_norm and not lazy else None)


def restore(layer: nn.Module, wanted: Callable[[nn.Module], bool]) -> Replacement | None:
    """Return the wanted layer that this one replaced, with this one's state; None if there is none."""
    settings, current = settings_of(layer), layer
    while (origin := origin_of(current)) is not None:
        # Keep the settings that were changed later; undo those that the conversion itself changed.
        settings = {k: v if settings[k] == origin.made[k] else settings[k] for k, v in origin.before.items()}
        current = origin.layer
        if wanted(current):
            break
    else:
        return None
    if _parametrized(layer) != _parametrized(current) or _channel_dim(layer) != _channel_dim(current):
        return None
    if _parametrized(current):
        current.parametrizations = layer.parametrizations
    _carry_state(layer, current, STATE)
    _carry_hooks(layer, current)
    follow(current, followers(layer))
    current.train(layer.training)
    _move_other_buffers(current)
    return Replacement(current, settings, origin_of(current))


def from_function(old: nn.Module, function: Callable[[nn.Module], nn.Module]) -> Replacement:
    """Return the layer that a user's function makes in place of `old`, with its weight and bias if shapes agree."""
    new = function(old)
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"convert expects the function given as `to` to return a torch.nn.Module, got {type(new).__name__}. "
            "It is called with the layer to replace."
        )
    if new is old:
        raise Unconvertible("the function returned the same layer")
    for name in ("weight", "bias"):
        theirs, ours = old._parameters.get(name), new._parameters.get(name)
        if theirs is not None and ours is not None and theirs.shape == ours.shape:
            new._parameters[name] = theirs
    _carry_hooks(old, new)
    return Replacement(new.train(old.training), {})


def _is_known(cls: type) -> bool:
    return cls is object or cls.__module__.startswith(("torch.", "batchnorm."))


def _channel_dim(layer: nn.Module) -> int:
    return getattr(layer, "channel_dim", NormLayer.channel_dim)


def _parametrized(layer: nn.Module) -> set[str]:
    return set(layer.parametrizations) if parametrize.is_parametrized(layer) else set()  # type: ignore[arg-type]


def _parameters_of(layer: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameter of this name, or the parameters that its parametrization computes it from."""
    if name in _parametrized(layer):
        return list(layer.parametrizations[name].parameters())  # type: ignore[index,union-attr]
    parameter = layer._parameters.get(name)
    return [] if parameter is None else [parameter]


def _arguments(
    old: nn.Module, kind: type[nn.Module], options: dict[str, Any], path: str, *, batch_norm: bool
) -> dict[str, Any]:
    """Return the constructor's arguments: the layer's settings, other attributes that both have, and the options."""
    signature = inspect.signature(kind)
    unknown = [name for name in options if name not in signature.parameters]
    if unknown:
        known = [n for n in signature.parameters if n not in ("num_features", "num_channels", "device", "dtype")]
        raise TypeError(
            f"{kind.__name__} expects options among {', '.join(known) or 'none'}, got {unknown[0]!r}. "
            "Options of convert are those of the class that it converts to."
        )
    channels = int(old.num_features)  # type: ignore[arg-type]  # torch also takes NumPy's integers
    tensors = [t for name in ("running_mean", "weight", "bias") if (t := getattr(old, name, None)) is not None]
    given: dict[str, Any] = {
        "num_features": channels,
        "num_channels": channels,
        "eps": old.eps,
        "momentum": old.momentum,
        "affine": bool(old.affine),
        "device": tensors[0].device if tensors else None,
        "dtype": tensors[0].dtype if tensors else None,
        "name": path,
    }
    if batch_norm:
        lazy = any(is_lazy(t) for t in old.buffers())
        given["track_running_stats"] = lazy or getattr(old, "running_mean", None) is not None
    for name in signature.parameters:
        if batch_norm and name not in given and name != "bias":
            # A layer without the attribute has the default of all layers; most importantly, no activation.
            value = getattr(old, name, getattr(NormLayer, name, _MISSING))
            if value is not _MISSING and not isinstance(value, Tensor) and not inspect.ismethod(value):
                given[name] = value
    given |= options
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY and name not in given:
            raise TypeError(f"{kind.__name__} expects {name}, got none. Pass {name}= to convert.")
    return {name: value for name, value in given.items() if name in signature.parameters}


def _construct(old: nn.Module, kind: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    own = getattr(old, "activation", "none")
    takes_residual = "activation" in inspect.signature(walk.class_of(old)).parameters and not followers(old)
    if takes_residual and "activation" not in arguments:
        raise Unconvertible(f"it also adds a residual and applies {own!r}, which {kind.__name__} cannot")
    if _channel_dim(old) != 1 and "channel_dim" not in arguments and not issubclass(kind, nn.Identity):
        raise Unconvertible(f"its channels are in the last dimension, and {kind.__name__} has them in the second")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise Refused(str(error)) from error


def _carry_state(old: nn.Module, new: nn.Module, names: tuple[str, ...]) -> None:
    """Give `new` the parameters and buffers of `old` themselves, or only their values if its shapes differ."""
    values: dict[str, Tensor] = {}
    parametrized = _parametrized(old)
    for name in names:
        theirs, ours = getattr(old, name, None), getattr(new, name, None)
        if theirs is None:
            if ours is not None and name.startswith("running_"):
                raise Unconvertible(f"it has no {name}, which {describe(new)} needs: recalibrate a new layer instead")
            if name in new._parameters:
                new._parameters[name] = None
        elif ours is not None and (is_lazy(theirs) or theirs.shape == ours.shape):
            if name in parametrized:  # transferred below, onto a tensor of the same shape
                if name in new._parameters:
                    new._parameters[name] = nn.Parameter(theirs.detach().clone())
                continue
            held = new._parameters if name in new._parameters else new._buffers
            held[name] = theirs
        elif name in parametrized:
            raise Unconvertible(f"its {name} is parametrized and would change its shape")
        elif ours is not None and theirs.dim() == ours.dim() + 1:
            values[name] = _common_row(name, theirs)
        else:
            values[name] = theirs.detach()
    if values:
        _load(new, values)
    if parametrized and not _parametrized(new):
        parametrize.transfer_parametrizations_and_params(old, new)


def _common_row(name: str, rows: Tensor) -> Tensor:
    rows = rows.detach()
    if rows.is_meta or not bool((rows == rows[:1]).all()):
        raise Unconvertible(f"the rows of its {name} differ: convert the layer that select() returns for one row")
    return rows[0]


def _load(new: nn.Module, values: dict[str, Tensor]) -> None:
    """Load values as from a checkpoint, with their dtypes and devices."""
    for name, value in values.items():
        tensor = getattr(new, name, None)
        if tensor is None or (tensor.dtype, tensor.device) == (value.dtype, value.device):
            continue
        moved = tensor.detach().to(value)
        setattr(new, name, nn.Parameter(moved, tensor.requires_grad) if name in new._parameters else moved)
    try:
        result = new.load_state_dict(values, strict=False)
    except RuntimeError as error:
        raise Unconvertible(f"{describe(new)} cannot take its state: {str(error).splitlines()[-1].strip()}") from error
    if result.unexpected_keys:
        raise Unconvertible(f"{describe(new)} has no place for its {', '.join(sorted(result.unexpected_keys))}")


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`: the same dictionaries, so that the handles still remove them."""
    for name, theirs in vars(old).items():
        ours = vars(new).get(name)
        if "_hooks" not in name or not isinstance(theirs, dict) or ours is None or ours is theirs:
            continue
        of_its_class = [key for key, hook in theirs.items() if getattr(hook, "__self__", None) is old]
        if ours or of_its_class:
            ours.update({key: hook for key, hook in theirs.items() if key not in of_its_class})
        else:
            vars(new)[name] = theirs
    vars(new)["_is_full_backward_hook"] = vars(old).get("_is_full_backward_hook")


def _move_other_buffers(layer: nn.Module) -> None:
    """Move the buffers that only this class has to the current device of the others."""
    devices = [t.device for name in STATE if (t := getattr(layer, name, None)) is not None]
    for name, buffer in layer._buffers.items():
        if buffer is not None and name not in STATE and devices and buffer.device != devices[0]:
            layer._buffers[name] = (
                torch.empty_like(buffer, device=devices[0]) if buffer.is_meta else buffer.to(devices[0])
            )


def is_norm_class(kind: object) -> bool:
    """Return whether `make` can construct this class."""
    return isinstance(kind, type) and issubclass(kind, (_NormBase, nn.GroupNorm, nn.Identity))
