"""Every function for models where PyTorch cannot be imported."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest
from keras import layers

import batchnorm


# Keras finds shapes on NumPy by computing with uninitialized memory, which may warn of an overflow.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_function_works_and_those_for_pytorch_name_it() -> None:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model = keras.Sequential([layers.Input((4,)), layers.Dense(3), layers.BatchNormalization(name="norm")])
    ours = batchnorm.keras.convert(model).model
    frozen = batchnorm.keras.freeze(batchnorm.keras.recalibrate(ours, x).model).model
    assert not batchnorm.keras.fold(frozen).report.left
    diagnosis = batchnorm.keras.diagnose(model, x)
    assert {"BN201"} <= {finding.code for finding in diagnosis.findings}
    assert "norm" in diagnosis.to_html()
    for name in set(batchnorm.keras.__all__) & set(batchnorm.__all__):
        with pytest.raises(ImportError, match=rf"For a Keras model use batchnorm\.keras\.{name}\.$"):
            getattr(batchnorm, name)
    assert "torch" not in sys.modules
