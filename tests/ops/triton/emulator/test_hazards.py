"""Each hazard, planted in a short program, is found; the same program without it runs."""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton.emulator.device import Device
from tests.ops.triton.emulator.faults import Fault, Unsupported
from tests.ops.triton.emulator.programs import run

ADDRESS = "shl.b32 %r2, %r0, 2; cvt.u64.u32 %d9, %r2; add.s64 %d8, %d0, %d9;"  # of the thread's value of tensor 0


def test_each_thread_reads_and_writes_its_value() -> None:
    x = torch.arange(32.0)
    run(ADDRESS + "ld.global.b32 %r3, [%d8]; add.f32 %r3, %r3, 0f3F800000; st.global.b32 [%d8], %r3;", x)
    assert torch.equal(x, torch.arange(32.0) + 1)


@pytest.mark.parametrize("instruction", ["ld.global.b32 %r3, [%d8]", "st.global.b32 [%d8], %r3"])
def test_an_access_past_the_end_is_found(instruction: str) -> None:
    run(ADDRESS + f"{instruction};", torch.zeros(32))
    with pytest.raises(Fault, match=r"accesses 4 bytes at byte 124 of tensor0, which has 124 bytes, out of bounds"):
        run(ADDRESS + f"{instruction};", torch.zeros(32)[:31])


def test_an_access_before_the_start_is_found() -> None:
    with pytest.raises(Fault, match=r"accesses 4 bytes at byte -4 of tensor0, which has 124 bytes, out of bounds"):
        run("ld.global.b32 %r3, [%d0+-4];", torch.zeros(32)[1:])


def test_an_access_past_one_tensor_never_reaches_another() -> None:
    whole = torch.zeros(64)
    with pytest.raises(Fault, match=r"byte 128 of tensor0, which has 128 bytes, out of bounds"):
        run("ld.global.b32 %r3, [%d0+128];", whole[:32], whole[32:])


def test_an_address_near_no_tensor_is_found() -> None:
    with pytest.raises(Fault, match=r"accesses 4 bytes at 0x40, which is near no argument, out of bounds"):
        run("mov.b64 %d5, 64; ld.global.b32 %r3, [%d5];", torch.zeros(32))


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d8]",
        "st.global.v4.b32 [%d8], {%r4, %r5, %r6, %r7}",
        "cp.async.cg.shared.global [global_smem], [%d8], 16",
    ],
)
def test_a_misaligned_vector_access_is_found(instruction: str) -> None:
    aligned = "and.b32 %r2, %r0, 0; cvt.u64.u32 %d9, %r2; add.s64 %d8, %d0, %d9;"
    run(f"setp.eq.b32 %p0, %r0, 0; {aligned} @%p0 {instruction};", torch.zeros(64), shared=16)
    with pytest.raises(Fault, match=r"accesses 16 bytes at the misaligned address byte 4 of tensor0"):
        run(f"setp.eq.b32 %p0, %r0, 1; {ADDRESS} @%p0 {instruction};", torch.zeros(64), shared=16)


def test_uninitialized_global_memory_is_found() -> None:
    device = Device()
    with device.allocations:
        x, zeros = torch.empty(32), torch.empty(32).zero_()
    run(ADDRESS + "ld.global.b32 %r3, [%d8];", zeros, device=device)
    with pytest.raises(Fault, match=r"ld.global.b32 .* reads uninitialized memory"):
        run(ADDRESS + "ld.global.b32 %r3, [%d8];", x, device=device)
    run(ADDRESS + "setp.lt.s32 %p0, %r0, 31; @%p0 st.global.b32 [%d8], %r3;", x, device=device)
    run("ld.global.b32 %r3, [%d0+120];", x, device=device)
    with pytest.raises(Fault, match=r"The result has 1 values of 32 that nothing has written"):
        device.allocations.check_written(x, "The result")
    with pytest.raises(Fault, match=r"argument of aten.add.Tensor has 1 values"), device.allocations:
        x.add(1.0)


SHARED = "shl.b32 %r2, %r0, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;"  # the address of the thread's value
MIRRORED = "xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 2; add.s32 %r5, %r3, %r5;"  # of a thread of another warp


