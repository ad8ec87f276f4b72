"""The node in C++, called as for tensors on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def launched(native: Any) -> SimpleNamespace:
    """Return a replacement of the node's module, with which functions in Python compute each pass of every tensor."""
    return SimpleNamespace(batch_norm=functools.partial(_launched, native.batch_norm))


def _launched(batch_norm: Callable[..., Any], *arguments: Any) -> Any:
    *others, _ = arguments
    return batch_norm(*others, True)
