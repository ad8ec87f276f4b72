"""The rules, one per file: `statistics/bn204_momentum.py` contains the rule BN204 and the text of its page."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from batchnorm.doctor.rules.rule import Rule

__all__ = ["Rule", "load_rules"]


@cache
def load_rules() -> tuple[type[Rule], ...]:
    """Import every rule in these folders, in the order of their codes; `import batchnorm` does not need them."""
    names = [name for _, name, folder in pkgutil.walk_packages(__path__, f"{__name__}.") if not folder]
    rules = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[2].startswith("bn")}
    modules = [import_module(name) for _, name in sorted(rules.items())]
    return tuple(
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Rule) and item.__module__ == module.__name__
    )
