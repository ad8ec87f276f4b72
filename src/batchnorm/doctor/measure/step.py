"""One training step, to see which running statistics move in it, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.passes import Data, target_of
from batchnorm.models.outputs import outputs
from batchnorm.moments import Moments
from batchnorm.walk import restored


@dataclass
class Step:
    """What moved in a forward and backward pass of one batch.

    Attributes:
        forward: How often each layer's statistics moved in the forward pass, by its number.
        backward: How often in the backward pass.
        model_calls: How often the model was called.
        given: What each layer was given in its first call, with everything random in it that training has.
    """

    forward: Counter[int] = field(default_factory=Counter)
    backward: Counter[int] = field(default_factory=Counter)
    model_calls: int = 0
    given: dict[int, Moments] = field(default_factory=dict)


class StepError(RuntimeError):
    """No training step could be made; the message says why."""


def step(model: nn.Module, layers: list[Layer], data: Data, batch: Any) -> Step:
    """Make a training step without its update; everything is as before afterwards.

    Args:
        model: In the mode that it is to be looked at.
        layers: Those to watch.
        data: How it is called.
        batch: On the model's device.

    Raises:
        StepError: the model has hooks that act on gradients, or something in the step failed.
    """
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
        raise StepError("its parameters have hooks that act when gradients are ready, such as an optimizer's step")
    seen = Step()
    phase = seen.forward
    others = [data.loss] if isinstance(data.loss, nn.Module) else []
    with restored(nn.ModuleList([model, *others]), buffers=True, gradients=True):
        if not model.training:
            model.train()
        for number, layer in enumerate(layers):
            _count(number, layer.module, lambda number: phase.update([number]))
            layer.module.register_forward_pre_hook(_look(number, seen), with_kwargs=True)

        def called(*_: Any) -> None:
            if phase is seen.forward:
                seen.model_calls += 1

        model.register_forward_pre_hook(called)
        try:
            with torch.enable_grad():
                returned = data.forward(model, batch)
                loss = _loss(data, returned, batch)
                phase = seen.backward
                loss.backward()
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            raise StepError(f"it failed with {type(error).__name__}: {line}"[:300]) from error
    return seen


def _loss(data: Data, returned: Any, batch: Any) -> Tensor:
    if data.loss is not None:
        loss: Tensor = data.loss(returned, target_of(batch))
        return loss
    results = [y for y in outputs(returned) if y.is_floating_point() and y.requires_grad]
    if not results:
        raise StepError("nothing that the model returns depends on parameters that are trained")
    return torch.stack([y.float().square().mean() for y in results]).sum()


def _look(number: int, seen: Step) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if number not in seen.given and isinstance(x, Tensor):
            seen.given[number] = Moments.of(x)

    return hook


def _count(number: int, module: nn.Module, moved: Any) -> None:
    """Tell of every call of the module that changed its running statistics."""
    before: list[Tensor] = []

    def now() -> list[Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        held = [getattr(module, name, None) for name in names]
        return [t.detach().clone() for t in held if isinstance(t, Tensor)]

    def enter(*_: Any) -> None:
        before[:] = now()

    def leave(*_: Any) -> None:
        if any(not torch.equal(a, b) for a, b in zip(before, now(), strict=True)):
            moved(number)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
