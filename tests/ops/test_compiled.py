"""Loading of the compiled operators, and the reports and warnings if they do not load."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchnorm
from batchnorm._frameworks import is_installed
from batchnorm.compiled import Kernels, kernels
from batchnorm.ops import compiled
from batchnorm.ops.schemas import SIGNATURES

needs_compiled = pytest.mark.skipif(not compiled.cpu_capabilities(), reason="no compiled operators in this build")


def in_new_process(
    capability: str, code: str = "print(batchnorm.backends()['cpu'])"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import torch, batchnorm; {code}"],
        env={**os.environ, compiled.CAPABILITY: capability},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.skipif(shutil.which("c++") is None or os.environ.get(compiled.CAPABILITY) == "eager", reason="no compiler")
def test_compiled_operators_exist_if_there_is_a_compiler() -> None:
    assert batchnorm.backends()["cpu"] == f"compiled: {compiled.cpu_capability()}"


def test_backends_prints_a_line_for_each_device_and_hint() -> None:
    found = batchnorm.backends()
    assert list(found) == ["cpu", "cpu autograd", "cuda", "other"] + ["jax"] * is_installed("jax")
    assert len(str(found).splitlines()) == len(found) + len(found.hints)


@needs_compiled
def test_the_best_instruction_set_is_chosen_and_another_by_name() -> None:
    before = compiled.cpu_capability()
    try:
        for name in compiled.cpu_capabilities():
            compiled.set_cpu_capability(name)
            assert compiled.cpu_capability() == name
    finally:
        compiled.set_cpu_capability(before)
    with pytest.raises(ValueError, match=r"set_cpu_capability expects one of .*, got 'sse9'. Choose"):
        compiled.set_cpu_capability("sse9")


@needs_compiled
def test_the_environment_chooses_at_load() -> None:
    worst = compiled.cpu_capabilities()[-1]
    result = in_new_process(worst)
    assert result.stdout.strip() == f"compiled: {worst}"
    assert result.stderr == ""


@needs_compiled
def test_an_unknown_instruction_set_gives_a_warning_and_the_best_one() -> None:
    result = in_new_process("sse9")
    assert result.stdout.strip() == f"compiled: {compiled.cpu_capabilities()[0]}"
    assert "BATCHNORM_CPU_CAPABILITY must name an instruction set" in result.stderr
    assert "got 'sse9'" in result.stderr


def test_eager_is_chosen_without_a_warning_and_computes_the_same() -> None:
    result = in_new_process(
        "eager",
        "print(batchnorm.backends()['cpu']); torch.manual_seed(0);"
        "print(batchnorm.BatchNorm1d(3)(torch.randn(5, 3)).sum(0).abs().max().item() < 1e-6)",
    )
    assert result.stdout.splitlines() == ["eager: BATCHNORM_CPU_CAPABILITY=eager", "True"]
    assert result.stderr == ""


def test_without_a_library_the_reason_is_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiled.CAPABILITY, raising=False)
    state = compiled._Compiled(tmp_path, Kernels(tmp_path))
    assert state.library is None
    assert state.reason == "this build has no kernels (no C++ compiler, or wheel.cmake=false)"


@needs_compiled
def test_without_the_library_for_torch_the_reason_is_the_option(tmp_path: Path) -> None:
    state = compiled._Compiled(tmp_path, kernels())
    assert state.library is None
    assert state.reason == "built with BATCHNORM_TORCH=OFF"


@needs_compiled
@pytest.mark.parametrize("name", ["batchnorm_kernels", "batchnorm_cpu"])
def test_a_library_that_does_not_load_gives_a_warning_with_the_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compiled.CAPABILITY, raising=False)
    (tmp_path / f"lib{name}.so").write_text("not a library")
    with pytest.warns(
        RuntimeWarning, match=r"plain torch operations, which are slower: .* did not load: .*Reinstall batchnorm"
    ):
        state = compiled._Compiled(tmp_path, Kernels(tmp_path) if name == "batchnorm_kernels" else kernels())
    assert state.library is None
    assert "did not load" in state.reason


NO_SUPPORTED_SET = """
#define __builtin_cpu_supports(name) 0
#define BATCHNORM_WITH_avx512
#include "kernels/dispatch.cpp"
namespace batchnorm::avx512 {
const Kernels float64_kernels{}, float32_kernels{}, bfloat16_kernels{}, float16_kernels{};
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_kernels_without_an_instruction_set_of_the_processor_do_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compiled.CAPABILITY, raising=False)
    (tmp_path / "kernels.cpp").write_text(NO_SUPPORTED_SET)
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{Path(__file__).parents[2] / 'csrc'}", "-o"]
    subprocess.run(["c++", *options, tmp_path / "libbatchnorm_kernels.so", tmp_path / "kernels.cpp"], check=True)
    with pytest.warns(
        RuntimeWarning, match=r"they are built for avx512, which this processor does not have\. Reinstall"
    ):
        state = compiled._Compiled(tmp_path, Kernels(tmp_path))
    assert state.library is None


@needs_compiled
def test_the_compiled_operators_check_all_sizes_that_memory_accesses_depend_on() -> None:
    x, eps = torch.randn(4, 3, 5), (1e-5, "none", 0.0)
    ops = torch.ops.batchnorm
    vector = torch.ones(3)
    for wrong in (
        lambda: ops.train_forward(x, torch.ones(4), None, None, *eps),
        lambda: ops.train_forward(x, None, None, torch.randn(4, 3, 6), *eps),
        lambda: ops.normalize(x, vector, None, torch.ones(2), None, None, None, None, *eps),
        lambda: ops.normalize(x, vector, None, vector, None, None, None, torch.tensor([0, 1]), *eps),
        lambda: ops.moments(x, torch.tensor([0, 1, 2, 7]), None, 3),
        lambda: ops.moments(x, torch.tensor([0, 1, 2, -1]), None, 3),
        lambda: ops.moments(x, None, torch.ones(4, 4), 1),
        lambda: ops.backward_reduce(x[:2], x, None, None, vector, None, vector, None, None, None, 1, *eps),
        lambda: ops.train_forward(x, None, None, None, 1e-5, "selu", 0.0),
    ):
        with pytest.raises(RuntimeError, match="batchnorm expects|expects"):
            wrong()


@needs_compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_a_refused_call_leaks_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def refuse() -> None:
        for name, signature in SIGNATURES.items():
            if "activation" in signature.arguments:
                given = [values.get(argument, wrong) for argument in signature.arguments]
                with pytest.raises(RuntimeError, match="batchnorm expects"):
                    getattr(torch.ops.batchnorm, name)(*given)

    wrong = torch.ones(7)  # x without a channel dimension; every other argument with a shape different from x's
    values = {"eps": 1e-5, "activation": "none" + "x" * 1_000_000, "negative_slope": 0.0, "need_dz": True, "groups": 1}
    refuse()
    before = resident()
    for _ in range(25):
        refuse()
    assert resident() - before < 15_000_000  # if one operator leaked the name, 25 MB
