"""The containers of tensors that a graph can return: it calls their class, as the model does."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NamedTuple

from batchnorm.models.errors import Untraceable


class Construction(NamedTuple):
    """A call that creates a container."""

    kind: type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def construction(container: Any) -> Construction | None:
    """Return the call that creates the container; None for a plain tuple, list or dict, and for other values.

    Raises:
        Untraceable: The class cannot be imported by its name, so that a graph that calls it could not be pickled.
    """
    kind = type(container)
    found = None
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        found = Construction(kind, tuple(container), {})
    elif dataclasses.is_dataclass(container) and not isinstance(container, type):
        names = [field.name for field in dataclasses.fields(container) if field.init]
        given = {name: getattr(container, name) for name in names}
        if isinstance(container, dict):  # a model output of transformers leaves out what is None
            given = {name: value for name, value in given.items() if value is not None}
        found = Construction(kind, (), given)
    elif isinstance(container, dict) and kind.__module__ != "torch.fx.immutable_collections" and kind is not dict:
        found = Construction(kind, (dict(container),), {})
    if found is not None and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind:
        raise Untraceable(f"its result is a {kind.__qualname__}, which cannot be imported by name")
    return found
