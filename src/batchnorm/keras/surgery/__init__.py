"""Functions that change a Keras model: another class of layers, frozen statistics, or no batch normalization."""

from batchnorm.keras.surgery.convert import convert
from batchnorm.keras.surgery.fold import fold
from batchnorm.keras.surgery.freeze import freeze, unfreeze

__all__ = ["convert", "fold", "freeze", "unfreeze"]
