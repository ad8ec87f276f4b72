"""Let glibc's allocator keep the memory of freed tensors, instead of returning it to the kernel at each step."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Parameters of mallopt, from glibc's malloc.h, and of madvise, from Linux's mman-common.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_HUGE_PAGES = 14

_LARGEST = 1 << 30  # blocks up to this size are taken from the heap
_NEVER = -1
# The values to which glibc adapts in a process that frees blocks of 32 MB, and the number of mappings that it allows.
_ADAPTED_THRESHOLD, _ADAPTED_TRIM, _DEFAULT_MAPPINGS = 32 << 20, 64 << 20, 65536

_MAPPED = 32 << 20  # glibc maps larger blocks, whatever it adapts to
_MANY_SAMPLES = 512  # larger batches are rare on a CPU
_PROBE = 48 << 20  # above 32 MB, which glibc maps by default; below 64 MB, which it always maps in other threads
_SAMPLED = 192  # pages of the block that are written to learn whether it is new memory
_FEW_FAULTS = 64  # a block of new memory causes thousands, and in huge pages still one per 2 MB
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "tbbmalloc", "hoard", "snmalloc", "asan")


@dataclass(frozen=True)
class MemoryReport:
    """The result of `keep_memory`; prints as a sentence or two.

    Attributes:
        kept: Whether freed memory now stays in the process: the settings were made, and few page faults were measured.
        allocator: The allocator of the process, such as "glibc 2.36", "jemalloc" or "macOS".
        page_faults_before: Page faults of a block of 48 MB that was freed and allocated again, before the call; None if
            not measured.
        page_faults: The same afterwards.
        reserved: Bytes of the heap for which huge pages were requested.
        text: The sentences.
    """

    kept: bool
    allocator: str
    page_faults_before: int | None
    page_faults: int | None
    reserved: int
    text: str

    def __str__(self) -> str:
        return self.text


def keep_memory(keep: bool = True, *, reserve: int = 0) -> MemoryReport:
    """Let the allocator keep freed memory for the next step, instead of returning it to the kernel.

    By default, glibc maps new memory for every block above 32 MB, and unmaps it when the block is freed. The kernel
    clears new memory page by page, which costs more than most operations on it. This changes malloc's settings for the
    whole process and all libraries in it, and then verifies them: it allocates a block of 48 MB twice and counts the
    page faults. The process keeps its peak memory until it ends, or until `keep_memory(False)`.

    Blocks of 64 MB and more are only kept if the main thread allocates them. Other threads have heaps of at most that
    size. Only glibc (Linux) has these settings; the report says why nothing changed elsewhere.

    Args:
        keep: False returns free memory to the kernel, now and from now on.
        reserve: Bytes, such as `2 << 30`. The heap is extended by this amount, and huge pages are requested for it, so
            that the first use of memory causes few page faults, too. This uses no memory before tensors do. About the
            peak memory of a training step is a good choice.

    Raises:
        TypeError: `keep` is not a boolean, or `reserve` not an integer.
        ValueError: `reserve` is negative, or is given with `keep=False`.
        MemoryError: less than 48 MB are left, so that nothing can be measured.

    Examples:
        >>> report = keep_memory()
        >>> report.kept == report.allocator.startswith("glibc")
        True
        >>> report = keep_memory(False)
    """
    _check(keep, reserve)
    name = allocator()
    if not name.startswith("glibc"):
        return MemoryReport(False, name, None, None, 0, _why_not(name))
    before = _page_faults()
    reserved = _keep(reserve) if keep else 0
    resident = _resident()
    if not keep:
        _return()
    now = _page_faults()
    kept = keep and now < _FEW_FAULTS
    text = _kept_text(name, before, now) if keep else _returned_text(name, max(resident - _resident(), 0))
    if reserve:
        text += " " + _reserved_text(reserve, reserved)
    return MemoryReport(kept, name, before, now, reserved, text)


def allocator() -> str:
    """Return the allocator behind malloc in this process: "glibc" with its version, or another one's name."""
    if not sys.platform.startswith("linux"):
        return {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
    library = _library_of_malloc()
    for other in _OTHER_ALLOCATORS:
        if other in library:
            return other
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        version = None
    if version is None:
        return "musl" if "musl" in library else library
    return version if library.startswith(("libc.so", "libc-")) else library


def hint() -> str | None:
    """Return advice if freed memory goes back to the kernel and `keep_memory` would change that."""
    # With this setting, torch requests huge pages for large tensors, which cause few page faults.
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" or not allocator().startswith("glibc"):
        return None
    try:
        faults = _page_faults(_PROBE // _SAMPLED, 1)
    except MemoryError:
        return None
    if faults < _FEW_FAULTS:
        return None
    return (
        "each tensor above 32 MB gets newly mapped memory, which is slow; batchnorm.keep_memory() keeps memory for the "
        "next step (documentation: Training on a CPU)"
    )


def advice(bytes_per_sample: int) -> tuple[str, ...]:
    """Return a sentence on `keep_memory` if training a network with tensors of this size on a CPU gains from it."""
    if bytes_per_sample < 1:
        return ()
    samples = _MAPPED // bytes_per_sample + 1
    if samples > _MANY_SAMPLES or hint() is None:
        return ()
    return (
        f"On a CPU, a batch of {samples} or more makes tensors above 32 MB, and each step maps new memory for them: "
        "call batchnorm.keep_memory() before training.",
    )


def _check(keep: bool, reserve: int) -> None:
    if not isinstance(keep, bool):
        raise TypeError(f"keep_memory expects True or False, got {keep!r}. Pass keep_memory(False) to return memory.")
    if not isinstance(reserve, int) or isinstance(reserve, bool):
        raise TypeError(
            f"keep_memory expects an integer number of bytes for reserve, got {reserve!r}. Pass, for example, "
            "reserve=2 << 30 for 2 GiB."
        )
    if reserve < 0 or (reserve and not keep):
        raise ValueError(
            "keep_memory expects reserve to be 0 or, with keep=True, a positive number of bytes, got "
            f"reserve={reserve} with keep={keep}. Leave reserve out to reserve nothing."
        )


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _library_of_malloc() -> str:
    """Return the file name of the library that defines malloc."""
    libc, found = ctypes.CDLL(None), _Symbol()
    libc.dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Symbol)]
    libc.dladdr(ctypes.cast(libc.malloc, ctypes.c_void_p), ctypes.byref(found))
    return os.path.basename(os.fsdecode(found.file or b"unknown"))


