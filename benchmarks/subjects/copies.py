"""Copies of a tensor, ordinary and non-temporal: the speed of memory, measured with every case."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

COPY, NON_TEMPORAL, CLONE = "copy", "copy non-temporal", "clone"
_SOURCE = Path(__file__).with_name("copy.cpp")
_BUILD = Path(__file__).parents[2] / "build" / "benchmarks"


@functools.cache
def _non_temporal() -> Callable[[int, int, int], None] | None:
    """Return the compiled copy, or None if it cannot be built; the reason is then printed once."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler: the floor comes from ordinary copies alone")
        return None
    package = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", f"-isystem{package / 'include'}"]
    command += ["-DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))", str(_SOURCE), f"-L{package / 'lib'}", "-ltorch_cpu"]
    recipe = hashlib.sha256((_SOURCE.read_text() + " ".join(command)).encode()).hexdigest()[:12]
    library = _BUILD / f"copy-{recipe}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(".new")
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if result.returncode:
            print(
                f"the non-temporal copy did not compile; the floor comes from ordinary copies alone:\n{result.stderr}"
            )
            return None
        made.replace(library)
    function = ctypes.CDLL(str(library)).copy_non_temporal
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    return function


def copies_of(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the calls that copy x into existing memory, and into new memory (`clone`)."""
    destination = torch.empty_like(x)
    x = x.detach()
    found: dict[str, Callable[[], object]] = {COPY: lambda: destination.copy_(x), CLONE: x.clone}
    function = _non_temporal()
    if function is not None:
        bytes_ = x.numel() * x.element_size()
        to, source = destination.data_ptr(), x.data_ptr()
        function(to, source, bytes_)
        whole = bytes_ // 64 * 64 // x.element_size()
        views = [t.as_strided((t.numel(),), (1,))[:whole] for t in (destination, x)]
        if not torch.equal(*views):
            raise RuntimeError("the non-temporal copy must copy every line, but did not: see copy.cpp")
        found[NON_TEMPORAL] = lambda: (function(to, source, bytes_), destination)[1]
    return found
