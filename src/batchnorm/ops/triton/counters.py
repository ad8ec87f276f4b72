"""Counters with which the programs of a launch find out which of them finishes last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# A stream that is a different one in every thread (cudaStreamPerThread).
_PER_THREAD = 2
# Enough for nearly all launches, so that few streams need a second allocation.
_LEAST = 4096

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """Return at least `number` int32 counters that are 0, for a launch on the current stream that leaves them 0.

    Launches of one stream use the same counters one after the other. Two streams must not share them, because their
    launches may overlap. A captured graph may be replayed on any stream. Its launches therefore have counters in the
    graph's own memory, which each replay sets to 0.

    A launch that the device aborts leaves other values, but then the driver refuses all later launches of the process.
    A launch that does not start leaves the counters as they are.
    """
    stream = 0
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if stream == _PER_THREAD or torch.cuda.is_current_stream_capturing():
            return torch.zeros(number, dtype=torch.int32, device=device)
    found = _counters.get((device, stream))
    if found is None or found.numel() < number:
        found = _counters[device, stream] = _allocated(device, max(number, _LEAST))
    return found


def _allocated(device: torch.device, number: int) -> Tensor:
    """Allocate counters in another thread and, on a GPU, on that thread's stream, the default one.

    While a compiled function warms up before it is captured, memory that its thread or its stream allocates belongs to
    the graph, which does not expect any to stay.
    """
    with ThreadPoolExecutor(1) as executor:
        found, ready = executor.submit(_zeros, device, number).result()
    if ready is not None:
        stream = torch.cuda.current_stream(device)
        ready.wait(stream)
        found.record_stream(stream)  # launches may still use the memory when larger counters replace it
    return found


def _zeros(device: torch.device, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return zeros on the current stream, and on a GPU, an event after which they are there."""
    found = torch.zeros(number, dtype=torch.int32, device=device)
    return found, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
