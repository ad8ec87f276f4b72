"""The number of batch normalizations that a network runs, counted where PyTorch dispatches operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.models.data.inputs import Inputs, evaluate

_BATCH_NORM = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index",
    "_batch_norm_no_update", "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm",
    "batch_norm_elemt", "_batch_norm_with_update_functional", "_native_batch_norm_legit_functional",
}  # fmt: skip
_OURS = {"normalize", "train_forward"}


@dataclass
class Counts:
    """Batch normalizations that one forward pass ran.

    Attributes:
        batch_norm: The ones on their own.
        fused: The ones that also add a residual or apply an activation, as this library's operations do.
    """

    batch_norm: int = 0
    fused: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if func.namespace == "aten" and name in _BATCH_NORM:
            self.counts.batch_norm += 1
        elif func.namespace == "batchnorm" and name in _OURS:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs or {})
            fused = given.get("activation", "none") != "none" or given.get("residual") is not None
            self.counts.fused += fused
            self.counts.batch_norm += not fused
        return func(*args, **(kwargs or {}))


def count_batch_norms(model: nn.Module, example_inputs: Any) -> Counts:
    """Count the batch normalizations that one forward pass of the model runs.

    Args:
        model: Any module; it is called once, without gradients.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
    """
    return counted(model, Inputs.of(example_inputs))[0]


def counted(model: nn.Module, inputs: Inputs) -> tuple[Counts, Any]:
    """Call the model once, and return the counts and its result."""
    with _Counter() as counter:
        result = evaluate(model, inputs)
    return counter.counts, result
