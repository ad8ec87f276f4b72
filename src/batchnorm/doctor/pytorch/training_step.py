"""Observe one training step: the running statistics that it updates, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.doctor.measure.training_step import TrainingStep
from batchnorm.doctor.pytorch.layers import as_moments
from batchnorm.doctor.pytorch.passes import ModelCall, input_of
from batchnorm.models.data.batches import device_of, own_copy
from batchnorm.models.data.outputs import outputs
from batchnorm.moments import Moments
from batchnorm.walk import restored


class StepError(RuntimeError):
    """A training step is not possible; the message says why."""


def training_step(model: nn.Module, layers: Mapping[str, nn.Module], call: ModelCall, batch: Any) -> TrainingStep:
    """Make a training step without its update, and restore everything afterwards.

    Args:
        model: The model, in the mode to examine.
        layers: The layers to watch, by path.
        call: How to call the model.
        batch: A batch on the model's device.

    Raises:
        StepError: the model has hooks that act on gradients, or the step failed.
    """
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
        raise StepError("its parameters have hooks that run when gradients are ready, such as an optimizer's step")
    forward, backward = Counter[str](), Counter[str]()
    inputs: dict[str, Moments] = {}
    phase = forward
    model_calls = 0
    losses = [call.loss] if isinstance(call.loss, nn.Module) else []
    with restored(nn.ModuleList([model, *losses]), buffers=True, gradients=True):
        if not model.training:
            model.train()
        with as_step_error():
            call.settle(model, own_copy(batch, device_of(model)))

        def count_update(path: str) -> Callable[[], None]:
            return lambda: phase.update([path])

        for path, layer in layers.items():
            _on_update(layer, count_update(path))
            layer.register_forward_pre_hook(_recorder(path, inputs), with_kwargs=True)

        def count_call(*_: Any) -> None:
            nonlocal model_calls
            model_calls += phase is forward

        model.register_forward_pre_hook(count_call)
        with as_step_error(), torch.enable_grad():
            loss = loss_of(call, call.forward(model, batch), batch)
            phase = backward
            loss.backward()
    return TrainingStep(forward, backward, model_calls, {path: as_moments(found) for path, found in inputs.items()})


@contextmanager
def as_step_error() -> Iterator[None]:
    """Raise StepError instead of any other error."""
    try:
        yield
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise StepError(f"it failed with {type(error).__name__}: {line}"[:300]) from error


def loss_of(call: ModelCall, returned: Any, batch: Any) -> Tensor:
    """Return the loss to train with; without one, the mean square of the outputs."""
    loss = call.loss_of(returned, batch)
    if loss is not None:
        return loss
    results = [y for y in outputs(returned) if y.is_floating_point() and y.requires_grad]
    if not results:
        raise StepError("no output of the model depends on parameters that are trained")
    return torch.stack([y.float().square().mean() for y in results]).sum()


def _recorder(path: str, inputs: dict[str, Moments]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(module, args, kwargs)
        if path not in inputs and x is not None:
            inputs[path] = Moments.of(x)

    return hook


def _on_update(module: nn.Module, updated: Callable[[], None]) -> None:
    """Call `updated` after every call of the module that changes its running statistics."""
    before: list[Tensor] = []

    def statistics() -> list[Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        held = [getattr(module, name, None) for name in names]
        return [t.detach().clone() for t in held if isinstance(t, Tensor)]

    def enter(*_: Any) -> None:
        before[:] = statistics()

    def leave(*_: Any) -> None:
        if any(not torch.equal(a, b) for a, b in zip(before, statistics(), strict=True)):
            updated()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
