"""Find the program that finishes last among those whose results it merges.

Splits are merged in a tree: the last of FAN neighbors merges their results and goes on in their place. Which program is
the last differs between runs, but the order of every sum does not.
"""

import triton
import triton.language as tl

# The most results that one program merges; 1,024 splits take two levels.
FAN: tl.constexpr = tl.constexpr(32)


@triton.jit
def neighbors(position, number):
    """Return the group of a result among `number`, its first member, how many it has, and how many groups there are."""
    group = position // FAN
    return group, group * FAN, tl.minimum(number - group * FAN, FAN), tl.cdiv(number, FAN)


@triton.jit
def is_last(counter_ptr, members):
    """Return whether this program is the last of `members` to come here. It can read what all of them have stored.

    The counter is 0 before and after.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == members - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.constexpr_function
def by_lines(rows, group):
    """Return whether a merge runs along axis 0, as the channels of a block are on axis 1."""
    return rows and group == 0


@triton.constexpr_function
def axis_of(rows, group):
    """Return the axis of a merge, None for the whole tile."""
    return 0 if by_lines(rows, group) else 1 if group > 0 else None


@triton.constexpr_function
def step_of(rows, group, b1):
    """Return how many results of a block are loaded at once: so few that they take no more registers than a loop."""
    channels = b1 if by_lines(rows, group) else max(group, 1)
    return max(min(32, 512 // channels), 1)


@triton.jit
def members_of(begin, start, members, ROWS: tl.constexpr, GROUP: tl.constexpr, B1: tl.constexpr):
    """Return the rows of some members' results from `start` on, along the axis of a merge, and a mask."""
    step: tl.constexpr = step_of(ROWS, GROUP, B1)
    lines: tl.constexpr = by_lines(ROWS, GROUP)
    member = start + tl.arange(0, step)
    member = member[:, None] if lines else member[None, :]
    return begin + member, member < members
