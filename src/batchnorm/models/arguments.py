"""The arguments that a `forward` is expected to be called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ABSENT: Any = object()


@dataclass(frozen=True)
class Expected:
    """One argument that a rewritten `forward` expects.

    Attributes:
        name: The parameter's name.
        kind: "tensor"; "list" or "tuple" of tensors; "constant"; or "absent".
        count: The number of tensors in a list or tuple.
        value: The constant.
        optional: Whether the argument may be left out; its value is then the constant.
    """

    name: str
    kind: str
    count: int = 1
    value: Any = None
    optional: bool = False

    def tensors(self, argument: Any) -> Sequence[Tensor] | None:
        """Return the tensors in the argument; None if it is not as expected."""
        if self.kind == "tensor":
            return (argument,) if isinstance(argument, Tensor) else None
        if self.kind == "constant":
            same = type(argument) is type(self.value) and argument == self.value
            return () if same or (self.optional and argument is ABSENT) else None
        if self.kind == "absent":
            return () if argument is ABSENT else None
        if type(argument) is not (list if self.kind == "list" else tuple) or len(argument) != self.count:
            return None
        return argument if all(isinstance(part, Tensor) for part in argument) else None
