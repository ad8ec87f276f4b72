"""A network that is finished, with the normalizations of a comparison in place of its batch normalization."""

from __future__ import annotations

from torch import nn

from batchnorm import walk
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.norms import Norm
from batchnorm.surgery.convert.convert import convert, rank_of


def converted(network: nn.Module, norm: Norm, in_shape: tuple[int, ...], name: str) -> nn.Module:
    """Return the network with `norm` in the place of each batch normalization; all else is as it was.

    Batch normalization and its relatives keep what the layers had: γ, β, ε, momentum and running statistics, as
    `batchnorm.convert` does, unless the options of `norm` say otherwise. Other normalizations are made new, and get γ
    and β where theirs have that shape.

    Args:
        network: Changed in place; its lazy layers must have been made.
        norm: Its `made` becomes the new layers.
        in_shape: Shape of one sample, which gives the number of dimensions where a layer takes any.
        name: What the model is called in errors.

    Raises:
        ComparisonError: If there is no batch normalization in the network, or one that cannot be replaced.
    """
    found = walk.norm_layers(network)
    if not found:
        raise ComparisonError(
            f"the model {name} is a finished network, which must have batch normalization that others can take the "
            f"place of, got a {type(network).__name__} without any. Write a callable (norm, in_shape, num_classes) "
            "that calls norm.activated where it wants a normalization."
        )

    def made(layer: nn.Module) -> nn.Module:
        if hasattr(layer, "activation"):
            raise ValueError(
                f"{type(layer).__name__} has an activation in it, which would be lost. Write the two as two layers"
            )
        rank = rank_of(layer)
        return norm(int(layer.num_features), int(rank[0]) if rank else min(max(len(in_shape) - 1, 1), 3))  # type: ignore[arg-type]

    try:
        options = norm.options if norm.target else {}
        result = convert(network, to=norm.target or made, inplace=True, **options)
    except (TypeError, ValueError) as error:
        raise ComparisonError(
            f"norm {norm.spec!r} must be able to take the place of batch normalization in {name}, but: "
            f"{str(error).rstrip('.')}. Choose another norm, or write a callable (norm, in_shape, num_classes)."
        ) from error
    for change in result.report.left:
        layer = result.model.get_submodule(change.path)
        kind = type(layer)
        if not (norm.target and kind.__module__.startswith("batchnorm.") and kind.__name__.startswith(norm.target)):
            raise ComparisonError(
                f"norm {norm.spec!r} must be able to take the place of batch normalization in {name}, but not so at "
                f"{change.path or 'the model itself'}: {change.reason}. Mend that layer, or write a callable (norm, "
                "in_shape, num_classes)."
            )
    norm.made[:] = [result.model.get_submodule(place.path) for place in found]
    return result.model
