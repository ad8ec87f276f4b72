"""Run a model on example inputs: record the arguments of its layers, and find a smaller example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm._options import in_one_line
from batchnorm.models.data.inputs import Inputs, evaluate
from batchnorm.models.data.outputs import difference, outputs
from batchnorm.walk import check_has_values, set_mode


def record_calls(caller: str, model: nn.Module, layers: Iterable[str], inputs: Inputs) -> tuple[Any, dict[str, Inputs]]:
    """Set the model to evaluation mode, run it, and record the arguments of its layers.

    Args:
        caller: The function that the user called, for error messages.
        model: Any module.
        layers: Paths of its layers.
        inputs: Its example inputs.

    Returns:
        The model's output, and by path, the arguments of the first call of each layer and each of its parents.

    Raises:
        ValueError: the model does not accept the inputs, is lazy, or is on the meta device.
    """
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{caller} with example_inputs expects a model whose parameters have shapes, got a lazy one. "
            "Run it once on a batch, or leave example_inputs out."
        )
    check_has_values(f"{caller} with example_inputs", model)
    wanted = {part for path in layers for part in _with_parents(path)}
    calls: dict[str, Inputs] = {}
    handles = []
    for path, module in model.named_modules():
        if path in wanted:

            def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                if path not in calls:
                    calls[path] = Inputs(args, kwargs).map(torch.clone)

            handles.append(module.register_forward_pre_hook(note, prepend=True, with_kwargs=True))
    set_mode(model, training=False)
    try:
        return evaluate(model, inputs), calls
    except Exception as error:
        given = ", ".join(_described(value) for value in (*inputs.args, *inputs.kwargs.values()))
        raise ValueError(
            f"{caller} expects example_inputs that {type(model).__name__} takes, got {given}, and the model raised "
            f"{in_one_line(error)}. Pass the model's arguments: a tensor, a tuple, or a mapping of named arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def fewer_samples(
    model: nn.Module, inputs: Inputs, samples: int, results: Sequence[Tensor] | None = None
) -> tuple[Inputs, Any]:
    """Return the first samples of the example if the model computes the same for them alone; otherwise, the example.

    The second value is the model's result for the returned inputs, or None if the model was not called with them.

    The first axis may not count independent samples: a model may join frames to clips, mix the rows of a graph, or take
    time steps first. Such a model refuses a part of the example, or gives other results for it.

    Args:
        model: A module in evaluation mode. This calls it.
        inputs: The example, which the model takes.
        samples: The number of samples.
        results: The tensors that the model returns for the example, if they are known.
    """
    few = inputs.first(samples)
    if few is inputs:
        return inputs, None
    try:
        result = evaluate(model, few)
        expected = outputs(evaluate(model, inputs)) if results is None else results
    except Exception:  # the model does not take the part
        return inputs, None
    found = outputs(result)
    if len(found) != len(expected) or not found:
        return inputs, None
    rows = [whole[: part.shape[0]] if part.dim() else whole for part, whole in zip(found, expected, strict=True)]
    return (few, result) if difference(rows, found).is_rounding else (inputs, None)


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield path


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
