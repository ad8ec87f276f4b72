"""Batch normalization for Keras 3, on its torch, JAX, TensorFlow and NumPy backends.

`BatchNormalization` takes the arguments of Keras's own layer, and has its weights and files. `convert`, `fold`,
`freeze`, `unfreeze`, `recalibrate` and `diagnose` work on Keras models. The backend is chosen by Keras, through the
environment variable `KERAS_BACKEND` or `keras.json`, before Keras is imported.
"""

from batchnorm._frameworks import required_by

with required_by("batchnorm.keras"):
    from batchnorm.keras.doctor import diagnose
    from batchnorm.keras.layer import BatchNormalization
    from batchnorm.keras.recalibration import recalibrate
    from batchnorm.keras.surgery import convert, fold, freeze, unfreeze

__all__ = ["BatchNormalization", "convert", "diagnose", "fold", "freeze", "recalibrate", "unfreeze"]
