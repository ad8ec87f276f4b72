"""Starts a layer's passes again without preparing their launches. Importing this module imports Triton.

The launches of a pass depend on the shapes, dtypes and memory layout of its tensors, on which of them are absent or not
aligned, and on its other arguments. The node in C++ makes a key of all these. Calls with the same key differ only in
the addresses of their tensors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.triton import passes
from batchnorm.ops.triton.counters import counters
from batchnorm.ops.triton.frame import Frame
from batchnorm.ops.triton.variants import Bound, Start, hooked, run


class Replay:
    """The launches of a pass for all calls with the same key.

    Args:
        frame: The frame of x.
        tensors: The tensors of one call, each an object of its own.
        starts: The launches of that call.
        bound: Their variants.
    """

    def __init__(
        self, frame: Frame, tensors: Sequence[Tensor | None], starts: Sequence[Start], bound: Sequence[Bound]
    ) -> None:
        self._frame, self._device, self._stream_of = frame, bound[0].device, bound[0].stream_of
        self._allocate: Callable[[], Tensor] | None = None
        scratch = next((start.scratch for start in starts if start.scratch[0] is not None), (None, None))
        self._counters = 0
        if scratch[0] is not None and scratch[1] is not None:
            self._allocate = functools.partial(
                torch.empty, scratch[0].numel(), dtype=scratch[0].dtype, device=frame.device
            )
            self._counters = scratch[1].numel()
        # Pointers of the call, of the scratch memory, and of an absent tensor.
        places = {id(t): i for i, t in enumerate((*tensors, *scratch)) if t is not None}
        absent = len(tensors) + 2
        self._launches = [
            (
                b.run, start.launch.grid[0], b.function, b.metadata,
                operator.itemgetter(*(absent if t is None else places[id(t)] for t in start.tensors)),
                (*start.floats, *start.launch.sizes, *b.constants),
            )
            for start, b in zip(starts, bound, strict=True)
        ]  # fmt: skip

    def start(self, pointers: tuple[int | None, ...]) -> bool:
        """Start the launches for tensors at these addresses, on the current stream.

        Returns:
            False, before any launch, if they must be prepared again: a profiler wants to see them, or the settings
            have changed.
        """
        if hooked() or not self._frame.is_current():
            return False
        scratch: tuple[int | None, int | None] = (None, None)
        if self._allocate is not None:
            parts, counted = self._allocate(), counters(self._frame.device, self._counters)
            scratch = parts.data_ptr(), counted.data_ptr()
        pointers = (*pointers, *scratch, None)
        stream = self._stream_of(self._device)
        for launch, programs, function, metadata, of_launch, others in self._launches:
            launch(programs, 1, 1, stream, function, metadata, None, None, None, *of_launch(pointers), *others)
        return True


def start(name: str, tensors: Sequence[Tensor | None], others: Sequence[Any]) -> Replay | None:
    """Prepare and start the launches of a pass of `passes.py`. Return how to start them again, if possible.

    Args:
        name: The pass.
        tensors: Its tensors, of which the first is x.
        others: Its other arguments.
    """
    # Each argument gets an object of its own, because two arguments may be the same tensor in this call only.
    tensors = [None if t is None else t.detach() for t in tensors]
    assert tensors[0] is not None
    frame = Frame.of(tensors[0])
    starts: list[Start] = getattr(passes, name)(frame, *tensors, *others)
    bound = [b for b in run(starts) if b is not None]
    return Replay(frame, tensors, starts, bound) if len(bound) == len(starts) else None
