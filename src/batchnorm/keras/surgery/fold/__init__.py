"""Remove batch normalization from a Keras model, for inference."""

from batchnorm.keras.surgery.fold.folding import fold

__all__ = ["fold"]
