"""Instructions that move values: between registers, the threads of a warp, and shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.ops.triton.emulator.programs import run


def test_moves_split_and_join_registers() -> None:
    x = torch.zeros(3, dtype=torch.int32)
    run(
        "mov.b32 {%h0, %h1}, 0x12345678; mov.b32 %r2, {%h1, %h0}; st.global.b32 [%d0], %r2;"
        "mov.b64 %d5, {%r2, %r0}; mov.b64 {%r3, _}, %d5; st.global.b32 [%d0+4], %r3; mov.b16 %h2, -1;"
        "cvt.s32.s16 %r4, %h2; st.global.b32 [%d0+8], %r4;",
        x,
    )
    assert x.tolist() == [0x56781234, 0x56781234, -1]


def test_loads_extend_bytes_by_zeros() -> None:
    x = torch.zeros(2, dtype=torch.int32)
    run(
        "mov.b16 %h0, 0x1F7; st.shared.b8 [global_smem], %h0; ld.shared.b8 %h1, [global_smem]; cvt.u32.u16 %r2, %h1;"
        "st.global.b32 [%d0], %r2; st.shared.v2.b8 [global_smem+2], {%h0, %h1}; ld.shared.b16 %r3, [global_smem+2];"
        "st.global.b32 [%d0+4], %r3;",
        x, shared=16,
    )  # fmt: skip
    assert x.tolist() == [0xF7, 0xF7F7]


@pytest.mark.parametrize(
    ("mode", "by", "expected"),
    [
        ("bfly", 16, lambda t: t ^ 16), ("idx", 3, lambda t: 3),
        ("down", 4, lambda t: t + 4 if t + 4 < 32 else t),
        ("up", 4, lambda t: t - 4 if t >= 4 else t),
    ],
)  # fmt: skip
def test_shuffles_read_other_threads(mode: str, by: int, expected: Callable[[int], int]) -> None:
    x = torch.zeros(64, dtype=torch.int32)
    clamp = 0 if mode == "up" else 31
    body = f"shfl.sync.{mode}.b32 %r3, %r0, {by}, {clamp}, -1; mul.wide.s32 %d9, %r0, 4; add.s64 %d8, %d0, %d9;"
    run(body + "st.global.b32 [%d8], %r3;", x, threads=64)
    assert x.tolist() == [first + expected(t) for first in (0, 32) for t in range(32)]


def test_a_sum_over_a_warp_reaches_all_its_threads() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    body = "redux.sync.add.s32 %r3, %r0, -1; mul.wide.s32 %d9, %r0, 4; add.s64 %d8, %d0, %d9; st.global.b32 [%d8], %r3;"
    run(body, x, threads=64)
    assert x.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_matrices_are_stored_and_loaded_by_rows_of_eight_values(number: int, trans: str) -> None:
    x = torch.zeros(number * 64, dtype=torch.int16)
    fragments = ", ".join(f"%r{10 + i}" for i in range(number))
    values = "".join(  # a thread has the values 2t and 2t + 1 of each matrix
        f"mad.lo.s32 %r3, %r0, 2, {64 * i}; add.s32 %r4, %r3, 1; shl.b32 %r4, %r4, 16; or.b32 %r{10 + i}, %r3, %r4;"
        for i in range(number)
    )
    matrix = f"sync.aligned.m8n8.x{number}{{}}.shared.b16"
    copy = "mul.wide.s32 %d9, %r0, 4; add.s64 %d8, %d0, %d9;" + "".join(
        f"st.global.b32 [%d8+{128 * i}], %r{20 + i};" for i in range(number)
    )
    loaded = ", ".join(f"%r{20 + i}" for i in range(number))
    run(
        f"shl.b32 %r2, %r0, 4; {values} stmatrix.{matrix.format(trans)} [%r2], {{{fragments}}}; bar.sync 0;"
        f"ldmatrix.{matrix.format('')} {{{loaded}}}, [%r2]; {copy}",
        x, shared=512,
    )  # fmt: skip
    stored = np.arange(number * 64).reshape(number, 8, 8)
    expected = stored.swapaxes(1, 2) if trans else stored
    np.testing.assert_array_equal(x.numpy(), expected.ravel())
