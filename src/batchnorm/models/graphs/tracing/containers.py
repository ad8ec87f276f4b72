"""The containers of tensors that a graph can return: it calls their class, as the model does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from batchnorm.models.graphs.tracing import Untraceable


class Construction(NamedTuple):
    """A call that creates a container."""

    kind: type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def construction(container: Any) -> Construction | None:
    """Return the call that creates the container; None for a plain tuple, list or dict, and for other values.

    Raises:
        Untraceable: The class does not create the container again from its contents, or cannot be imported by its name,
            so that a graph that calls it could not be pickled.
    """
    kind = type(container)  # symbolic values may refuse `isinstance`
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        found = Construction(kind, tuple(container), {})
    elif dataclasses.is_dataclass(kind):
        given = {field.name: getattr(container, field.name) for field in dataclasses.fields(kind) if field.init}
        if issubclass(kind, dict):  # a model output of transformers leaves out what is None
            given = {name: value for name, value in given.items() if value is not None}
        found = Construction(kind, (), given)
    elif issubclass(kind, dict) and kind.__module__ != "torch.fx.immutable_collections" and kind is not dict:
        found = Construction(kind, (dict(container),), {})
    else:
        return None
    if not _creates(found, container):
        raise Untraceable(f"its result is a {kind.__qualname__}, which a graph cannot create")
    if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind:
        raise Untraceable(f"its result is a {kind.__qualname__}, which cannot be imported by name")
    return found


def _creates(call: Construction, container: Any) -> bool:
    """Return whether the call gives a container with the same contents and attributes."""
    try:
        contents, again = _contents(container), _contents(call.kind(*call.args, **call.kwargs))
    except Exception:  # its class takes other arguments
        return False
    return contents.keys() == again.keys() and all(again[name] is value for name, value in contents.items())


def _contents(container: Any) -> dict[Any, Any]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(container, dict):
        items = container.items()
    elif isinstance(container, tuple):
        items = enumerate(container)
    fields = {name: getattr(container, name) for name in getattr(container, "__dataclass_fields__", ())}
    return {**{("item", key): value for key, value in items}, **fields, **getattr(container, "__dict__", {})}
