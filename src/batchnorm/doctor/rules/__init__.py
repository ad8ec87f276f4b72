"""The rules, one per file: `bn204_momentum.py` contains the rule BN204 and the text of its documentation page."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from batchnorm.doctor.rules.rule import Rule

__all__ = ["Rule", "load_rules"]


@cache
def load_rules() -> tuple[type[Rule], ...]:
    """Import every rule in this folder, in the order of their codes; `import batchnorm` does not need them."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith("bn"))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return tuple(
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Rule) and item.__module__ == module.__name__
    )
