"""Fixtures and settings of the cases, for every backend."""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

_BACKEND = os.environ["KERAS_BACKEND"]


class _Absent(MetaPathFinder, Loader):
    """Makes packages fail to import: Keras imports all that it finds, and some take seconds."""

    # Keras's NumPy backend needs JAX.
    packages = {"torch", "jax", "tensorflow", "sklearn", "pandas"} - {_BACKEND, "jax" if _BACKEND == "numpy" else ""}

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] in self.packages else None

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError(f"No module named {module.__name__!r}", name=module.__name__)


sys.meta_path.insert(0, _Absent())

if _BACKEND == "tensorflow":  # two replicas on the CPU, which must be defined before the first tensor
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _BACKEND == "numpy":
        skip = pytest.mark.skip(reason="the backend has no gradients")
        for item in items:
            if item.get_closest_marker("requires_trainable_backend"):
                item.add_marker(skip)
