"""Watch batch normalization while a model trains."""

from batchnorm.doctor.watching.alarms import BatchNormWarning
from batchnorm.doctor.watching.records import Record
from batchnorm.doctor.watching.watcher import Watch, watch

__all__ = ["BatchNormWarning", "Record", "Watch", "watch"]
