"""Runs the functions for models where PyTorch cannot be imported. A program of its own, not a file of cases."""

from __future__ import annotations

import sys


def main() -> None:
    """Call every function."""
    import keras
    import numpy as np
    import pytest
    from keras import layers

    import batchnorm

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


if __name__ == "__main__":
    import tests.keras.no_torch  # noqa: F401

    main()
