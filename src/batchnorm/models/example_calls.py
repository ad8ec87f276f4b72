"""A copy of a model to try things on, and how it and its modules are called on example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from batchnorm import walk

# Positional and named arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def for_trial(verb: str, model: nn.Module) -> nn.Module:
    """A copy that shares nothing but parameters and buffers.

    Raises:
        ValueError: it cannot be copied.
    """
    share = (*model.parameters(), *model.buffers())
    return walk.copied(verb, model, share=share, instead="Take out what cannot be copied, to try things on a copy.")


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


def arguments(example_inputs: Any) -> Call:
    """A copy of the example inputs as positional and named arguments."""
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@torch.no_grad()
def evaluate(model: nn.Module, call: Call) -> Any:
    """The model's output in evaluation, where it is left."""
    for module in model.modules():
        module.training = False
    return model(*call[0], **call[1])


def record(verb: str, model: nn.Module, layers: Iterable[str], example_inputs: Any) -> tuple[Any, dict[str, Call]]:
    """The model's output in evaluation, and the first call of each layer and each module around one, by path.

    Raises:
        ValueError: the model does not take the example inputs, or is lazy.
    """
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{verb} expects a model whose parameters have their shapes where there are example inputs, got a lazy "
            "one. Run it once on a batch, or leave example_inputs out."
        )
    call = arguments(example_inputs)
    wanted = {part for path in layers for part in _and_around(path)}
    calls: dict[str, Call] = {}
    handles = []
    for path, module in model.named_modules():
        if path in wanted:

            def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                if path not in calls:
                    calls[path] = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))

            handles.append(module.register_forward_pre_hook(note, prepend=True, with_kwargs=True))
    try:
        return evaluate(model, call), calls
    except Exception as error:
        given = ", ".join(_described(value) for value in (*call[0], *call[1].values()))
        raise ValueError(
            f"{verb} expects example_inputs that {type(model).__name__} takes, got {given}, and the model raised "
            f"{said(error)}. Pass what you call the model with: a tensor, a tuple, or a mapping of named arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _and_around(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield path


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def difference(expected: Any, found: Any) -> tuple[float, float]:
    """The largest difference over the largest value of two outputs, and how much of it may be rounding."""
    (ones, spec), (others, other_spec) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    if spec != other_spec:
        return float("inf"), 0.0
    worst, allowed = 0.0, 0.0
    for one, other in zip(ones, others, strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            continue
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return float("inf"), 0.0
        allowed = max(allowed, torch.finfo(one.dtype).eps ** 0.5)
        wide, wide_other = one.double(), other.double()
        finite = wide.isfinite()
        if not torch.equal(finite, wide_other.isfinite()):
            return float("inf"), 0.0
        if finite.any():
            scale = wide[finite].abs().max().clamp_min(torch.finfo(one.dtype).tiny)
            worst = max(worst, float((wide - wide_other)[finite].abs().max() / scale))
    return worst, allowed
