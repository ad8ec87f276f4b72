"""When `make demo` installs and builds, and what: tested with programs that only record their arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("scripts/requirements.py", "scripts/torch_interface.py")
PARTS = ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt", *SCRIPTS)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

RECORD = """#!/bin/sh
echo "${0##*/} $*" >> calls.txt
case "$*" in *-B*) mkdir -p build/dev; echo "Instruction sets: some"; touch build/dev/libbatchnorm_kernels.so;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make the files that `make demo` reads, and a virtual environment whose programs do nothing."""
    for part in PARTS:
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    for folder in ("src/batchnorm", "csrc/kernels", "csrc/vendor", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("csrc/kernels/dispatch.cpp", "csrc/vendor/README.md"):
        (tmp_path / file).touch()
    for program in ("pip", "cmake", "batchnorm", "pytest"):
        (tmp_path / ".venv/bin" / program).write_text(RECORD)
        (tmp_path / ".venv/bin" / program).chmod(0o755)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    return tmp_path


def calls(checkout: Path, target: str) -> list[str]:
    """The programs that `make target` calls, with their arguments."""
    (checkout / "calls.txt").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "CXX=true", target]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True)
    return (checkout / "calls.txt").read_text().splitlines()


def change(file: Path, old: str, new: str) -> None:
    """Change a file, which is then newer than everything before."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_demo_installs_and_builds_once_what_it_needs(checkout: Path) -> None:
    first = calls(checkout, "demo")
    assert first[-1] == "batchnorm compare"
    assert [call.split("--requirement ")[1] for call in first if "--requirement" in call] == [
        ".venv/build.txt",
        ".venv/compare.txt",
    ]
    (configured,) = [call for call in first if "-B build/dev" in call]
    assert "-DBATCHNORM_CAPABILITIES=native" in configured
    assert calls(checkout, "demo") == ["batchnorm compare"]


def test_only_what_changed_is_installed_again(checkout: Path) -> None:
    calls(checkout, "demo")
    pyproject = checkout / "pyproject.toml"
    change(pyproject, "line-length = 120", "line-length = 119")
    change(pyproject, '"ruff>=0.11"', '"ruff>=0.12"')
    # the package's metadata contain the requirements, so the package itself is installed again
    assert [call.split(" --")[-1] for call in calls(checkout, "demo")] == ["editable .", "batchnorm compare"]
    change(pyproject, '"scipy>=1.11"', '"scipy>=1.12"')
    assert [call.split(" --")[-1] for call in calls(checkout, "demo")] == [
        "editable .",
        "requirement .venv/compare.txt",
        "batchnorm compare",
    ]


def test_setup_adds_to_the_demo_and_the_demo_keeps_it(checkout: Path) -> None:
    calls(checkout, "demo")
    setup = calls(checkout, "setup")
    assert [call.split("--requirement ")[1] for call in setup if "--requirement" in call] == [".venv/dev.txt"]
    assert any("-DBATCHNORM_CAPABILITIES=all" in call for call in setup)
    assert calls(checkout, "demo") == ["batchnorm compare"]
    (checkout / "csrc/kernels/dispatch.cpp").write_text("changed")
    assert any("-DBATCHNORM_CAPABILITIES=all" in call for call in calls(checkout, "demo"))