def test_uninitialized_shared_memory_is_found() -> None:
    run(SHARED + "st.shared.b32 [%r4], %r0; ld.shared.b32 %r6, [%r4];", shared=128)
    with pytest.raises(Fault, match=r"reads uninitialized memory"):
        run(SHARED + "ld.shared.b32 %r6, [%r4];", shared=128)


def test_an_access_outside_of_shared_memory_is_found() -> None:
    with pytest.raises(Fault, match=r"accesses shared memory out of bounds: 4 bytes between 0 and 124 of 124 bytes"):
        run(SHARED + "st.shared.b32 [%r4], %r0;", shared=124)
    with pytest.raises(Fault, match=r"accesses 4 bytes at the misaligned address 2 of shared memory"):
        run("st.shared.b32 [global_smem+2], %r0;", shared=128)


RACES = {
    "read after write": ("st.shared.b32 [%r4], %r0", "ld.shared.b32 %r6, [%r5]"),
    "write after read": ("ld.shared.b32 %r6, [%r4]", "st.shared.b32 [%r5], %r0"),
    "write after write": ("st.shared.b32 [%r4], %r0", "st.shared.b32 [%r5], %r0"),
}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("race", RACES)
def test_a_race_in_shared_memory_without_a_barrier_is_found(race: str, seed: int | None) -> None:
    first, second = RACES[race]
    prepare = SHARED + MIRRORED + "st.shared.b32 [%r4], %r0; bar.sync 0;"
    run(f"{prepare} {first}; bar.sync 0; {second};", threads=64, shared=256, seed=seed)
    with pytest.raises(
        Fault, match=r"is a data race: warp . of program 0 .* what warp . of program 0 .* nothing orders"
    ):
        run(f"{prepare} {first}; {second};", threads=64, shared=256, seed=seed)


@pytest.mark.parametrize("seed", [None, *range(4)])
def test_warps_may_write_one_value_to_one_address_but_not_two(seed: int | None) -> None:
    run("st.shared.b32 [global_smem], 7;", threads=64, shared=16, seed=seed)
    with pytest.raises(Fault, match=r"is a data race"):
        run(
            "shr.u32 %r3, %r0, 5; add.s32 %r3, %r3, 7; st.shared.b32 [global_smem], %r3;",
            threads=64,
            shared=16,
            seed=seed,
        )


def test_several_readers_race_with_a_later_write() -> None:
    read = SHARED + "st.shared.b32 [%r4], %r0; bar.sync 0; ld.shared.b32 %r6, [global_smem];"
    write = "setp.eq.b32 %p0, %r0, 0; @%p0 st.shared.b32 [global_smem], %r0;"
    run(f"{read} bar.sync 0; {write}", threads=64, shared=256)
    with pytest.raises(Fault, match=r"warp 0 of program 0 writes what several warps of program 0 read"):
        run(f"{read} {write}", threads=64, shared=256)


def test_a_race_in_global_memory_within_a_program_is_found() -> None:
    read, write = "ld.global.b32 %r3, [%d0];", "setp.eq.b32 %p0, %r0, 0; @%p0 st.global.b32 [%d0], %r0;"
    run(f"{read} bar.sync 0; {write}", torch.ones(1), threads=64)
    with pytest.raises(Fault, match=r"writes what several warps of program 0 read"):
        run(read + write, torch.ones(1), threads=64)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("st.global.b32 [%d0], %r1", "ld.global.b32 %r4, [%d0]", "reads what warp 0 of program 0 wrote"),
        ("ld.global.b32 %r4, [%d0]", "st.global.b32 [%d0], %r1", "writes what warp 0 of program 0 read"),
        ("st.global.b32 [%d0], %r1", "st.global.b32 [%d0], %r1", "writes what warp 0 of program 0 wrote"),
    ],
)
def test_a_race_between_programs_is_found(first: str, second: str, what: str) -> None:
    body = f"setp.eq.b32 %p0, %r1, 0; setp.eq.b32 %p1, %r1, 1; @%p0 {first}; @%p1 {second};"
    run(body, torch.ones(1), programs=1)
    with pytest.raises(Fault, match=f"is a data race: warp 0 of program 1 {what}, and nothing orders them"):
        run(body, torch.ones(1), programs=2)


