"""Call the CUDA implementations without torch's dispatcher, whose way to Python takes longer than a launch.

This is only for plain tensors while gradients are disabled, as in an `autograd.Function`, and only if nobody else wants
to see the call: no subclass of Tensor, dispatch mode, transform or profiler. Otherwise, the operator is called. The
dispatcher also computes the values of tensors that are zero without memory, or whose sign torch has not yet changed in
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.ops.registration import ON_CUDA


def is_direct(*tensors: Tensor | None) -> bool:
    """Return whether a call with these tensors, of which the first exists, may go to the implementation for CUDA."""
    return tensors[0].is_cuda and unobserved(tensors)  # type: ignore[union-attr]


def unobserved(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether nothing else observes a call with these tensors, and their memory holds their values."""
    for t in tensors:
        if t is None:
            continue
        if (t.__class__ is not Tensor and t.__class__ is not Parameter) or t.is_neg() or t._is_zerotensor():
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    )


def operator(name: str, tensors: int) -> Callable[..., Any]:
    """Return an operator as a function.

    Args:
        name: The operator.
        tensors: How many of its first arguments are tensors or None.
    """
    dispatched, on_cuda = getattr(torch.ops.batchnorm, name).default, ON_CUDA[name]

    def call(*args: Any) -> Any:
        if is_direct(*args[:tensors]) and not torch.is_grad_enabled():
            return on_cuda(*args)
        return dispatched(*args)

    return call


train_forward_and_update_ = ON_CUDA["train_forward_and_update_"]  # only if `is_direct`, because it is no operator
