"""Run compiled models uncompiled."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from batchnorm.undo import Steps, Undo


def eager() -> AbstractContextManager[object]:
    """Run compiled models uncompiled within the block, because a compiled model does not run the hooks of layers."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and importing it takes seconds
        return ExitStack()
    return _Eager()


class _Eager(Undo):
    """A block in which compiled models run uncompiled; several threads may run such blocks at the same time.

    The whole process has one stance of `torch.compile`. The first block sets it, and the last block restores it. If
    each block restored the stance that it found, a thread could restore the stance that another thread had set.
    """

    _lock = threading.RLock()
    _running: list[_Eager] = []  # noqa: RUF012
    _stance: list[Any] = []  # noqa: RUF012

    def __enter__(self) -> _Eager:
        try:
            with self._lock:
                self._running.append(self)
                if not self._stance:
                    self._stance.append(torch.compiler.set_stance("force_eager"))
            return super().__enter__()
        except BaseException:
            self._end()
            raise

    def undo(self, error: BaseException | None) -> Steps:
        return [("the stance of torch.compile", self._end)]

    def _end(self) -> None:
        with self._lock:
            if self in self._running:
                self._running.remove(self)
            if not self._running and self._stance:
                self._stance.pop().__exit__(None, None, None)
