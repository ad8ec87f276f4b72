"""Find what is wrong with the batch normalization of a Keras model: a second way to measure for `batchnorm.doctor`."""

from batchnorm.keras.doctor.diagnosing import diagnose

__all__ = ["diagnose"]
