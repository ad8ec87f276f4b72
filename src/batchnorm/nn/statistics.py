"""Settings of all layers of a model: whether running statistics move, independently of the mode."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from batchnorm.nn.layer import NormLayer


class LayerSetting:
    """An attribute of several layers, set at once; the end of a `with` block restores it."""

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
    """Let the running statistics of `model` move in training, or keep them from moving.

    Training uses batch statistics either way. Meant for passes that must not count: the second forward of a GAN or of
    sharpness-aware minimization, an evaluation of averaged weights (EMA, SWA), a schedule-free optimizer's. It takes
    effect at once; at the end of a `with` block the former settings are restored.

    Args:
        model: Any module; its layers of this library are set, at every depth.
        enabled: Whether running statistics move.

    Raises:
        ValueError: the model has no layer of this library, or has batch normalization of torch's own, which has no
            such switch.

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
