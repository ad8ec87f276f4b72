"""Parameter groups for an optimizer, with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm import _checks, walk


def parameter_groups(
    model: nn.Module, weight_decay: float, *, kinds: walk.Kinds = walk.is_batch_norm, biases: bool = False
) -> list[dict[str, Any]]:
    """Return the model's parameters in two groups for an optimizer: with weight decay, and without.

    Decay of γ and β of batch normalization does not regularize a network: it pulls activations towards zero. Decay of
    the weights before it sets the effective learning rate, because their scale does not matter.

    Args:
        model: Any module. A shared parameter is listed once, without decay if one of the modules that share it is of
            `kinds`.
        weight_decay: The weight decay of the first group; at least 0.
        kinds: The modules whose parameters do not decay: a class, a tuple of classes or a predicate, such as
            `(torch.nn.LayerNorm, ...)` or `lambda m: ...`. The default is batch normalization.
        biases: Whether to also exclude every parameter named `bias` from decay.

    Returns:
        `[{"params": ..., "weight_decay": weight_decay}, {"params": ..., "weight_decay": 0.0}]`, in the model's order;
        a group without parameters is left out.

    Raises:
        TypeError: model is not a module.
        ValueError: weight_decay is negative or not finite, or the model has no parameters.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = parameter_groups(model, weight_decay=5e-4)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(2, 0.0005), (2, 0.0)]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    _checks.check_module("parameter_groups", model)
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(
            f"parameter_groups expects a finite weight_decay >= 0, got {weight_decay}. Usual values are 1e-5 to 1e-2."
        )
    without_decay = {id(p) for found in walk.norm_layers(model, kinds) for p in found.module.parameters()}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = id(parameter) in without_decay or (biases and name.rpartition(".")[2] == "bias")
        (undecayed if exempt else decayed).append(parameter)
    if not decayed and not undecayed:
        raise ValueError(
            f"parameter_groups expects a model with parameters, got {type(model).__name__} with none. "
            "Create the model's parameters before the groups."
        )
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
