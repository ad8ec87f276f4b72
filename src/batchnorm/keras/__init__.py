"""Batch normalization for Keras 3, on its torch, JAX, TensorFlow and NumPy backends.

`BatchNormalization` takes the arguments of Keras's own layer, and has its weights and files. The backend is chosen by
Keras, through the environment variable `KERAS_BACKEND` or `keras.json`, before Keras is imported.
"""

from batchnorm._frameworks import required_by

with required_by("batchnorm.keras"):
    from batchnorm.keras.layer import BatchNormalization

__all__ = ["BatchNormalization"]
