"""The layers of every process, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.doctor.measure.layers import Layer
from batchnorm.models.execution.processes import Processes

_NAMES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class ProcessStates:
    """The layers of each process of a group.

    Attributes:
        states: For each process γ, β and running statistics, by the layer's path and by name.
    """

    states: tuple[dict[str, dict[str, Tensor]], ...]

    @classmethod
    def gather(cls, layers: Iterable[Layer], processes: Processes) -> ProcessStates:
        """Gather the states of all processes, each of which must call this."""
        own = {
            layer.path: {
                name: tensor.detach().cpu().clone()
                for name in _NAMES
                if isinstance(tensor := getattr(layer.module, name, None), Tensor)
            }
            for layer in layers
        }
        return cls(tuple(processes.gather(own)))

    @property
    def comparable(self) -> bool:
        """Whether all processes have the same layers with the same numbers of channels."""
        shapes = [
            {(path, name, tensor.shape) for path, tensors in state.items() for name, tensor in tensors.items()}
            for state in self.states
        ]
        return all(found == shapes[0] for found in shapes)

    def difference(self, path: str, eps: float) -> tuple[float, float]:
        """Return the largest difference of the other processes from the first.

        Returns:
            The largest absolute difference of γ and β. The root mean square difference of the running means in σ, or of
            ln σ if that is larger. Infinite if a value is not finite.
        """
        first, parameters, statistics = self.states[0][path], 0.0, 0.0
        for other in self.states[1:]:
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


def number_of_processes() -> int:
    """Return the number of all processes, without communication."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
