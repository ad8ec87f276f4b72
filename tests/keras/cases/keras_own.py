"""Keras's own tests of its layer, from the installed package, on this library's layer."""

from __future__ import annotations

from typing import Any

import pytest
from keras.src.layers.normalization import batch_normalization_test as own

from batchnorm.keras import BatchNormalization

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # one of them gives negative variances


class _Layers:
    """`keras.layers` with this library's `BatchNormalization`."""

    BatchNormalization = BatchNormalization

    def __init__(self, layers: Any) -> None:
        self._layers = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)


own.layers = _Layers(own.layers)


class KerasOwnTest(own.BatchNormalizationTest):
    pass


del own.BatchNormalizationTest  # collected above, under a name that says whose layer it tests
