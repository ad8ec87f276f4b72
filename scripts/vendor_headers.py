"""Copy the headers of torch and XLA that `csrc` includes to `csrc/vendor`.

pip download --no-deps jaxlib==0.6.1    # unpack this wheel; torch is the installed one
python scripts/vendor_headers.py FOLDER_OF_THE_JAXLIB_WHEEL
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[1] / "csrc"
VENDOR = SOURCES / "vendor"


def headers(sources: Sequence[str], include: Path) -> list[Path]:
    """Return the headers in `include` that the sources include, directly or indirectly."""
    paths = [str(SOURCES / source) for source in sources]
    command = ["c++", "-std=c++20", "-M", f"-I{SOURCES}", f"-I{include}", *paths]
    rules = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {Path(word) for word in rules.replace("\\\n", " ").split() if word.startswith(str(include))}
    return sorted(path.relative_to(include) for path in found)


def vendor(name: str, sources: Sequence[str], include: Path, license_text: str) -> None:
    """Replace the headers of `name`, and its license."""
    shutil.rmtree(VENDOR / name, ignore_errors=True)
    for header in headers(sources, include):
        (VENDOR / header).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(include / header, VENDOR / header)
    (VENDOR / name / "LICENSE").write_text(license_text)


def license_of(distribution: importlib.metadata.Distribution) -> str:
    """Return the text of a distribution's license."""
    found = [file for file in distribution.files or [] if file.name in ("LICENSE", "LICENSE.txt")]
    return found[0].read_text()


def main() -> None:
    torch_include = Path(torch.__file__).parent / "include"
    sources = ("pytorch/ops.cpp", "pytorch/strict.cpp")
    vendor("torch", sources, torch_include, license_of(importlib.metadata.distribution("torch")))
    folder = Path(sys.argv[1])
    (jaxlib,) = importlib.metadata.distributions(path=[str(folder)])
    # The wheel's file begins with the license of JAX and XLA, and continues with those of libraries.
    apache = license_of(jaxlib).split(f"{'-' * 80}\n")[1]
    vendor("xla", ("xla/xla.cpp",), folder / "jaxlib/include", apache)


if __name__ == "__main__":
    main()
