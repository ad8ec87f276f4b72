"""The simplest streams over tensors: copies, reads and maps, the fastest that this machine can pass over memory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

COPY, NON_TEMPORAL, CLONE = "copy", "copy non-temporal", "clone"
LINE = 64  # bytes of a cache line
_GROUP_BYTES = 512 << 10  # of all inputs: what a core's own cache holds until it is read again
_SOURCE = Path(__file__).with_name("streams.cpp")
_BUILD = Path(__file__).parents[2] / "build" / "benchmarks"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled streams, or None if they cannot be built; the reason is then printed once."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler: the floor comes from ordinary copies alone")
        return None
    package = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", f"-isystem{package / 'include'}"]
    command += ["-DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))", str(_SOURCE), f"-L{package / 'lib'}", "-ltorch_cpu"]
    recipe = hashlib.sha256((_SOURCE.read_text() + " ".join(command)).encode()).hexdigest()[:12]
    path = _BUILD / f"streams-{recipe}.so"
    if not path.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(".new")
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"the streams did not compile; the floor comes from ordinary copies alone:\n{result.stderr}")
            return None
        made.replace(path)
    loaded = ctypes.CDLL(str(path))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
    loaded.stream_read.argtypes, loaded.stream_read.restype = [pointer, pointer, number], number
    loaded.stream_map.argtypes, loaded.stream_map.restype = [pointer, pointer, pointer, number, flag], None
    loaded.stream_channels.argtypes = [pointer, pointer, pointer, number, number, number, flag]
    loaded.stream_channels.restype = number
    return loaded


def _pointers(*tensors: Tensor) -> list[int | None]:
    """Return the addresses of one or two inputs, as the streams take them."""
    return [*(t.data_ptr() for t in tensors), *[None] * (2 - len(tensors))]


def read(*inputs: Tensor) -> int:
    """Read one or two tensors of equal size, and return the exclusive or of their 64-bit words."""
    found: int = _loaded().stream_read(*_pointers(*inputs), inputs[0].nbytes)
    return found


def map_to(out: Tensor, *inputs: Tensor, non_temporal: bool) -> None:
    """Read one or two tensors, and write `out`: the input, or the exclusive or of both."""
    _loaded().stream_map(out.data_ptr(), *_pointers(*inputs), out.nbytes, non_temporal)


def channels_to(out: Tensor, *inputs: Tensor, non_temporal: bool) -> int:
    """Do both for contiguous `[N, C, ...]`, a group of channels at a time, which is read again from the cache."""
    samples, channels = out.shape[:2]
    channel = math.prod(out.shape[2:]) * out.element_size()
    whole = LINE // math.gcd(channel, LINE)  # channels of whole lines
    groups = channels // whole
    while groups % 2 == 0 and 2 * samples * (channels // groups) * channel * len(inputs) <= _GROUP_BYTES:
        groups //= 2
    lines = channels // groups * channel // LINE
    found: int = _loaded().stream_channels(out.data_ptr(), *_pointers(*inputs), samples, groups, lines, non_temporal)
    return found


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the streams must be compiled, but this machine could not; install a C++ compiler")
    return loaded


def copies_of(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the calls that copy x into existing memory, and into new memory (`clone`)."""
    destination = torch.empty_like(x)
    x = x.detach()
    found: dict[str, Callable[[], object]] = {COPY: lambda: destination.copy_(x), CLONE: x.clone}
    if library() is not None:
        map_to(destination, x, non_temporal=True)
        whole = x.nbytes // LINE * LINE // x.element_size()
        views = [t.as_strided((t.numel(),), (1,))[:whole] for t in (destination, x)]
        if not torch.equal(*views):
            raise RuntimeError("the non-temporal copy must copy every line, but did not: see streams.cpp")
        found[NON_TEMPORAL] = lambda: (map_to(destination, x, non_temporal=True), destination)[1]
    return found
