"""The conditions of a diagnosis."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import datetime, timezone

from batchnorm._version import __version__
from batchnorm.doctor.measure.measurements import Measurements


@dataclass(frozen=True)
class Conditions:
    """The conditions of a diagnosis.

    Attributes:
        batch_size: Median of the data's batch sizes; None without data.
        loss: Whether there were data and a loss.
        loss_source: Where the loss came from, such as "from training_step", or why there is none; empty if `loss=` was
            given.
        optimizer: Whether the optimizer was given.
        training: Whether the model was in training mode.
        device: The device of the model; all of them if there are several.
        dtype: The dtype of its parameters and buffers; all of them if there are several.
        batchnorm: Version.
        torch: Version, for a model of PyTorch.
        keras: Version and backend, for a model of Keras.
        python: Version.
        time: Time in UTC, in ISO 8601.
    """

    batch_size: float | None
    loss: bool
    loss_source: str
    optimizer: bool
    training: bool
    device: str
    dtype: str
    batchnorm: str
    torch: str | None
    keras: str | None
    python: str
    time: str

    @classmethod
    def of(cls, m: Measurements) -> Conditions:
        """Return the conditions of these measurements, now."""
        return cls(
            m.batch_size if m.batch_sizes else None,
            m.loss,
            m.loss_source,
            m.optimizer_code is not None,
            m.training,
            m.device,
            m.dtype,
            __version__,
            m.versions.get("torch"),
            m.versions.get("keras"),
            platform.python_version(),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
