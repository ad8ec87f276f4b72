"""Prepare a finished network: unchanged, or with a norm of the comparison instead of its batch normalization."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from batchnorm import walk
from batchnorm._options import as_clause
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.norms import IndivisibleError, Norm
from batchnorm.surgery.convert.convert import convert
from batchnorm.surgery.convert.ranks import rank_of


def as_is(network: nn.Module, norm: Norm) -> nn.Module:
    """Return the network unchanged.

    Args:
        network: The network.
        norm: Its `made` becomes the list of the network's normalization layers.
    """
    norm.made[:] = [place.module for place in walk.norm_layers(network, _is_norm)]
    return network


def _is_norm(module: nn.Module) -> bool:
    return walk.is_batch_norm(module) or isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm))


def set_dropout(network: nn.Module, probability: float, name: str) -> None:
    """Set the probability of the network's dropout layers, in place.

    Args:
        network: A finished network.
        probability: Probability of zeroing a value.
        name: The model's name in errors.

    Raises:
        ComparisonError: If the network has no dropout layer.
    """
    layers = [module for module in network.modules() if isinstance(module, _DropoutNd)]
    if not layers:
        raise ComparisonError(
            f"dropout needs a finished network with dropout layers, whose probability it sets, but {name} has none. "
            "Add nn.Dropout where the network should have one."
        )
    for layer in layers:
        layer.p = probability


def converted(network: nn.Module, norm: Norm, in_shape: tuple[int, ...], name: str) -> nn.Module:
    """Return the network with each batch normalization replaced by `norm`, and everything else unchanged.

    Variants of batch normalization keep γ, β, ε, momentum and running statistics of the replaced layers, as with
    `batchnorm.convert`, unless the options of `norm` override them. Other normalizations are new layers, with γ and β
    copied if their shapes are the same.

    Args:
        network: Changed in place; its lazy layers must be initialized.
        norm: Makes the new layers; its `made` becomes the list of them.
        in_shape: Shape of one sample. It determines the number of dimensions for layers that take any.
        name: The model's name in errors.

    Raises:
        ComparisonError: If the network has no batch normalization, or one that cannot be replaced.
    """
    found = walk.norm_layers(network)
    if not found:
        raise ComparisonError(
            f"the model {name} is a finished network, which must have batch normalization to replace, got a "
            f"{type(network).__name__} without any. Write a callable (norm, in_shape, num_classes) that calls "
            "norm.activated for each normalization."
        )

    def made(layer: nn.Module) -> nn.Module:
        if "activation" in vars(layer):
            raise ValueError(
                f"{type(layer).__name__} contains an activation, which would be lost. Write the two as separate layers"
            )
        rank = rank_of(layer)
        return norm(int(layer.num_features), int(rank[0]) if rank else min(max(len(in_shape) - 1, 1), 3))  # type: ignore[arg-type]

    try:
        options = norm.options if norm.target else {}
        result = convert(network, to=norm.target or made, inplace=True, **options)
    except (TypeError, ValueError) as raised:
        error = raised
        if isinstance(raised, IndivisibleError):
            error = IndivisibleError(raised.groups, [walk.num_channels(place.module) or 1 for place in found])
        raise ComparisonError(
            f"norm {norm.spec!r} must be able to replace batch normalization in {name}, but: "
            f"{as_clause(error)}. Choose another norm, or write a callable (norm, in_shape, num_classes)."
        ) from raised
    for change in result.report.left:
        layer = result.model.get_submodule(change.path)
        kind = type(layer)
        if not (norm.target and kind.__module__.startswith("batchnorm.") and kind.__name__.startswith(norm.target)):
            raise ComparisonError(
                f"norm {norm.spec!r} must be able to replace batch normalization in {name}, but cannot at "
                f"{change.path or 'the model itself'}: {change.reason}. Fix that layer, or write a callable (norm, "
                "in_shape, num_classes)."
            )
    norm.made[:] = [result.model.get_submodule(place.path) for place in found]
    return result.model
