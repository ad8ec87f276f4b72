"""Find, replace and copy the layers of a model, and restore the model's state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.nn.utils import parametrize

from batchnorm._options import in_one_line
from batchnorm.foreign import foreign_eps
from batchnorm.undo import Steps, Undo, flags_of, package_of, put_back_flags, restorer

Kinds = type | tuple[type, ...] | Callable[[nn.Module], bool]


@dataclass(frozen=True, eq=False)
class Found:
    """A module of a model, with all its places.

    Attributes:
        module: The module.
        paths: Its paths in the model's order, such as `layer1.0.bn2`; several if it is shared, `""` for the model.
        slots: Each `(parent, key)` that holds it; empty for the model itself.
    """

    module: nn.Module
    paths: tuple[str, ...]
    slots: tuple[tuple[nn.Module, str], ...]

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether the module is batch normalization.

    This covers layers of torch and of this library, their subclasses, and frozen layers of other libraries.
    """
    return is_batch_norm_class(type(module)) or foreign_eps(module) is not None


def is_batch_norm_class(kind: type) -> bool:
    """Return whether instances of the class are batch normalization."""
    return issubclass(kind, _NormBase) and not issubclass(kind, _InstanceNorm)


def is_frozen(module: nn.Module) -> bool:
    """Return whether the module normalizes by its running statistics even in training."""
    return getattr(type(module), "_frozen", False) is True or foreign_eps(module) is not None


def num_channels(layer: nn.Module) -> int | None:
    """Return the number of channels of batch normalization; None if it is unknown."""
    mean = getattr(layer, "running_mean", None)
    known = getattr(layer, "num_features", None)  # other libraries' frozen layers may not have it
    return int(known) if known is not None else mean.numel() if isinstance(mean, Tensor) else None


def eps_of(layer: nn.Module) -> float:
    """Return ε of batch normalization; 0 if it is unknown."""
    eps = foreign_eps(layer)
    return float(getattr(layer, "eps", 0.0)) if eps is None else eps


def uses_batch(module: nn.Module) -> bool:
    """Return whether batch normalization subtracts the mean of the batch in its present mode."""
    return not is_frozen(module) and (module.training or getattr(module, "running_mean", None) is None)


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether the `forward` of a layer's class is neither torch's nor this library's."""
    return class_of(layer).forward.__module__.partition(".")[0] not in ("torch", "batchnorm")


def class_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer; for a parametrized layer, its class before parametrization."""
    return parametrize.type_before_parametrizations(layer)


def is_hooked(module: nn.Module) -> bool:
    """Return whether calling the module runs more than the `forward` of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def norm_layers(model: nn.Module, kinds: Kinds = is_batch_norm) -> list[Found]:
    """Return the model's layers of these kinds, in the model's order; a shared layer appears once.

    Args:
        model: Any module, which may itself be such a layer.
        kinds: A class, a tuple of classes or a predicate; by default every kind of batch normalization.
    """
    classes, predicate = (kinds, None) if isinstance(kinds, (type, tuple)) else ((), kinds)
    paths: dict[nn.Module, list[str]] = {}
    slots: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module in paths:
            paths[module].append(path)
        elif isinstance(module, classes) if predicate is None else predicate(module):
            paths[module] = [path]
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in paths:
                slots.setdefault(child, []).append((parent, key))
    return [Found(module, tuple(found), tuple(slots.get(module, ()))) for module, found in paths.items()]


def joined(parent: str, child: str) -> str:
    """Return the path of a child from its parent's path, which is "" for the model."""
    return f"{parent}.{child}" if parent else child


def check_has_values(caller: str, model: nn.Module) -> None:
    """Check that no parameter, and no buffer of batch normalization, is on the meta device, which holds no values.

    Raises:
        ValueError: one is on the meta device.
    """
    for path, module in model.named_modules():
        held = {**module._parameters, **(module._buffers if is_batch_norm(module) else {})}
        if name := next((name for name, tensor in held.items() if tensor is not None and tensor.is_meta), None):
            raise ValueError(
                f"{caller} expects a model with values, got {f'{path}.{name}'.lstrip('.')!r} on the meta device. "
                "Call model.to_empty(device=...), and load its state or initialize it."
            )


