"""Replace the normalization of a model, or freeze it."""

from batchnorm.surgery.convert.convert import convert
from batchnorm.surgery.convert.freeze import freeze, unfreeze

__all__ = ["convert", "freeze", "unfreeze"]
