"""Observe the calls of a model in one step, through hooks of all modules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from batchnorm.doctor.measure.layers import Array
from batchnorm.doctor.watching.dropout import DropoutBefore
from batchnorm.doctor.watching.hooks import has_one_batch, weakly
from batchnorm.doctor.watching.inputs import features_of
from batchnorm.doctor.watching.pace import Pace
from batchnorm.doctor.watching.records import Observation
from batchnorm.models.data.outputs import outputs
from batchnorm.nn.layer import channels_second


class StepObserver:
    """Observes one step after another.

    Args:
        root: The network, without wrappers.
        layers: Its layers, by path.
        pace: Counts the time of measurements.

    Attributes:
        observations: The calls of each layer in the step.
        model_calls: The largest number of calls of the model in training mode without a backward pass between them.
        evaluations: Number of calls of the model in training mode without gradients.
        features: Features of the model's first input in the step; None if none was seen.
        dropout: The probability of dropout right before a layer, by the layer's path.
    """

    def __init__(self, root: nn.Module, layers: Mapping[str, nn.Module], pace: Pace) -> None:
        self._root, self._pace = root, pace
        self._number = {layer: number for number, layer in enumerate(layers.values())}
        self._paths = {layer: path for path, layer in layers.items()}
        self._signatures = [inspect.signature(layer.forward) for layer in layers.values()]
        self.forget()

    def forget(self) -> None:
        """Forget the last step, whose graph would otherwise stay in memory until the next look."""
        self.begin([None] * len(self._signatures))

    def begin(self, running_means: Sequence[Array | None]) -> None:
        """Forget the last step, and begin another with these running means."""
        self._means = running_means
        self._calls = self._most_calls = self.evaluations = self._again = 0
        self._dropout = DropoutBefore()
        self.observations = [Observation() for _ in running_means]
        self.features: Tensor | None = None

    def hooks(self) -> list[Any]:
        """Install the hooks; return their handles."""
        return [
            register_module_forward_pre_hook(weakly(self._enter)),
            register_module_forward_hook(weakly(self._leave), with_kwargs=True),
        ]

    @property
    def seen(self) -> bool:
        """Whether a call of a layer was seen."""
        return any(seen.forward or seen.backward for seen in self.observations)

    @property
    def dropout(self) -> dict[str, float]:
        """The probability of dropout right before a layer, by the layer's path."""
        return {self._paths[layer]: probability for layer, probability in self._dropout.found.items()}

    @property
    def model_calls(self) -> int:
        """The largest number of calls without a backward pass between them.

        A single call without gradients belongs to the step, as of a teacher; more are an evaluation.
        """
        return self._most_calls + (self.evaluations == 1)

    def _enter(self, module: nn.Module, args: Any) -> None:
        number = self._number.get(module)
        if (number is None and module is not self._root) or not module.training:
            return
        again = torch._C._current_graph_task_id() != -1
        if module is self._root:
            self._count_call(again)
        if number is not None:
            seen = self.observations[number]
            seen.forward, seen.backward = seen.forward + (not again), seen.backward + again

    def _count_call(self, again: bool) -> None:
        if again:  # a checkpoint, whose first call had no gradients if it is reentrant
            self.evaluations = max(0, self.evaluations - 1)
        elif torch.is_grad_enabled():
            self._calls += 1
            self._most_calls = max(self._most_calls, self._calls)
        else:
            self.evaluations += 1

    def _backward(self, *_: Any) -> None:
        self._calls = 0

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        number = self._number.get(module)
        if not module.training or torch._C._current_graph_task_id() != -1:
            return
        self._dropout.called(module, number is not None, args, y)
        if module is self._root:
            node = next((tensor.grad_fn for tensor in outputs(y) if tensor.grad_fn is not None), None)
            if node is not None:
                node.register_prehook(weakly(self._backward))
            if self.features is None and torch.is_grad_enabled():
                with self._pace.spending():
                    self.features = features_of(args, kwargs)
        if number is not None:
            self._measure(number, module, args, kwargs)

    def _measure(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = self.observations[number]
        if seen.batch_size is not None or not has_one_batch(module):
            return
        x: Any = args[0] if args else kwargs.get("input")
        if type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point() or x.dim() < 2:
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        with self._pace.spending():
            if len(args) + len(kwargs) > 1:
                given = self._signatures[number].bind(*args, **kwargs).arguments
                if given.get("mask") is not None:
                    seen.batch_size = x.shape[0]
                    return
            seen.measure(channels_second(module, x), self._means[number])