def replace(model: nn.Module, where: str | nn.Module | Found, new: nn.Module) -> nn.Module:
    """Replace a module by `new` in every place, and return the model.

    Args:
        model: Changed in place.
        where: The module to replace, one of its paths, or an entry of `norm_layers`.
        new: The module that takes its place.

    Returns:
        The model, or `new` if the replaced module is the model itself.

    Raises:
        ValueError: the model has no such module or path.
    """
    old: nn.Module | None
    if isinstance(where, str):
        try:
            old = model.get_submodule(where)
        except AttributeError:
            old = None
    else:
        old = where.module if isinstance(where, Found) else where
    if old is model:
        return new
    found = False
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child is old:
                parent._modules[key] = new
                found = True
    if not found:
        given = repr(where) if isinstance(where, str) else type(old).__name__
        raise ValueError(
            f"replace expects a module of the {type(model).__name__}, got {given}, which is not in it. "
            "Choose one from model.named_modules()."
        )
    return model


def copied(
    caller: str,
    model: nn.Module,
    *,
    share: Iterable[Tensor] = (),
    instead: str = "Pass inplace=True to change the model itself.",
) -> nn.Module:
    """Return a copy of the model.

    Unlike `copy.deepcopy`, this also copies lazy buffers, buffers without a storage (such as sparse and nested ones),
    and non-leaf tensors, such as the weight computed by the old `weight_norm`, or results that a module collects in a
    list. Copies of non-leaf tensors are detached.

    Args:
        caller: The function that the user called, for the error message.
        model: Any module.
        share: Tensors that the copy shares with the model.
        instead: The advice in the error if the model cannot be copied.

    Raises:
        ValueError: the model cannot be copied.
    """
    held = (tensor for module in model.modules() for tensor in _tensors_in(vars(module)))
    known: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    shared = {id(tensor): tensor for tensor in share}
    for buffer in model.buffers():
        if is_lazy(buffer):
            known[id(buffer)] = UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
        elif id(buffer) not in shared and not _can_be_copied(buffer):
            known[id(buffer)] = buffer.detach().clone()
    known |= shared
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        raise ValueError(
            f"{caller} expects a model that can be copied, got {type(model).__name__} with {in_one_line(error)}. "
            f"{instead}"
        ) from error


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value and in its dictionaries, lists and tuples, which may contain themselves."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _can_be_copied(buffer: Tensor) -> bool:
    """Return whether `copy.deepcopy` accepts the buffer; it rejects buffers without an ordinary storage."""
    if buffer.is_leaf and type(buffer) is Tensor and buffer.layout == torch.strided and not buffer._is_zerotensor():
        return not buffer.is_nested
    try:
        copy.deepcopy(buffer)
    except Exception:
        return False
    return True


def trial_copy(caller: str, model: nn.Module) -> nn.Module:
    """Return a copy for experiments, which shares only parameters and buffers with the model.

    Raises:
        ValueError: the model cannot be copied.
    """
    share = (*model.parameters(), *model.buffers())
    return copied(caller, model, share=share, instead="Remove that part: changes are tried on a copy first.")


