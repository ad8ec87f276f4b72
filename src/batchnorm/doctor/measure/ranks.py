"""What the layers of every process hold, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.doctor.measure.layers import Layer

_NAMES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Ranks:
    """What each process of a group holds.

    Attributes:
        held: For each process, its layers' γ, β and running statistics, by path and name.
    """

    held: tuple[dict[str, dict[str, Tensor]], ...]

    @classmethod
    def gather(cls, layers: list[Layer], group: Any) -> Ranks:
        """From all processes of the group, each of which has to call this."""
        own = {
            layer.path: {
                name: tensor.detach().cpu().clone()
                for name in _NAMES
                if isinstance(tensor := getattr(layer.module, name, None), Tensor)
            }
            for layer in layers
        }
        held: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(held, own, group=group)
        return cls(tuple(held))

    @property
    def alike(self) -> bool:
        """Whether all have the same layers with the same channels."""
        shapes = [
            {(path, name, tensor.shape) for path, of in held.items() for name, tensor in of.items()}
            for held in self.held
        ]
        return all(of == shapes[0] for of in shapes)

    def apart(self, path: str, eps: float) -> tuple[float, float]:
        """How far the processes are from the first, at most.

        Returns:
            For γ and β the largest absolute difference; for the running statistics the root mean square of the
            difference of the means in σ, or of ln σ where that is larger. Infinite where one is not finite.
        """
        first, parameters, statistics = self.held[0][path], 0.0, 0.0
        for other in self.held[1:]:
            for name in ("weight", "bias"):
                if name in first:
                    parameters = max(parameters, _finite((first[name] - other[path][name]).abs().max()))
            if "running_mean" in first and "running_var" in first:
                var = first["running_var"].double() + eps
                shift = (first["running_mean"] - other[path]["running_mean"]).double() / var.sqrt()
                scale = ((other[path]["running_var"].double() + eps) / var).log() / 2
                worst = torch.stack([shift.square().mean().sqrt(), scale.square().mean().sqrt()]).max()
                statistics = max(statistics, _finite(worst))
        return parameters, statistics


def _finite(value: Tensor) -> float:
    return float(value) if bool(value.isfinite()) else float("inf")


def processes_of(group: Any) -> int:
    """How many processes there are, without speaking to them."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
