"""Settings for all layers of a model, such as whether training updates the running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from batchnorm.nn.layer import NormLayer


class LayerSetting:
    """Set an attribute of several layers; the end of a `with` block restores the former values."""

    def __init__(self, attribute: str, values: Sequence[tuple[torch.nn.Module, Any]]) -> None:
        self._attribute = attribute
        self._former = [(layer, getattr(layer, attribute)) for layer, _ in values]
        for layer, value in values:
            setattr(layer, attribute, value)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, former in self._former:
            setattr(layer, self._attribute, former)


class update_running_stats(LayerSetting):
    """Turn updates of the running statistics in training on or off.

    Training uses batch statistics in both cases. Turn updates off for passes that must not count, such as the second
    forward pass of a GAN or of sharpness-aware minimization, or the evaluation of averaged weights (EMA, SWA,
    schedule-free optimizers). The setting takes effect at once. The end of a `with` block restores the former settings.

    Args:
        model: Any module; the setting applies to its layers of this library, at every depth.
        enabled: Whether training updates the running statistics.

    Raises:
        ValueError: the model has no layer of this library, or has torch's own batch normalization, which has no such
            setting.

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
        super().__init__("update_running_stats", [(layer, enabled) for layer in layers])
