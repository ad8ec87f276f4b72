"""The implementations of the operators on this machine, by name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.ops import compiled, eager
from batchnorm.ops.triton.settings import Settings
from tests.cases import Case

Ops = Callable[[str], Callable[..., Any]]
Check = Callable[..., None]

# Triton's interpreter can only be selected for a whole process, which tests/ops/triton/interpreter starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The emulator, too, is selected for a whole process: "sample", which test_emulated.py starts, or "whole".
EMULATED = os.environ.get("BATCHNORM_EMULATE")
# The emulator's tiles are small, so that small tensors have several. It therefore runs these shapes in place of large
# ones. They need the same variants of kernels, and several programs with several rounds; test_tiling.py checks this.
SMALL_TILES = Settings(tile=256, warps=2, programs=2, row_bytes=64, once=1024)
SMALLER = {
    (2, 2, 150, 151): (2, 2, 50, 51),
    (1, 1, 40_000): (1, 1, 7_600),
    (40_000, 1): (7_600, 1),
    (2, 5, 130, 131): (2, 5, 34, 35),
}
# The values that the interpreter runs on axes with many values.
_INTERPRETED = {"activation": "relu", "residual": "residual"}


def names() -> list[str]:
    """Return the names: eager, the instruction sets of this machine, and cuda if there is a GPU."""
    if INTERPRETED:
        return ["interpreted"]
    if EMULATED:
        return ["emulated"]
    on_cpu = compiled.cpu_capabilities() or ("dispatched",)
    return ["eager", *on_cpu, *(["cuda"] if torch.cuda.is_available() else [])]


def over(cases: Sequence[Case], **axes: Sequence[str]) -> Callable[[Check], Check]:
    """Make a check of one point a test of one case, at every point: implementations and further axes of strings.

    A point is not a test of its own: there are thousands, and collecting and reporting one takes longer than it runs.
    A failure lists all points at which the check fails.

    Eager and the best instruction set run the whole product. Each of the other instruction sets runs a different fifth
    of it, which contains every case and every value. They are the same templates with vectors of another size, and the
    driver in `tests/csrc` compares each of their kernels with its definition in float64. A sample of the emulator has
    one point of every case, with the values of the axes in turn; `operator` in `tests/ops/triton/emulated.py` says
    which calls it computes on the CPU. The interpreter, which is slow, runs one point of every case.

    Args:
        cases: The cases, each of which becomes a test.
        axes: The names of the check's arguments after `op` and `case`, and their values.

    Returns:
        A decorator. The test that it returns keeps the check as `at_one_point`.
    """

    if EMULATED:
        cases = [dataclasses.replace(case, shape=SMALLER.get(case.shape, case.shape)) for case in cases]

    def decorate(check: Check) -> Check:
        def test(number: int, among: Sequence[str]) -> None:
            case, failures = cases[number], {}
            for name, values in _points(number, axes):
                if name not in among:
                    continue
                try:
                    with chosen(name, sample=EMULATED == "sample") as op:
                        check(op, case, *values)
                except Exception as error:
                    failures["-".join([name, *values])] = error
            for error in failures.values():
                raise AssertionError(f"{case.id} fails with {', '.join(failures)}") from error

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        test.at_one_point = check  # type: ignore[attr-defined]
        # The GPU has tests of its own, which can be selected by their names.
        groups = {
            "": [name for name in names() if name != "cuda"],
            "cuda-": [name for name in names() if name == "cuda"],
        }
        points = [
            pytest.param(number, among, id=prefix + case.id)
            for number, case in enumerate(cases)
            for prefix, among in groups.items()
            if among
        ]
        return pytest.mark.parametrize(("number", "among"), points)(test)

    return decorate


def _points(number: int, axes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the points at which the case with this number is checked: the implementation, and values of the axes."""
    if INTERPRETED:
        axes = {name: [_INTERPRETED[name]] if name in _INTERPRETED else values for name, values in axes.items()}
    product = list(itertools.product(*axes.values()))
    complete = () if EMULATED == "sample" else (*names()[:2], "cuda")
    step = len(product) if EMULATED == "sample" else 5 if len(product) >= 5 else 1  # a fifth of fewer would lose cases
    for k, values in enumerate(product):
        for i, name in enumerate(names()):
            if name in complete or (i + number + k) % step == 0:
                yield name, values


@contextlib.contextmanager
def chosen(name: str, *, sample: bool = False) -> Iterator[Ops]:
    """Yield the operators of an implementation. If `sample`, the emulator runs only some. Results are on the CPU."""
    if name == "eager":
        yield lambda op: getattr(eager, op)
    elif name == "interpreted":
        from tests.ops.triton.interpreter.operators import operator

        yield operator
    elif name == "emulated":
        from tests.ops.triton.emulated import operator

        yield functools.partial(operator, sample=sample)
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
