"""Watch batch normalization while a model trains."""

from batchnorm.doctor.watch.alarms import BatchNormWarning
from batchnorm.doctor.watch.records import Record
from batchnorm.doctor.watch.watcher import Watch, watch

__all__ = ["BatchNormWarning", "Record", "Watch", "watch"]
