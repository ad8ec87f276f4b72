"""The analysis of compiled kernels: what it compiles, and what it reads from machine code."""

from __future__ import annotations

import importlib
import itertools
import pkgutil

import pytest
import torch

pytest.importorskip("triton")

from batchnorm.ops.schemas import SCHEMAS
from batchnorm.ops.triton import OPERATORS, kernels
from benchmarks.gpu import every_kernel
from benchmarks.gpu.layers import Case
from benchmarks.gpu.static import command, sass, space, table
from benchmarks.gpu.static.compiling import Launch, launches, training_step
from benchmarks.gpu.static.covering import covering
from benchmarks.gpu.static.sass import Cost

# A loop that loads two tiles, whose masked version and whose slow path it need not take; then a store and the end.
CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   ISETP.GE.AND P1, PT, R0, R1, PT ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0050*/               @P2 LDGSTS.E.BYPASS.128 [R2], desc[UR6][R12.64], P1 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/              @!P3 LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0080*/                   FADD R1, R1, R4 ;
        /*0090*/                   FADD R1, R1, R4 ;
.L_x_3:
        /*00a0*/              @!P4 BRA `(.L_x_4) ;
        /*00b0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*00c0*/                   MOV R1, R2 ;
.L_x_4:
        /*00d0*/                   FFMA R1, R1, R4, R5 ;
        /*00e0*/               @P0 BRA `(.L_x_1) ;
.L_x_9:
        /*00f0*/                   STG.E.64 desc[UR6][R16.64], R12 ;
        /*0100*/                   EXIT ;
.L_x_10:
        /*0110*/                   BRA `(.L_x_10);
"""


def test_a_warps_path_takes_full_tiles_and_no_slow_path() -> None:
    once, loop = sass.costs(CODE)
    assert loop == Cost(instructions=8, loaded=32)
    assert once == Cost(instructions=4, stored=8)


def test_a_loop_that_ends_at_its_first_instruction() -> None:
    code = """
.L_x_1:
        /*0000*/              @!P0 BRA `(.L_x_2) ;
        /*0010*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0020*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0040*/                   EXIT ;
"""
    assert sass.costs(code) == (Cost(2, 0, 4), Cost(3, 4))


def test_code_without_a_loop_or_without_an_end() -> None:
    straight = "/*0000*/ LDG.E R4, desc[UR6][R2.64] ;\n/*0010*/ @P0 EXIT ;\n/*0020*/ STG.E.U8 desc[UR6][R2.64], R4 ;\n"
    assert sass.costs(straight + "/*0030*/ EXIT ;") == (Cost(4, 4, 1), Cost())
    with pytest.raises(ValueError, match="must hold a kernel with an EXIT"):
        sass.costs("no code")


@pytest.fixture(scope="module")
def streamed() -> list[Launch]:
    with launches("sm_90") as found:
        training_step(Case((32, 64, 56, 56), "contiguous", "bfloat16", False))
    return found


def test_the_main_loop_of_a_real_kernel_reads_a_whole_tile(streamed: list[Launch]) -> None:
    for launch in streamed:
        read, _ = launch.tensors()
        if read:
            _, loop = sass.disassembled(launch.kernel.asm["cubin"])
            tile = launch.arguments["B0"] * launch.arguments["B1"] * sum(t.itemsize for t in read)
            assert loop.loaded > 0
            assert loop.loaded * 32 * launch.warps % tile == 0


def test_padding_counts_as_work() -> None:
    x = torch.empty(40, 8, 7, 7, device="meta")
    arguments = {"x_ptr": x, "ROWS": True, "GROUP": 4, "channels": 8, "positions": 49, "B1": 256}
    launch = Launch("moments", 8, arguments, 4, None)
    assert table.padding(launch) == pytest.approx(256 / (4 * 49))
    once, loop = Cost(instructions=100), Cost(instructions=64, loaded=16)  # four values of four bytes
    assert table.instructions_a_value(launch, once, loop) == pytest.approx(16 * table.padding(launch))
    assert table.instructions_a_value(launch, once, Cost()) == pytest.approx(100 * 32 * 4 * 8 / x.numel())
    rows = Launch("moments", 8, {"ROWS": True, "GROUP": 0, "channels": 48, "B1": 64}, 4, None)
    assert table.padding(rows) == pytest.approx(64 / 48)


def test_a_kernel_above_its_limit_is_reported_with_both_figures() -> None:
    row = {"architecture": "sm_90", "kernel": "moments", "shape": "1", "layout": "contiguous", "dtype": "float32",
           "registers": 41, "spilled_bytes": 0, "instructions_a_value": 6.0}  # fmt: skip
    (limit,) = table.limits_of([row])
    assert (limit["registers"], limit["instructions_a_value"]) == (48, 6.3)
    assert table.exceeded([row, {**row, "registers": 48}], [limit]) == []
    name = "sm_90 moments 1 contiguous float32"
    assert table.exceeded([{**row, "spilled_bytes": 8}], [limit]) == [f"{name}: 8 spilled_bytes, the limit is 0"]
    assert table.exceeded([{**row, "kernel": "other"}], [limit]) == ["sm_90 other 1 contiguous float32: no limits"]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_covering_has_every_combination(strength: int) -> None:
    factors = {"a": range(5), "b": "xyz", "c": (True, False), "d": (True, False)}
    found = covering(factors, strength)
    for names in itertools.combinations(factors, strength):
        wanted = set(itertools.product(*(factors[name] for name in names)))
        assert {tuple(choice[name] for name in names) for choice in found} == wanted
    assert len(found) < 5 * 3 * 2 * 2


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_argument_that_may_be_absent_is_a_factor(operator: str) -> None:
    factors = space.factors(operator)
    for declaration in SCHEMAS[operator].split(" -> ")[0].strip("()").split(", "):
        kind, name = declaration.split()
        assert (name in factors) == (kind.endswith("?") or kind == "bool" or name == "activation")


def test_the_script_for_a_sanitizer_starts_every_kernel() -> None:
    with launches("sm_90", frontend=True) as found:
        assert every_kernel.main("meta") == len(space.calls(1))
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    names = {name.removesuffix("_kernel") for m in modules for name in vars(m) if name.endswith("_kernel")}
    assert {each.name for each in found} >= names - {"smallest"}  # which no operator starts


def test_a_variant_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {name: values[0] for name, values in space.factors("moments").items()}
    monkeypatch.setattr(
        space,
        "calls",
        lambda strength: [("moments", {**choice, "dtype": dtype}) for dtype in (torch.float32, torch.complex64)],
    )
    (line,) = command.Compilation("sm_90", True, 1).failures()
    assert line.startswith("moments {'dtype': torch.complex64")
    monkeypatch.setattr(command, "_in_process", lambda number, path: (f"{number} with {path}", [line]))
    monkeypatch.setattr(table, "table_cases", list)
    assert len(command.compile_space([None, "other"])) == 2 * len(command.COMPILATIONS)