def set_mode(model: nn.Module, training: bool) -> None:
    """Set the mode of every module directly, because models may override `train()` and `eval()` to do more."""
    for module in model.modules():
        module.training = training


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Give the model's modules the modes that they have in training.

    A model in training mode keeps its modes. For a model in evaluation mode, `train()` is called and later undone,
    because many models override it to keep layers frozen.
    """
    with restored(model):
        if not model.training:
            model.train()
        yield


def restored(
    model: nn.Module, *, buffers: bool = False, gradients: bool = False, random_state: bool = True
) -> AbstractContextManager[object]:
    """Restore the model when the block ends, also after an exception or an interruption.

    Every module gets back its mode, momentum, switches of running statistics and instance `forward`, and every
    parameter its `requires_grad`. Hooks that were added within the block are removed. If the model added them, its
    flags are restored too, so that it adds the hooks again. Replaced modules stay replaced. Only tensors that changed
    are written. If one cannot be written, everything else is still restored.

    Args:
        model: Any module.
        buffers: Whether to restore the buffers' values too.
        gradients: Whether to restore `.grad` of the parameters too.
        random_state: Whether to restore the global random generators of Python, NumPy and torch (of GPUs only if CUDA
            is initialized).

    Raises:
        RuntimeError: at the end of the block, if a tensor that changed cannot be written. If the block raised another
            exception, that exception gets a note instead.
    """
    return _Restored(model, buffers, gradients, random_state)


class _Restored(Undo):
    def __init__(self, model: nn.Module, buffers: bool, gradients: bool, random_state: bool) -> None:
        self._steps: Steps = []
        removed: list[Any] = []
        flags = [(module, type(module), flags_of(module)) for module in model.modules() if not is_batch_norm(module)]
        for path, module in model.named_modules():
            self._steps += _steps_for(path, module, buffers, removed)
        self._steps.append(("flags", partial(put_back_flags, flags, removed)))
        for path, parameter in model.named_parameters():
            self._steps.append((path, partial(_require_grad, parameter, parameter.requires_grad)))
            if gradients:
                self._steps.append((f"the gradient of {path}", _gradient_step(parameter)))
        self._steps.append(("the gradient mode", partial(torch.set_grad_enabled, torch.is_grad_enabled())))
        if random_state:
            self._steps += _random_state_steps()

    def undo(self, error: BaseException | None) -> Steps:
        return self._steps


def _random_state_steps() -> Steps:
    steps: Steps = [
        ("random", partial(random.setstate, random.getstate())),
        ("numpy.random", partial(np.random.set_state, np.random.get_state())),  # noqa: NPY002  (others draw from it)
        ("torch's random state", partial(torch.set_rng_state, torch.get_rng_state())),
    ]
    if torch.cuda.is_initialized():
        steps.append(("CUDA's random state", partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())))
    return steps


def _require_grad(parameter: nn.Parameter, requires_grad: bool) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)


def _gradient_step(parameter: nn.Parameter) -> Callable[[], None]:
    grad = parameter.grad
    put_back = None if grad is None else restorer(grad)

    def step() -> None:
        parameter.grad = grad
        if put_back is not None:
            put_back()

    return step


_MISSING = object()

# An attribute that only the class had before is removed from the instance.
_ATTRIBUTES = (
    "training", "momentum", "track_running_stats", "update_running_stats", "forward", "_is_full_backward_hook",
)  # fmt: skip


def _steps_for(path: str, module: nn.Module, with_buffers: bool, removed: list[Any]) -> Steps:
    """Return the steps that restore the state of one module. They append the hooks that they remove to `removed`."""
    held = vars(module)
    attributes = {name: held.get(name, _MISSING) for name in _ATTRIBUTES}
    hooks = {name: set(hooks) for name, hooks in held.items() if "_hooks" in name and isinstance(hooks, dict)}
    buffers = dict(module._buffers)

    def put_back() -> None:
        for name, value in attributes.items():
            if value is _MISSING:
                held.pop(name, None)
            else:
                held[name] = value
        added = {key: hook for name in hooks for key, hook in held.get(name, {}).items() if callable(hook)}
        # A wrapper of torch, such as FSDP, installs its hooks once, in the first forward.
        of_torch = {key for key, hook in added.items() if package_of(hook) == "torch"}
        for name, before in hooks.items():
            for key in held.get(name, {}).keys() - before - of_torch:
                hook = held[name].pop(key)
                removed.extend([hook] * callable(hook))  # `_forward_hooks_with_kwargs` and others hold flags
        if with_buffers:
            for name in [name for name in module._buffers if name not in buffers]:
                del module._buffers[name]
            module._buffers.update(buffers)

    steps: Steps = [(path or type(module).__name__, put_back)]
    if with_buffers:
        for name, buffer in buffers.items():
            if buffer is not None and not is_lazy(buffer):
                steps.append((f"{path}.{name}".lstrip("."), restorer(buffer)))
    return steps
