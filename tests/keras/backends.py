"""Runs the cases in a process of their own for each backend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_CASES = Path(__file__).parent / "cases"
_PACKAGES = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow", "numpy": "numpy"}

BACKENDS = tuple(_PACKAGES)
# Without optimization, XLA compiles a model in half the time. It is for tests of what functions do to models.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run_cases(backend: str, *files: str, plugins: tuple[str, ...] = (), xla_flags: str = "") -> None:
    """Run files of `cases`, and docstring examples of modules, with plugins for pytest; fail with their output."""
    if importlib.util.find_spec("keras") is None or importlib.util.find_spec(_PACKAGES[backend]) is None:
        pytest.skip(f"Keras or {backend} is not installed")
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {xla_flags}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)]),
    }
    environment.pop("PYTEST_ADDOPTS", None)
    # One configuration for the cases, without the project's conftest.py, which imports torch.
    pytest_options = ["-c", str(_CASES / "pytest.ini"), "--rootdir", str(_ROOT), "--confcutdir", str(_CASES)]
    command = [sys.executable, "-m", "pytest", *pytest_options, "-q", "-p", "no:cacheprovider"]
    command += [option for plugin in plugins for option in ("-p", plugin)]
    paths = [str(_ROOT / file if "/" in file else _CASES / file) for file in files]
    done = subprocess.run([*command, *paths], env=environment, cwd=_ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
