"""The implementations of the operators on this machine, by name."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.ops import compiled, eager
from tests.cases import Case

Ops = Callable[[str], Callable[..., Any]]

# Triton's interpreter can only be selected for a whole process, which tests/ops/triton/test_interpreted.py starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The emulator, too, is selected for a whole process: "sample", which test_emulated.py starts, or "whole".
EMULATED = os.environ.get("BATCHNORM_EMULATE")


def names() -> list[str]:
    """Return the names: eager, the instruction sets of this machine, and cuda if there is a GPU."""
    if INTERPRETED:
        return ["interpreted"]
    if EMULATED:
        return ["emulated"]
    on_cpu = compiled.cpu_capabilities() or ("dispatched",)
    return ["eager", *on_cpu, *(["cuda"] if torch.cuda.is_available() else [])]


def over(case: Sequence[Case], **axes: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrize a test over the implementations, the cases and further axes of strings.

    Eager and the best instruction set run the whole product. Each of the other instruction sets runs a different fifth
    of it, which contains every case and every value. They are the same templates with vectors of another size, and the
    driver in `tests/csrc` compares each of their kernels with its definition in float64. A sample of the emulator runs
    every case once, with the values of the axes in turn.
    """
    rest = list(itertools.product(*axes.values()))
    complete = (*names()[:2], "cuda")
    step = len(rest) if EMULATED == "sample" else 5 if len(rest) >= 5 else 1  # a fifth of fewer would lose cases
    points = [
        pytest.param(name, one, *values, id="-".join([name, one.id, *values]))
        for j, one in enumerate(case)
        for k, values in enumerate(rest)
        for i, name in enumerate(names())
        if (name in complete and EMULATED != "sample") or (i + j + k) % step == 0
    ]
    return pytest.mark.parametrize(("op", "case", *axes), points, indirect=["op"])


@contextlib.contextmanager
def chosen(name: str) -> Iterator[Ops]:
    """Yield the operators of an implementation. Arguments and results are on the CPU."""
    if name == "eager":
        yield lambda op: getattr(eager, op)
    elif name == "interpreted":
        from tests.ops.triton.interpreter import operator

        yield operator
    elif name == "emulated":
        from tests.ops.triton.emulated import operator

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
