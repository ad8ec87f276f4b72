"""Runs the functions for models where PyTorch cannot be imported. A program of its own, not a file of cases."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class WithoutTorch(MetaPathFinder):
    """Finds no PyTorch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")


def main() -> None:
    """Call every function, and print the error of the one that needs PyTorch."""
    import keras
    import numpy as np
    from keras import layers

    import batchnorm

    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model = keras.Sequential([layers.Input((4,)), layers.Dense(3), layers.BatchNormalization(name="norm")])
    ours = batchnorm.keras.convert(model).model
    frozen = batchnorm.keras.freeze(batchnorm.keras.recalibrate(ours, x).model).model
    assert not batchnorm.keras.fold(frozen).report.left
    assert "torch" not in sys.modules
    try:
        _ = batchnorm.keras.diagnose
    except ImportError as error:
        print(error)


if __name__ == "__main__":
    sys.meta_path.insert(0, WithoutTorch())
    main()
