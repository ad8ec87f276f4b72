"""The copy of a model that is folded: with plain parameters, and without hooks unless the network needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from batchnorm import walk
from batchnorm.foreign import foreign_eps
from batchnorm.models.data.inputs import Inputs, evaluate
from batchnorm.models.data.outputs import difference
from batchnorm.nn.frozen import adopted
from batchnorm.undo import package_of


def working_copy(model: nn.Module, inputs: Inputs, *, share: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy in evaluation mode, and notes on it; `share` keeps the model's own parameters.

    The copy keeps the hooks if it raises without them, or if a hook of the model's own package changes its results.
    """
    working = copied(model, share=share).eval()
    hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []  # each dictionary of hooks, and its contents
    for module in list(working.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
        for name, held in list(vars(module).items()):
            if not name.endswith("_hooks") or "state_dict" in name or not isinstance(held, dict):
                continue
            for key, hook in list(held.items()):
                if type(hook).__module__.startswith("torch.nn.utils"):
                    _keep_computed(module, held.pop(key))
            if held:
                hooks.append((held, dict(held)))
    notes: tuple[str, ...] = ()
    if count := sum(len(held) for held, _ in hooks):
        result = "kept, because the network needs them" if _needs_hooks(working, inputs, hooks) else "not carried over"
        notes = (f"{count} hooks are {result}" if count > 1 else f"1 hook is {result}".replace("them", "it"),)
    for found in walk.norm_layers(working, lambda m: foreign_eps(m) is not None and not walk.is_hooked(m)):
        working = walk.replace(working, found, adopted(found.module))
    return working, notes


def _needs_hooks(working: nn.Module, inputs: Inputs, hooks: list[tuple[dict[int, Any], dict[int, Any]]]) -> bool:
    """Remove the hooks unless the network needs them. Return whether it does."""
    packages = {package_of(kind) for module in working.modules() for kind in type(module).__mro__}
    own = any(package_of(hook) in packages - {"torch", "builtins"} for held, _ in hooks for hook in held.values())
    expected = None
    if own:
        try:
            expected = evaluate(working, inputs)
        except Exception:
            own = False
    for held, _ in hooks:
        held.clear()
    try:
        found = evaluate(working, inputs)
        needed = own and not difference(expected, found).is_rounding
    except Exception:
        needed = True
    if needed:
        for held, contents in hooks:
            held.update(contents)
    return needed


def _make_plain(module: nn.Module) -> None:
    """Replace parametrized weights by parameters. Torch's own function would change the class, which a copy shares."""
    values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
    del module.parametrizations
    module.__class__ = type(module).__mro__[1]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=value.requires_grad))


def _keep_computed(module: nn.Module, hook: Any) -> None:
    """Replace a weight that a hook computes (the old weight and spectral normalization, pruning) by a parameter."""
    name = getattr(hook, "name", None) or hook._tensor_name
    with torch.no_grad():
        hook(module, None)
    value = getattr(module, name)
    delattr(module, name)
    for held in (module._parameters, module._buffers):
        for part in ("g", "v", "u", "orig", "mask"):
            held.pop(f"{name}_{part}", None)
    module.register_parameter(name, nn.Parameter(value.detach().clone()))


def copied(model: nn.Module, *, share: bool) -> nn.Module:
    """Return a copy of the model, which shares the parameters that can be shared if `share`."""
    named = model.named_parameters() if share else ()
    shared = [p for name, p in named if "parametrizations." not in name]
    return walk.copied("fold", model, share=shared, instead="Remove the part that cannot be copied.")
