"""Whether running statistics move, for a whole model and apart from its mode."""

from __future__ import annotations

from types import TracebackType

import torch

from batchnorm.nn.layer import NormLayer


class update_running_stats:
    """Let the running statistics of `model` move in training, or leave them where they are.

    Batch statistics are used in training either way. For passes that must not count: the second forward of a GAN or
    of sharpness-aware minimization, an evaluation of averaged weights (EMA, SWA), a schedule-free optimizer's.
    Takes effect at once; used with `with`, the former settings come back at the end.

    Args:
        model: Any module; its layers of this library are set, at every depth.
        enabled: Whether running statistics move.

    Raises:
        ValueError: the model has no layer of this library, or has batch normalization of torch's own, which has no
            such switch and would go on moving.

    Examples:
        >>> from batchnorm import BatchNorm1d
        >>> layer = BatchNorm1d(2)
        >>> with update_running_stats(layer, False):
        ...     _ = layer(torch.rand(4, 2))
        >>> layer.num_batches_tracked
        tensor(0)
    """

    def __init__(self, model: torch.nn.Module, enabled: bool) -> None:
        layers = []
        for path, module in model.named_modules():
            if isinstance(module, NormLayer):
                layers.append(module)
            elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                raise ValueError(
                    f"update_running_stats expects batch normalization of this library, got {type(module).__name__} "
                    f"of torch at {path!r}. Replace it by batchnorm.nn.{type(module).__name__}, which loads its "
                    "state_dict."
                )
        if not layers:
            raise ValueError(
                f"update_running_stats expects a model with layers of this library, got {type(model).__name__} "
                "with none. Build it with batchnorm.nn's layers."
            )
        self._former = [(layer, layer.update_running_stats) for layer in layers]
        for layer in layers:
            layer.update_running_stats = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, enabled in self._former:
            layer.update_running_stats = enabled
