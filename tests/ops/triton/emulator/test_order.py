"""Programs that exchange values through atomics and fences, in many orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.triton.emulator.device import Device
from tests.ops.triton.emulator.faults import Fault
from tests.ops.triton.emulator.programs import run
from tests.ops.triton.emulator.schedule import Schedule

PROGRAMS, THREADS = 5, 64
ORDERS = [None, *range(6)]

# Every program writes its values and takes a ticket; the last to take one adds up all values, and resets the tickets.
STORE = """
mad.lo.s32 %r2, %r1, 64, %r0;
mul.wide.s32 %d9, %r2, 4;
add.s64 %d8, %d0, %d9;
st.global.b32 [%d8], %r2;
"""
TICKET = """
setp.eq.b32 %p0, %r0, 0;
@%p0 atom.global.gpu.acq_rel.add.u32 %r3, [%d1], 1;
"""
SHARE = """
@%p0 st.shared.b32 [global_smem], %r3;
bar.sync 0;
ld.shared.b32 %r3, [global_smem];
"""
MERGE = """
setp.ne.b32 %p1, %r3, 4;
@%p1 bra $L__end;
mov.b32 %r4, 0;
mov.b32 %r5, 0;
$L__next:
mad.lo.s32 %r6, %r5, 64, %r0;
mul.wide.s32 %d9, %r6, 4;
add.s64 %d8, %d0, %d9;
ld.global.b32 %r7, [%d8];
add.s32 %r4, %r4, %r7;
add.s32 %r5, %r5, 1;
setp.lt.s32 %p2, %r5, 5;
@%p2 bra $L__next;
mul.wide.s32 %d9, %r0, 4;
add.s64 %d8, %d2, %d9;
st.global.b32 [%d8], %r4;
@%p0 st.global.b32 [%d1], 0;
$L__end:
"""
BARRIER = "bar.sync 0;"


def merged(body: str, seed: int | None, device: Device | None = None) -> tuple[Tensor, Tensor]:
    parts = torch.zeros(PROGRAMS * THREADS, dtype=torch.int32)
    tickets, sums = torch.zeros(1, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    run(body, parts, tickets, sums, threads=THREADS, programs=PROGRAMS, shared=16, seed=seed, device=device)
    return sums, tickets


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("release", ["atomic", "fences"])
def test_the_last_program_merges_the_parts_of_all(seed: int | None, release: str) -> None:
    ticket = TICKET
    if release == "fences":
        fence = "fence.acq_rel.gpu;"
        ticket = fence + TICKET.replace("acq_rel", "relaxed") + fence
    sums, tickets = merged(STORE + BARRIER + ticket + SHARE + MERGE, seed)
    assert torch.equal(
        sums, torch.arange(PROGRAMS * THREADS, dtype=torch.int32).reshape(PROGRAMS, THREADS).sum(0).int()
    )
    assert tickets.item() == 0


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize(
    "body",
    [
        STORE + TICKET + SHARE + MERGE,
        STORE + BARRIER + TICKET.replace("acq_rel", "relaxed") + SHARE + MERGE,
        STORE + BARRIER + TICKET.replace("acq_rel", "acquire") + SHARE + MERGE,
        STORE + BARRIER + TICKET.replace("acq_rel", "release") + SHARE + MERGE,
        STORE + BARRIER + TICKET.replace("gpu", "cta") + SHARE + MERGE,
        STORE + BARRIER + TICKET.replace("acq_rel", "relaxed") + "fence.acq_rel.gpu;" + SHARE + MERGE,
        TICKET + STORE + BARRIER + SHARE + MERGE,
    ],
    ids=["no barrier", "relaxed", "no release", "no acquire", "narrow", "no fence before", "ticket first"],
)
def test_a_merge_without_its_barrier_release_or_acquire_is_found(body: str, seed: int | None) -> None:
    with pytest.raises(
        Fault, match=r"is a data race: .* reads what warp . of program \d wrote, and nothing orders them"
    ):
        merged(body, seed)


def test_a_counter_that_is_read_without_an_atomic_is_found() -> None:
    with pytest.raises(Fault, match=r"reads what warp . of program 0 wrote"):
        merged(
            "setp.eq.b32 %p0, %r1, 0; @%p0 atom.global.gpu.acq_rel.add.u32 %r3, [%d1], 1; ld.global.b32 %r3, [%d1];",
            None,
        )


def test_in_a_random_order_every_program_is_the_last_once_and_an_order_dependence_changes_the_result() -> None:
    add = "setp.eq.b32 %p0, %r0, 0; @%p0 atom.global.gpu.relaxed.exch.b32 %r3, [%d1], %r1;"
    last = {int(merged(add, seed)[1]) for seed in range(40)}
    assert last == set(range(PROGRAMS))


def test_the_same_seed_gives_the_same_order() -> None:
    add = "setp.eq.b32 %p0, %r0, 0; @%p0 atom.global.gpu.relaxed.exch.b32 %r3, [%d1], %r1;"
    assert [int(merged(add, seed)[1]) for seed in range(9)] == [int(merged(add, seed)[1]) for seed in range(9)]


@pytest.mark.parametrize(
    ("operation", "operands", "expected"),
    [
        ("add.u32", "3", 10), ("add.s32", "-3", 4), ("exch.b32", "9", 9), ("cas.b32", "7, 5", 5),
        ("cas.b32", "6, 5", 7),
        ("and.b32", "3", 3), ("or.b32", "8", 15), ("xor.b32", "1", 6), ("min.s32", "-2", -2), ("max.u32", "8", 8),
    ],
)  # fmt: skip
def test_an_atomic_returns_the_old_value_and_stores_the_new(operation: str, operands: str, expected: int) -> None:
    x = torch.tensor([7, 0], dtype=torch.int32)
    kind = operation.split(".")[1]
    run(
        f"setp.eq.b32 %p0, %r0, 0; @%p0 atom.global.gpu.acq_rel.{operation} %r3, [%d0], {operands};"
        f"@%p0 st.global.{kind.replace('s', 'b').replace('u', 'b')} [%d0+4], %r3;",
        x,
    )
    assert x.tolist() == [expected, 7]


def test_atomics_of_all_threads_count_every_one() -> None:
    for seed in (None, 3):
        x = torch.zeros(1, dtype=torch.int32)
        run("atom.global.gpu.relaxed.add.u32 %r3, [%d0], 1;", x, threads=64, programs=3, seed=seed)
        assert x.item() == 192


def test_a_chosen_program_runs_alone() -> None:
    x = torch.zeros(9, dtype=torch.int32)
    body = "mul.wide.s32 %d9, %r1, 4; add.s64 %d8, %d0, %d9; st.global.b32 [%d8], 1;"
    run(body, x, programs=9, device=Device(programs=lambda name, grid: [2, grid - 1]))
    assert x.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1]


def test_threads_that_go_different_ways_meet_again() -> None:
    body = """
    setp.lt.s32 %p0, %r0, 5;
    @%p0 bra $L__small;
    mov.b32 %r3, 100;
    bra.uni $L__both;
    $L__small:
    mov.b32 %r3, 1;
    $L__loop:
    add.s32 %r3, %r3, %r3;
    setp.lt.s32 %p1, %r3, %r0;
    @%p1 bra $L__loop;
    $L__both:
    bar.sync 0;
    mul.wide.s32 %d9, %r0, 4; add.s64 %d8, %d0, %d9; st.global.b32 [%d8], %r3;
    """
    for seed in (None, 0, 1):
        x = torch.zeros(64, dtype=torch.int32)
        run(body, x, threads=64, seed=seed)
        assert x.tolist() == [2, 2, 2, 4, 4, *[100] * 59]


def test_schedules_run_every_program_once() -> None:
    for seed in (None, 5):
        places = [int(p) for batch in Schedule(seed).batches(300, 128) for p in batch]
        assert sorted(places) == list(range(300))
