"""The layers of a model that the user chooses, as with `only=`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

Selection = str | Iterable[str] | type[Any] | tuple[type[Any], ...] | Callable[[str, Any], bool]

# A layer of PyTorch or Keras can be called too, but it is not a predicate.
_LAYER_METHODS = ("named_modules", "get_weights")


class Found(Protocol):
    """A layer and its paths in the model, in any framework."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the layer."""

    @property
    def path(self) -> str:
        """The first of its paths."""

    @property
    def module(self) -> Any:
        """The layer."""


F = TypeVar("F", bound=Found)


def select(caller: str, layers: list[F], given: Selection | None, *, argument: str = "only") -> list[F]:
    """Return the layers that the user chose, in the model's order.

    Args:
        caller: The function that the user called, for error messages.
        layers: The layers to choose from.
        given: A pattern for paths such as `"backbone.*"`, several patterns, a class, a tuple of classes, or a
            predicate of path and layer; None chooses all.
        argument: The name of the user's argument, for error messages.

    Raises:
        TypeError: the selection is none of these.
        ValueError: a pattern matches no layer.
    """
    if given is None:
        return layers
    if isinstance(given, type) or (isinstance(given, tuple) and all(isinstance(kind, type) for kind in given)):
        classes: Any = given
        return [found for found in layers if isinstance(found.module, classes)]
    if callable(given) and not any(hasattr(given, name) for name in _LAYER_METHODS):
        return [found for found in layers if any(given(path, found.module) for path in found.paths)]
    patterns: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(
            f"{caller} expects `{argument}` to be a pattern, several patterns, a class, a tuple of classes or a "
            f"predicate, got {wrong[0]!r:.50} ({type(wrong[0]).__name__}) as a pattern. "
            f"Pass paths, such as {some_paths(layers)}."
        )
    chosen: list[F] = []
    for pattern in patterns:
        matched = [found for found in layers if any(fnmatchcase(path, pattern) for path in found.paths)]
        if not matched:
            raise ValueError(
                f"{caller} expects `{argument}` to match a layer, got {pattern!r}, which matches none of "
                f"{len(layers)}. Choose from: {some_paths(layers)}."
            )
        chosen += matched
    return [found for found in layers if found in chosen]


def some_paths(layers: Sequence[Found]) -> str:
    """Return the paths of the first layers, for an error message."""
    paths = ", ".join(found.path or "(model)" for found in layers[:3]) or "none"
    return paths + ", ..." * (len(layers) > 3)
