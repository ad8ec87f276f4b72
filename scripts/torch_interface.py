"""Describe the installed torch for the build of the node for its autograd, as a CMake list.

python scripts/torch_interface.py    # NAME_OF_THE_LIBRARY;TORCH_FOLDER;C++_ABI;FOLDER_OF_PYTHON'S_HEADERS

If the node cannot be built, the status is 1, and the output is the reason.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

# A tensor, which csrc/pytorch/autograd.cpp declares again, because the header needs more than the stable ABI of Python.
LAYOUT = re.compile(r"struct THPVariable \{\s*PyObject_HEAD\s*(//[^\n]*\s*)*at::Tensor cdata;")


def problem(torch_folder: Path, version: str, python_headers: Path) -> str:
    """Return why the node cannot be built; empty if it can."""
    header = torch_folder / "include/torch/csrc/autograd/python_variable.h"
    if not sys.platform.startswith("linux"):
        return "it is tested only on Linux"
    if re.fullmatch(r"\d+\.\d+\.\d+(\+.*)?", version) is None:
        return f"torch {version} is not a release"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "the free-threaded Python has no stable ABI"
    if not (python_headers / "Python.h").is_file():
        return "the headers of Python are not installed"
    if not header.is_file() or LAYOUT.search(header.read_text()) is None:
        return f"torch {version} lays out its tensors in another way"
    return ""


def main() -> None:
    if find_spec("torch") is None:
        sys.exit(_refuse("torch is not installed in the build's environment"))
    import torch

    folder, headers = Path(torch.__file__).parent, Path(sysconfig.get_path("include"))
    version = torch.__version__
    if found := problem(folder, version, headers):
        sys.exit(_refuse(found))
    major, minor = version.split(".")[:2]
    abi = int(torch.compiled_with_cxx11_abi())
    print(f"batchnorm_autograd_{major}_{minor};{folder.as_posix()};{abi};{headers.as_posix()}")


def _refuse(reason: str) -> int:
    print(reason)
    return 1


if __name__ == "__main__":
    main()
