"""With what a diagnosis was made."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from batchnorm.doctor.measure.probe import Probe


@dataclass(frozen=True)
class Conditions:
    """With what a diagnosis was made.

    Attributes:
        batch_size: The median of the data's; None without data.
        loss: Whether there were a loss and data to apply it to.
        optimizer: Whether the optimizer was given.
        training: The model's mode.
        device: Of the model; all of them where there are several.
        dtype: Of its parameters, likewise.
        batchnorm: Version.
        torch: Version.
        python: Version.
        time: When, in UTC, as in ISO 8601.
    """

    batch_size: float | None
    loss: bool
    optimizer: bool
    training: bool
    device: str
    dtype: str
    batchnorm: str
    torch: str
    python: str
    time: str

    @classmethod
    def of(cls, probe: Probe) -> Conditions:
        """Of what was just measured."""
        tensors = [*probe.model.parameters(), *probe.model.buffers()]
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
        return cls(
            None if probe.data is None else probe.batch_size,
            probe.data is not None and probe.data.loss is not None,
            probe.optimizer is not None,
            probe.training,
            ", ".join(sorted({str(t.device) for t in tensors})),
            ", ".join(sorted(dtypes)),
            importlib.metadata.version("batchnorm"),
            torch.__version__,
            platform.python_version(),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
