"""Batch normalization watched while a model trains."""

from batchnorm.doctor.watch.alarms import BatchNormWarning
from batchnorm.doctor.watch.record import Record
from batchnorm.doctor.watch.watcher import Watch, watch

__all__ = ["BatchNormWarning", "Record", "Watch", "watch"]
