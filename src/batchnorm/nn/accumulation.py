"""Running statistics under gradient accumulation: one update per microbatch, the horizon of one per batch."""

from __future__ import annotations

import math
from types import TracebackType

import torch

from batchnorm import _checks
from batchnorm.walk import is_batch_norm


def momentum_per_microbatch(momentum: float | None, k: int) -> float | None:
    """Return the momentum a′ whose k updates weigh the past as one with momentum a does: `a′ = 1 - (1 - a)^(1/k)`.

    Under gradient accumulation a batch passes as k microbatches, and each moves the running statistics: the past then
    fades k times as fast as the momentum says.

    Args:
        momentum: a, the weight of the new batch, in [0, 1], as in torch (Keras and Flax: 1 minus theirs), or None,
            the cumulative average, which has no horizon and stays None.
        k: Microbatches per optimizer step, at least 1.

    Returns:
        a′ in [0, 1], or None. For a = 1 it is 1: the past has no weight, and the last microbatch is all that stays.

    Raises:
        TypeError: k is not an int.
        ValueError: momentum is not in [0, 1], or k is below 1.

    Examples:
        >>> momentum_per_microbatch(0.1, 4)
        0.02599...
        >>> round((1 - momentum_per_microbatch(0.1, 4)) ** 4, 12)
        0.9
    """
    _checks.check_momentum("momentum_per_microbatch", momentum)
    _check_microbatches("momentum_per_microbatch", k)
    if momentum is None or momentum == 1.0:
        return momentum
    return -math.expm1(math.log1p(-momentum) / k)


class microbatch_momentum:
    """Give every batch normalization of `model` the momentum that it needs for k microbatches per step.

    Each momentum a becomes `momentum_per_microbatch(a, k)`. Takes effect at once; used with `with`, the former momenta
    come back at the end. Applied twice, it acts twice.

    Args:
        model: Any module; its batch normalization, torch's and this library's, is set, at every depth.
        k: Microbatches per optimizer step, at least 1.

    Raises:
        TypeError: k is not an int.
        ValueError: k is below 1, a layer's momentum is not in [0, 1], or the model has no batch normalization. The
            model is then as it was.

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
        _check_microbatches("microbatch_momentum", k)
        layers = [(path, module) for path, module in model.named_modules() if is_batch_norm(module)]
        if not layers:
            raise ValueError(
                f"microbatch_momentum expects a model with batch normalization, got {type(model).__name__} with none. "
                "Other normalizations keep no running statistics, and need nothing."
            )
        for path, layer in layers:
            _checks.check_momentum(f"microbatch_momentum, at {path or 'the model'!r},", layer.momentum)
        self._former = [(layer, layer.momentum) for _, layer in layers]
        for layer, momentum in self._former:
            layer.momentum = momentum_per_microbatch(momentum, k)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, momentum in self._former:
            layer.momentum = momentum


def _check_microbatches(caller: str, k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(
            f"{caller} expects k to be an int, got {k!r} ({type(k).__name__}). "
            "It is the number of microbatches per optimizer step."
        )
    if k < 1:
        raise ValueError(f"{caller} expects k >= 1, got {k}. It is the number of microbatches per optimizer step.")
