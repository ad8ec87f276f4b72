"""Momentum for gradient accumulation, where each microbatch updates the running statistics."""

from __future__ import annotations

import math

import torch

from batchnorm import _options
from batchnorm.nn.statistics import LayerSetting
from batchnorm.walk import is_batch_norm_class

_HINT = "It is the number of microbatches per optimizer step."


def momentum_per_microbatch(momentum: float | None, k: int) -> float | None:
    """Return `a′ = 1 - (1 - a)^(1/k)`: k updates with momentum a′ weight the past like one update with momentum a.

    With gradient accumulation, a batch consists of k microbatches, and each of them updates the running statistics.
    The past therefore decays k times as fast as with one update per batch. a′ corrects this.

    Args:
        momentum: a, the weight of the new batch, in [0, 1], as in torch (1 minus the momentum of Keras and Flax). None,
            the cumulative average, needs no correction and stays None.
        k: Microbatches per optimizer step, at least 1.

    Returns:
        a′ in [0, 1], or None. For a = 1, it is 1: the past has no weight, and only the last microbatch counts.

    Raises:
        TypeError: k is not an int.
        ValueError: momentum is not in [0, 1], or k is below 1.

    Examples:
        >>> momentum_per_microbatch(0.1, 4)
        0.02599...
        >>> round((1 - momentum_per_microbatch(0.1, 4)) ** 4, 12)
        0.9
    """
    _options.check_momentum("momentum_per_microbatch", momentum)
    k = _options.checked_integer("momentum_per_microbatch", "k", k, 1, _HINT)
    if momentum is None or momentum == 1.0:
        return momentum
    return -math.expm1(math.log1p(-momentum) / k)


class microbatch_momentum(LayerSetting):
    """Set the momentum of every batch normalization of `model` for k microbatches per step.

    Each momentum a becomes `momentum_per_microbatch(a, k)`. This takes effect at once. The end of a `with` block
    restores the former momenta. A second application corrects the already corrected momentum again.

    Args:
        model: Any module; this changes the layers of torch and of this library, at every depth.
        k: Microbatches per optimizer step, at least 1.

    Raises:
        TypeError: k is not an int.
        ValueError: k is below 1, a layer's momentum is not in [0, 1], or the model has no batch normalization. The
            model then does not change.

    Examples:
        >>> from batchnorm import BatchNorm1d
        >>> layer = BatchNorm1d(2, momentum=0.1)
        >>> with microbatch_momentum(layer, 4):
        ...     for microbatch in torch.rand(32, 2).chunk(4):
        ...         _ = layer(microbatch)
        >>> layer.momentum
        0.1
    """

    def __init__(self, model: torch.nn.Module, k: int) -> None:
        k = _options.checked_integer("microbatch_momentum", "k", k, 1, _HINT)
        layers = [(path, module) for path, module in model.named_modules() if is_batch_norm_class(type(module))]
        if not layers:
            raise ValueError(
                f"microbatch_momentum expects a model with batch normalization, got {type(model).__name__} with none. "
                "Other normalizations keep no running statistics: leave this call out."
            )
        for path, layer in layers:
            _options.check_momentum(f"microbatch_momentum, at {path or 'the model'!r},", layer.momentum)
        super().__init__("momentum", [(layer, momentum_per_microbatch(layer.momentum, k)) for _, layer in layers])
