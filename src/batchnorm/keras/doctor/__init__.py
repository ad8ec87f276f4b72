"""Find what is wrong with the batch normalization of a Keras model: a second way to measure for `batchnorm.doctor`.

The measurements, the rules and the reports are those for PyTorch, and hold PyTorch's tensors. PyTorch must therefore be
installed, whatever Keras's backend is.
"""

from batchnorm.keras.doctor.diagnosing import diagnose

__all__ = ["diagnose"]
