"""Batch normalization watched while a model trains."""

from batchnorm.doctor.telemetry.alarms import BatchNormWarning
from batchnorm.doctor.telemetry.record import Record
from batchnorm.doctor.telemetry.watcher import Watch, watch

__all__ = ["BatchNormWarning", "Record", "Watch", "watch"]
