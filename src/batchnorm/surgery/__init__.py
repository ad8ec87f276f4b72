"""Changes to a model that already exists: faster layers, another normalization, frozen statistics."""

from batchnorm.surgery.accelerate import AccelerateReport, accelerate
from batchnorm.surgery.convert import convert
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.groups import parameter_groups
from batchnorm.surgery.insert import insert_batchnorm
from batchnorm.surgery.redundant_bias import drop_redundant_bias

__all__ = [
    "AccelerateReport",
    "accelerate",
    "convert",
    "drop_redundant_bias",
    "freeze",
    "insert_batchnorm",
    "parameter_groups",
    "unfreeze",
]