def _page_faults(stride: int = _PROBE, size: int = _PROBE) -> int:
    """Return the page faults of writing to a block that was freed and allocated again.

    Args:
        stride: Bytes between the beginnings of two parts that are written; by default, one part is written.
        size: Bytes of each part.
    """
    import resource

    libc = _libc()
    counts = []
    for _ in range(2):
        block = libc.malloc(_PROBE)
        if not block:
            raise MemoryError(
                "keep_memory expects 48 MB for its measurement, but malloc has none left. Free memory, or raise the "
                "process's limit."
            )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for start in range(block, block + _PROBE, stride):
            libc.memset(start, 1, size)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        libc.free(block)
    return int(counts[-1])


def _keep(reserve: int) -> int:
    """Change malloc's settings, and return the bytes that were reserved."""
    libc = _libc()
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    reserved = _reserve(libc, reserve) if reserve else 0
    # Before 2.35, glibc refuses thresholds above 32 MB. It then accepts a limit of 0 mapped blocks.
    if libc.mallopt(_MMAP_THRESHOLD, _LARGEST):
        libc.mallopt(_MMAP_MAX, _DEFAULT_MAPPINGS)
    else:
        libc.mallopt(_MMAP_MAX, 0)
    return reserved


def _reserve(libc: Any, reserve: int) -> int:
    """Extend the heap and request huge pages for the new part; it stays with malloc after it is freed."""
    libc.mallopt(_MMAP_MAX, 0)  # a block of this size would be mapped otherwise
    block = libc.malloc(reserve)
    if not block:
        return 0
    huge = 2 << 20
    start = (block + huge - 1) // huge * huge
    size = max((block + reserve - start) // huge * huge, 0)
    advised = size > 0 and _in_heap(block) and libc.madvise(start, size, _HUGE_PAGES) == 0
    libc.free(block)
    return size if advised else 0


def _in_heap(address: int) -> bool:
    """Return whether an address is in the main thread's heap, which malloc extends."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            if start <= address < end:
                return True
    return False


def _return() -> None:
    libc = _libc()
    libc.mallopt(_MMAP_MAX, _DEFAULT_MAPPINGS)
    libc.mallopt(_MMAP_THRESHOLD, _ADAPTED_THRESHOLD)
    libc.mallopt(_TRIM_THRESHOLD, _ADAPTED_TRIM)
    libc.malloc_trim(0)


def _resident() -> int:
    """Return the process's resident memory in bytes; 0 if the kernel does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _kept_text(name: str, before: int, now: int) -> str:
    faults = f"a freed block of 48 MB causes {now:,} page faults when it is allocated again (before: {before:,})"
    if now >= _FEW_FAULTS:
        return f"{name} did not accept the settings: {faults}."
    text = f"{name} keeps freed memory until the process ends: {faults}."
    if threading.current_thread() is not threading.main_thread():
        text += " Blocks of 64 MB and more are kept only in the main thread: train there."
    return text


def _returned_text(name: str, freed: int) -> str:
    return f"{name} returns freed memory to the kernel again; it returned {freed / 1e6:,.0f} MB now."


def _reserved_text(reserve: int, reserved: int) -> str:
    if reserved:
        return f"Huge pages are requested for {reserved / 1e6:,.0f} MB of the heap."
    size = f"{reserve / 1e6:,.0f} MB"
    return f"Nothing was reserved: the heap could not be extended by {size}, or the kernel offers no huge pages."


def _why_not(name: str) -> str:
    reasons = {
        "macOS": "macOS's allocator has no setting for this",
        "Windows": "Windows' allocator has no setting for this",
        "musl": "musl's allocator has no setting for this",
        "asan": "AddressSanitizer replaces the allocator",
    }
    reason = reasons.get(name, f"{name} manages the memory of this process, and has its own settings")
    return f"{reason}. Nothing was changed."
