"""The layer's computation on each backend.

`on_torch` uses the operators for torch, `on_jax` uses `batchnorm.jax`, and `composition` uses `keras.ops` elsewhere.
The current backend's module alone is imported. Each has the same contract:

    FUSES                                            whether it applies the activations of `activations.FUSED` itself
    check_synchronized()                             raises an error if the backend cannot synchronize
    normalize(x, mean, variance, gamma, beta, call)  returns y by given statistics
    batch_norm(x, gamma, beta, counts, call)         returns y and the batch's statistics; counts: None, or booleans
                                                     that broadcast to x
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import keras

_MODULES = {"torch": "on_torch", "jax": "on_jax"}


def current() -> Any:
    """Return the module for Keras's backend."""
    return import_module(f"{__name__}.{_MODULES.get(keras.backend.backend(), 'composition')}")
