"""Statistics over four devices, and arrays sharded over them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.keras.backends import UNOPTIMIZED

pytest.importorskip("jax")


def test_four_devices_compute_what_one_does() -> None:
    script = Path(__file__).with_name("four_devices.py")
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {UNOPTIMIZED}"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
