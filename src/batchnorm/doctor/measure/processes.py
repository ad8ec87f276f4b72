"""The layers of every process, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ProcessStates:
    """The layers of each process of a group.

    Attributes:
        states: For each process γ, β and running statistics, by the layer's path and by name as in `Vectors`.
    """

    states: tuple[dict[str, dict[str, NDArray[np.float64]]], ...]

    @property
    def comparable(self) -> bool:
        """Whether all processes have the same layers with the same numbers of channels."""
        shapes = [
            {(path, name, vector.shape) for path, vectors in state.items() for name, vector in vectors.items()}
            for state in self.states
        ]
        return all(found == shapes[0] for found in shapes)

    @np.errstate(all="ignore")
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
                    parameters = max(parameters, _finite(np.abs(first[name] - other[path][name]).max()))
            if "running_mean" in first and "running_var" in first:
                var = first["running_var"] + eps
                shift = (first["running_mean"] - other[path]["running_mean"]) / np.sqrt(var)
                scale = np.log((other[path]["running_var"] + eps) / var) / 2
                worst = np.sqrt([np.square(shift).mean(), np.square(scale).mean()]).max()
                statistics = max(statistics, _finite(worst))
        return parameters, statistics


def _finite(value: Any) -> float:
    return float(value) if math.isfinite(value) else math.inf
