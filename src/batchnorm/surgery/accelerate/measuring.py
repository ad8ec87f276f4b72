"""Time training steps of a model and of its accelerated form alternately."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from batchnorm import walk
from batchnorm._options import in_one_line
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.data.outputs import outputs

_SECONDS, _LEAST, _MOST = 2.0, 5, 50


def step_times(before: nn.Module, after: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Return the shortest time of a training step of two models in seconds: forward, and every gradient of a parameter.

    On a CPU this is the CPU time of all threads, which other processes affect less than the time elapsed. Modes,
    buffers, gradients and random state are restored.

    Raises:
        ValueError: a model cannot train on the inputs.
    """
    first, second = _step(before, inputs), _step(after, inputs)
    first(), second()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() < end):
        times.append((first(), second()))
    return min(t for t, _ in times), min(t for _, t in times)


def _step(model: nn.Module, inputs: Inputs) -> Callable[[], float]:
    """Return a call that takes one step and returns its time."""
    devices = {t.device for t in (*model.parameters(), *inputs.tensors())}
    clock = time.process_time if all(device.type == "cpu" for device in devices) else time.perf_counter
    synchronized = [torch.get_device_module(device).synchronize for device in devices]

    def step() -> float:
        with walk.restored(model, buffers=True, gradients=True), walk.as_in_training(model), torch.enable_grad():
            parameters = [p for p in model.parameters() if p.requires_grad]
            given = inputs.map(torch.clone)  # a model may write to its inputs
            for synchronize in synchronized:
                synchronize()
            start = clock()
            try:
                results = [t for t in outputs(given.call(model)) if t.requires_grad]
                if parameters:  # otherwise a step is a forward pass
                    torch.autograd.grad(results, parameters, [torch.ones_like(t) for t in results], allow_unused=True)
            except Exception as error:
                raise ValueError(
                    "accelerate with measure=True expects example inputs on which the model can take a training step, "
                    f"and it raised {in_one_line(error)}. Pass a batch of training, or leave measure out."
                ) from error
            for synchronize in synchronized:
                synchronize()
            return clock() - start

    return step
