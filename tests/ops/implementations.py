"""The implementations of the operators that this machine and process have, by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import compiled, eager

Ops = Callable[[str], Callable[..., Any]]

# Triton's interpreter can only be chosen for a whole process: tests/ops/triton/test_interpreted.py starts one.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def names() -> list[str]:
    """Eager functions; what the dispatcher finds on the CPU, for each instruction set of this machine; and on a GPU."""
    if INTERPRETED:
        return ["interpreted"]
    on_cpu = compiled.cpu_capabilities() or ("dispatched",)
    return ["eager", *on_cpu, *(["cuda"] if torch.cuda.is_available() else [])]


@contextlib.contextmanager
def chosen(name: str) -> Iterator[Ops]:
    """The operators by an implementation. Tensors are given and returned on the CPU."""
    if name == "eager":
        yield lambda op: getattr(eager, op)
    elif name == "interpreted":
        from tests.ops.triton.interpreter import operator

        yield operator
    elif name == "cuda":
        yield _on_cuda
    elif name == "dispatched":
        yield _dispatched
    else:
        before = compiled.cpu_capability()
        compiled.set_cpu_capability(name)
        try:
            yield _dispatched
        finally:
            compiled.set_cpu_capability(before)


def _dispatched(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.batchnorm, op)


def _on_cuda(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = _dispatched(op)(*(t.cuda() if isinstance(t, Tensor) else t for t in args))
        return result.cpu() if isinstance(result, Tensor) else tuple(t.cpu() for t in result)

    return call
