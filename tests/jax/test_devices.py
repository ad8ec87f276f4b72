"""Statistics over four devices, and arrays sharded over them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")


def test_four_devices_compute_what_one_does() -> None:
    script = Path(__file__).with_name("four_devices.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
