"""keep_memory: what it changes in the allocator, and what it reports where it cannot change anything."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import batchnorm
from batchnorm import memory

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_glibc = pytest.mark.skipif(not memory.allocator().startswith("glibc"), reason="glibc's allocator only")
counts_faults = pytest.mark.skipif(
    HUGE.exists() and "[always]" in HUGE.read_text(), reason="mapped memory causes few page faults here"
)


def in_a_new_process(program: str, **environment: str) -> list[str]:
    """Return the lines that a program prints in a process whose allocator nothing has changed."""
    imports = "import ctypes, resource, threading\nfrom batchnorm import memory\n"
    path = {"PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-S", "-c", imports + program], env={**path, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


FAULTS = """
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def again(size):
    for _ in range(2):
        block = libc.malloc(size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        libc.memset(block, 1, size)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        libc.free(block)
    return faults
"""


@needs_glibc
@counts_faults
def test_blocks_are_kept_after_the_call_and_returned_after_the_opposite_one() -> None:
    program = """
SIZES = [33 << 20, 100 << 20]
print(all(again(size) > 1000 for size in SIZES), memory.hint() is not None)
report = memory.keep_memory()
print(report.kept, report.page_faults_before > 1000, report.page_faults, memory.hint())
print([again(size) for size in SIZES])
report = memory.keep_memory(False)
print(report.kept, report.page_faults > 1000, memory.hint() is not None)
print(all(again(size) > 1000 for size in SIZES))
"""
    assert in_a_new_process(FAULTS + program) == [
        "True True",
        "True True 0 None",
        "[0, 0]",
        "False True True",
        "True",
    ]


@needs_glibc
@pytest.mark.parametrize(
    "setting",
    [
        {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_there_is_no_hint_if_the_environment_keeps_memory(setting: dict[str, str]) -> None:
    assert in_a_new_process("print(memory.hint())", **setting) == ["None"]


@needs_glibc
@counts_faults
def test_an_old_glibc_that_refuses_the_threshold_is_told_to_map_nothing() -> None:
    """Like glibc 2.31: mallopt returns 0 for thresholds above 32 MB."""
    program = """
real = memory._libc
def old():
    libc = real()
    mallopt = libc.mallopt
    libc.mallopt = lambda parameter, value: 0 if parameter == -3 and value > 32 << 20 else mallopt(parameter, value)
    return libc
memory._libc = old
print(memory.keep_memory().kept, again(100 << 20))
print(memory.keep_memory(False).kept, again(100 << 20) > 1000)
"""
    assert in_a_new_process(FAULTS + program) == ["True 0", "False True"]


@needs_glibc
def test_a_reserve_takes_no_memory_before_it_is_used() -> None:
    program = """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
report = memory.keep_memory(reserve=1 << 30)
print(report.kept, report.reserved in (0, 1 << 30, (1 << 30) - (2 << 20)), resident() - before < 128 << 20)
print("MB of the heap" in str(report) if report.reserved else "Nothing was reserved" in str(report))
"""
    assert in_a_new_process(program) == ["True True True", "True"]


@needs_glibc
@counts_faults
def test_the_report_says_that_other_threads_map_large_blocks() -> None:
    program = """
found = []
thread = threading.Thread(target=lambda: found.append((memory.keep_memory(), again(48 << 20), again(100 << 20))))
thread.start()
thread.join()
report, small, large = found[0]
print(report.kept, small, large > 1000, "only in the main thread" in str(report))
"""
    assert in_a_new_process(FAULTS + program) == ["True 0 True True"]


def test_without_memory_for_the_measurement_there_is_an_error_and_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "allocator", lambda: "glibc 2.36")
    monkeypatch.setattr(memory, "_libc", lambda: SimpleNamespace(malloc=lambda size: None))
    with pytest.raises(MemoryError, match="expects 48 MB for its measurement, but malloc has none left. Free memory"):
        batchnorm.keep_memory()
    assert memory.hint() is None


@pytest.mark.parametrize(
    ("allocator", "reason"),
    [
        ("macOS", "macOS's allocator has no setting for this. Nothing was changed."),
        ("Windows", "Windows' allocator has no setting for this. Nothing was changed."),
        ("musl", "musl's allocator has no setting for this. Nothing was changed."),
        ("jemalloc", "jemalloc manages the memory of this process, and has its own settings. Nothing was changed."),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_other_allocators_are_left_alone(
    allocator: str, reason: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden() -> None:
        raise AssertionError("malloc's settings must not change")

    monkeypatch.setattr(memory, "allocator", lambda: allocator)
    monkeypatch.setattr(memory, "_libc", forbidden)
    report = batchnorm.keep_memory(keep)
    assert (report.kept, report.allocator, report.page_faults, str(report)) == (False, allocator, None, reason)
    assert memory.hint() is None


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("libjemalloc.so.2", "jemalloc"),
        ("libtcmalloc_minimal.so.4", "tcmalloc"),
        ("libmimalloc.so", "mimalloc"),
        ("ld-musl-x86_64.so.1", "musl"),
        ("libother.so", "libother.so"),
    ],
)
def test_allocators_are_named_by_the_library_of_malloc(
    library: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory, "_library_of_malloc", lambda: library)
    monkeypatch.setattr(memory.os, "confstr", lambda _: None if "musl" in library else "glibc 2.36")
    assert memory.allocator() == name


def test_backends_gives_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "hint", lambda: "keep the memory")
    found = batchnorm.backends()
    assert found.hints == ("keep the memory",)
    assert str(found).endswith("\nhint: keep the memory")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"keep": "yes"}, TypeError, "expects True or False, got 'yes'. Pass keep_memory"),
        ({"reserve": 1.5}, TypeError, "an integer number of bytes for reserve, got 1.5. Pass, for example"),
        ({"reserve": True}, TypeError, "an integer number of bytes for reserve, got True"),
        ({"reserve": -1}, ValueError, "a positive number of bytes, got reserve=-1 with keep=True. Leave reserve out"),
        ({"keep": False, "reserve": 1}, ValueError, "got reserve=1 with keep=False"),
    ],
)
def test_wrong_arguments_change_nothing(
    arguments: dict[str, object], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_libc", lambda: pytest.fail("malloc's settings must not change"))
    with pytest.raises(error, match=words):
        batchnorm.keep_memory(**arguments)
