"""Replace the layers of a model with faster ones that train the same."""

from batchnorm.surgery.accelerate.accelerate import AccelerateReport, accelerate

__all__ = ["AccelerateReport", "accelerate"]
