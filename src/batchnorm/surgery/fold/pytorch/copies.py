"""The copy of a model that is folded: it has no hooks, and its weights are plain parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from batchnorm import walk
from batchnorm.foreign import foreign_eps
from batchnorm.nn.frozen import adopted


def working_copy(model: nn.Module, *, share: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy in evaluation mode, and notes on it; `share` keeps the model's own parameters."""
    working = copied(model, share=share).eval()
    removed = 0
    for module in list(working.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
        for name, hooks in list(vars(module).items()):
            if not name.endswith("_hooks") or "state_dict" in name or not isinstance(hooks, dict):
                continue
            for hook in hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils"):
                    _keep_computed(module, hook)
                else:
                    removed += 1
            hooks.clear()
    for found in walk.norm_layers(working, lambda module: foreign_eps(module) is not None):
        working = walk.replace(working, found, adopted(found.module))
    hooks_are = "1 hook is" if removed == 1 else f"{removed} hooks are"
    return working, (f"{hooks_are} not carried over",) if removed else ()


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
    return walk.copied("fold", model, share=shared, instead="Take out what cannot be copied.")
