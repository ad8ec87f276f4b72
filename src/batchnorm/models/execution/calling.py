"""Call a model with a batch as its framework does, if the user does not say how; call compiled models uncompiled."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm._options import in_one_line
from batchnorm.models.data.outputs import outputs
from batchnorm.undo import Steps, Undo

_LIGHTNING = ("lightning.", "pytorch_lightning.")
_STEPS = ("training_step", "validation_step")
_TARGETS = ("labels", "label", "targets", "target", "y")


class StepResult(NamedTuple):
    """The result of a step of a Lightning module.

    Attributes:
        step: The name of the step.
        output: The module's output within the step, or else that of the last of its parts; None if there is none.
        loss: The loss that the step returned; None if it returned none.
    """

    step: str
    output: Any
    loss: Tensor | None


def loss_in(result: Any) -> Tensor | None:
    """Return the loss that a model computed itself: the scalar `loss` of its output."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point() else None


def arguments_of_loss(loss: Any, result: Any, batch: Any) -> tuple[Any, Any]:
    """Return the output and the target to pass to a loss.

    The target is the last part of a tuple or list, or else the batch itself. A loss of torch takes tensors only. It
    therefore gets the `logits` of an output, and the entry of a mapping that is named as a target.
    """
    output = result.output if isinstance(result, StepResult) else result
    target = batch[-1] if isinstance(batch, (tuple, list)) else batch
    if str(getattr(loss, "__module__", "")).startswith("torch.nn."):
        if not isinstance(output, Tensor):
            output = output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)
        if isinstance(target, Mapping):
            target = next((target[name] for name in _TARGETS if name in target), target)
    return output, target


class DefaultForward:
    """The function that calls a model with a batch if the user passes no `forward`.

    It passes a tensor to the model as the only argument. From a tuple or list, it passes as many of the first items as
    the model's `forward` requires arguments, but at least one. Labels are therefore left out. From a mapping, it passes
    the keys that are arguments of `forward`. It raises TypeError if the batch has another type or too few items.

    For a Lightning module without a `forward` of its own, it calls `training_step` or `validation_step`, and returns a
    `StepResult`.

    Args:
        caller: The function that errors name.
        for_loss: Whether the loss matters. Then the step is called also if there is a `forward`, unless it fails, and
            models of transformers get the last item of a tuple as `labels`.

    Attributes:
        problem: Why there is no loss, if a step failed.
    """

    def __init__(self, caller: str, *, for_loss: bool = False) -> None:
        self._caller = caller
        self._for_loss = for_loss
        self._failed: set[str] = set()
        self.problem = ""

    def settle(self, model: nn.Module, batch: Any) -> None:
        """Find out whether a step is used instead of `forward`; call this before the layers' calls are observed.

        A step may fail after it has run layers. If `forward` then ran them again, they would count as called twice.
        """
        if self._for_loss and _defines(model, "forward") and _steps(model):
            self(model, batch)

    def __call__(self, model: nn.Module, batch: Any) -> object:
        """Call the model with the batch, and return its result, or that of a step."""
        has_forward = _defines(model, "forward")
        if not has_forward or self._for_loss:
            for name in _steps(model):
                if name in self._failed:
                    continue
                try:
                    return _run_step(model, name, batch)
                except Exception as error:
                    if not has_forward:
                        raise TypeError(
                            f"{self._caller} expects a model whose {name} runs without a trainer, because "
                            f"{type(model).__name__} has no forward, but it raised {in_one_line(error)}. "
                            "Pass forward=lambda model, batch: ... to call the model yourself."
                        ) from error
                    self._failed.add(name)
                    self.problem = f"{name} needs a trainer ({in_one_line(error)})"
        return _call_forward(self._caller, model, batch, with_labels=self._for_loss)


def _defines(model: nn.Module, name: str) -> bool:
    """Return whether the model has a method of its own, and not the one of torch or Lightning that raises an error."""
    method = getattr(model, name, None)
    method = getattr(method, "__func__", method)
    if method is None or method is getattr(nn.Module, name, None):
        return False
    return not str(getattr(method, "__module__", "")).startswith(_LIGHTNING)


def _steps(model: nn.Module) -> list[str]:
    """Return the steps that may be called. With manual optimization, `training_step` would train the model."""
    automatic = getattr(model, "automatic_optimization", True)
    return [name for name in _STEPS if _defines(model, name) and (automatic or name != "training_step")]


def _run_step(model: nn.Module, name: str, batch: Any) -> StepResult:
    step = getattr(model, name)
    parameters = inspect.signature(step).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    returned: list[tuple[bool, Any]] = []

    def note(module: nn.Module, args: Any, result: Any) -> None:
        if any(y.is_floating_point() and y.dim() for y in outputs(result)):
            returned.append((module is model, result))

    with _without_logging(model):
        handles = [module.register_forward_hook(note) for module in (model, *model.children())]
        try:
            result = step(batch, *[0] * (len(required) - 1))  # the numbers of the batch and the loader
        finally:
            for handle in handles:
                handle.remove()
    loss = result if isinstance(result, Tensor) and result.dim() == 0 else loss_in(result)
    own = [result for by_model, result in returned if by_model]
    return StepResult(name, (own or [result for _, result in returned] or [None])[-1], loss)


@contextmanager
def _without_logging(model: nn.Module) -> Iterator[None]:
    """Within the block, let `log` do nothing, because it needs a trainer, and let metrics count in copies."""
    metrics = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_metric(child) and not _is_metric(parent)
    ]
    before: dict[str, Any] = {name: vars(model)[name] for name in ("log", "log_dict") if name in vars(model)}
    vars(model).update(log=_ignore, log_dict=_ignore)
    try:
        for parent, name, child in metrics:
            parent._modules[name] = copy.deepcopy(child)
        yield
    finally:
        for parent, name, child in metrics:
            parent._modules[name] = child
        for name in ("log", "log_dict"):
            del vars(model)[name]
        vars(model).update(before)


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _call_forward(caller: str, model: nn.Module, batch: Any, *, with_labels: bool) -> object:
    if isinstance(batch, Tensor):
        return model(batch)
    parameters = list(inspect.signature(model.forward).parameters.values())
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = {p.name for p in parameters}
    requires = f"{type(model).__name__}.forward requires ({', '.join(p.name for p in required)})"
    if isinstance(batch, (list, tuple)):
        wanted = max(1, len(required))
        if with_labels and len(batch) == wanted + 1 and "labels" in names and hasattr(model, "main_input_name"):
            return model(*batch[:wanted], labels=batch[wanted])
        if len(batch) >= wanted:
            return model(*batch[:wanted])
        problem = f"of at least {wanted} items, because {requires}, got {len(batch)}"
    elif isinstance(batch, Mapping):
        accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        given = {key: value for key, value in batch.items() if accepts_all or key in names}
        if given and all(p.name in given for p in required):
            return model(**given)
        problem = f"with the keys that {requires}, got {', '.join(map(repr, batch)) or 'none'}"
    else:
        problem = f"that are tensors, tuples, lists or dicts, got {type(batch).__name__}"
    raise TypeError(
        f"{caller} expects batches {problem}. Pass forward=lambda model, batch: ... to call the model yourself."
    )


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