def test_two_threads_that_write_different_values_at_once_are_found() -> None:
    run("st.global.b32 [%d0], %r1;", torch.ones(1))
    with pytest.raises(Fault, match=r"two threads write different values to one address at once"):
        run("st.global.b32 [%d0], %r0;", torch.ones(1))


COPY = SHARED + "cvt.u64.u32 %d9, %r2; add.s64 %d8, %d0, %d9; cp.async.ca.shared.global [%r4], [%d8], 4, {count};"


def test_an_asynchronous_copy_arrives_after_its_wait() -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    copies = COPY.format(count="%r7") + "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    result = "ld.shared.b32 %r6, [%r5]; add.s64 %d7, %d1, %d9; st.global.b32 [%d7], %r6;"
    run("mov.b32 %r7, 4;" + copies + MIRRORED + result, x, y, threads=64, shared=256)
    assert torch.equal(y, x.roll(32))
    run("mov.b32 %r7, 0;" + copies + MIRRORED + result, x, y, threads=64, shared=256)
    assert torch.equal(y, torch.zeros(64))


@pytest.mark.parametrize(
    ("after", "what"),
    [
        ("ld.shared.b32 %r6, [%r4]", "reads memory that an asynchronous copy may not have written yet"),
        ("cp.async.commit_group; ld.shared.b32 %r6, [%r4]", "reads memory that an asynchronous copy"),
        ("cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r6, [%r4]", "reads memory that an asynchronous"),
        ("cp.async.wait_group 0; ld.shared.b32 %r6, [%r4]", "reads memory that an asynchronous"),
        ("cp.async.commit_group; st.shared.b32 [%r4], %r0", "writes memory that an asynchronous copy"),
        (
            "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r6, [%r5]",
            "is a data race: warp 0 .* reads what",
        ),
    ],
)
def test_a_read_of_an_asynchronous_copy_before_its_wait_and_barrier_is_found(after: str, what: str) -> None:
    with pytest.raises(Fault, match=what):
        run(COPY.format(count="4") + MIRRORED + after + ";", torch.zeros(64), threads=64, shared=256)


def test_only_the_awaited_groups_of_copies_arrive() -> None:
    two = (
        COPY.format(count="4") + "cp.async.commit_group; add.s32 %r8, %r4, 128;"
        "cp.async.ca.shared.global [%r8], [%d8], 4; cp.async.commit_group; cp.async.wait_group 1;"
    )
    run(two + "ld.shared.b32 %r6, [%r4];", torch.zeros(32), shared=256)
    with pytest.raises(Fault, match="asynchronous copy"):
        run(two + "ld.shared.b32 %r6, [%r8];", torch.zeros(32), shared=256)


def test_a_barrier_that_some_threads_skip_is_found() -> None:
    with pytest.raises(Fault, match=r"kernel: threads wait at a barrier that other threads never reach"):
        run("setp.lt.s32 %p0, %r0, 32; @%p0 bar.sync 0;", threads=64)
    with pytest.raises(Fault, match=r"threads wait while others of their program wait at another"):
        run("setp.lt.s32 %p0, %r0, 32; @%p0 bar.sync 0; @!%p0 bar.sync 0;", threads=64)


def test_a_shuffle_by_a_part_of_a_warp_is_found() -> None:
    with pytest.raises(Fault, match=r"needs all threads of a warp, but only a part of them executes it"):
        run("setp.lt.s32 %p0, %r0, 16; @%p0 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;")


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("frobnicate.b32 %r3, %r0", "does not know this instruction"),
        ("add.sat.f32 %r3, %r0, %r0", "does not know this instruction"),
        ("add.rz.f32 %r3, %r0, %r0", "does not know this instruction"),
        ("cvt.rzi.s32.f32 %r3, %r0", "does not know the conversion"),
        ("mov.b32 %r3, %clock", "does not know the operand '%clock'"),
        ("add.s32 %r3, %r0", "expects 2 operands, got 1"),
        ("add.s64 %r3, %d0, %d0", "expects a register for s64, got %r3"),
        ("bar.sync 1", "knows only the barrier 0"),
    ],
)
def test_an_unknown_instruction_is_an_error_that_names_it(statement: str, what: str) -> None:
    with pytest.raises(Unsupported, match=what) as caught:
        run(statement + ";", torch.zeros(1))
    assert f"kernel: `{statement}`" in str(caught.value)
