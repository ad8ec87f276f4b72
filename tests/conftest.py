"""Fixtures and settings of all tests."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads that wait for others sleep. If they spun, they would take the cores from the threads that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One thread, with and without workers: sums of torch, and so trained networks, depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles loops without vectors, in half the time, and probes no instruction sets.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import hypothesis
import pytest
import torch

with contextlib.suppress(ImportError):
    import triton  # noqa: F401  (before TensorFlow, after which its import crashes the process)

# Each example may take as long as it needs, and CI draws the same examples every time.
hypothesis.settings.register_profile(
    "batchnorm", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
hypothesis.settings.load_profile("batchnorm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests for Keras: each takes half a minute, and at the end, the other workers would wait for it."""
    items.sort(key=lambda item: item.path.parent.name != "keras")


def pytest_collection_finish() -> None:
    """Exclude what was imported and collected from garbage collection, which visits it seldom but for half a second."""
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 50)  # otherwise more often, as the rest is small


@pytest.fixture(autouse=True)
def _fresh_global_state() -> Iterator[None]:
    """Seeds the global generators, and puts back what a test may change for the whole process."""
    random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def nothing_compiled_before() -> Iterator[None]:
    """Forget compiled code before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
