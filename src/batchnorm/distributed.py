"""What the processes of a group tell one another: moments in forward, sums of gradients in backward.

Each is one collective. Messages of different sizes must never meet: gloo answers them with `abort()`, NCCL with
waiting. So before a kind of layer communicates for the first time, the processes compare by the group's store, which
is no collective, whether all are in that kind. After that each message tells what it belongs to: in forward the number
of channels and the layer's name, in backward the number of the forward exchange.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = 2.0  # seconds in which the others of a group that failed can leave word
_MODULUS = 2**20  # numbers of exchanges; their squares, summed over 8,000 processes, are exact in float64
_HEADER = 2  # values before the moments: how many channels, and the layer's name

Moments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(eq=False)
class Peers:
    """The processes that share one call's statistics.

    Attributes:
        group: Name of their process group.
        kind: Class and size of the layer, the same on all of them: `SyncBatchNorm(64)`.
        name: The layer's path in its model, if known.
        call: The number of the exchange in forward.
    """

    group: str
    kind: str
    name: str = ""
    call: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else self.kind


@dataclass
class _Past:
    """What a group's processes have done together."""

    calls: int = 0
    kinds: set[str] = field(default_factory=set)


_PASTS: WeakKeyDictionary[Any, _Past] = WeakKeyDictionary()


def peers(group: str | None, kind: str, name: str = "") -> Peers | None:
    """The processes of a group, of all where it is None; None where this process is alone."""
    found = _group_of_several(group)
    return None if found is None else Peers(found, kind, name)


def _group_of_several(group: str | None) -> str | None:
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise RuntimeError(
                f"a layer over the process group {group!r} expects torch.distributed to be initialized, got no groups. "
                "Call torch.distributed.init_process_group and new_group, or set its process_group to None."
            )
        return None
    found = dist.group.WORLD if group is None else resolve(group)
    assert found is not None
    return str(found.group_name) if dist.get_world_size(found) > 1 else None


# What torch.compiler.assume_constant_result does, without its import of the compiler.
_group_of_several._dynamo_marked_constant = True  # type: ignore[attr-defined]


def group_name(process_group: Any) -> str | None:
    """The name of a process group of this process; None for None, which stands for all processes.

    Raises:
        ValueError: If this process is not in the group.
        TypeError: If it is not a process group.
    """
    if process_group is None:
        return None
    if dist.is_available():
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group expects a group that this process is in, got one without it "
                "(torch.distributed.new_group returns a placeholder there). Give each process the group that it is in."
            )
        if isinstance(process_group, dist.ProcessGroup):
            return str(process_group.group_name)
    raise TypeError(
        f"process_group expects a torch.distributed process group or None, got {type(process_group).__name__}. "
        "Make one with torch.distributed.new_group(ranks)."
    )


def resolve(group: str) -> Any:
    """The process group of that name.

    Raises:
        RuntimeError: If this process has none.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"a layer over the process group {group!r} expects that group in this process, got none of that name "
            "(groups are not saved with a model). Make it with torch.distributed.new_group and set process_group."
        ) from error


# Failures


def _failure(peers: Peers, group: Any, phase: str, reason: str, named: int | None = None) -> RuntimeError:
    """An error that names layer and processes: what went wrong here, and what the others left word of.

    No word is missed from the rank that the reason has `named`.
    """
    ranks = dist.get_process_group_ranks(group)
    rank = dist.get_rank()
    said: dict[int, str] = {}
    unreachable = ""
    try:
        store = group.get_group_store()
        store.set(f"batchnorm/failure/{rank}", str(peers))
        until = time.monotonic() + PATIENCE
        while True:
            for other in ranks:
                if other != rank and other not in said and store.check([f"batchnorm/failure/{other}"]):
                    said[other] = store.get(f"batchnorm/failure/{other}").decode()
            if len(said) == len(ranks) - 1 or time.monotonic() > until:
                break
            time.sleep(0.02)
    except (RuntimeError, OSError) as error:  # it often lives in rank 0
        unreachable = f" The store where they leave word cannot be reached: {_first_sentence(error)}."
    silent = [str(other) for other in ranks if other not in (rank, named, *said)]
    words = "".join(f" Rank {other} failed in {what}." for other, what in said.items())
    if silent:
        words += f" No word from rank {', '.join(silent)}: it died, still waits, or is elsewhere in its program."
    return RuntimeError(
        f"{peers} on rank {rank} expects all of ranks {', '.join(map(str, ranks))} to exchange {phase} with it, but "
        f"{reason}.{words}{unreachable} Every process must run the same synchronized layers, with the same number of "
        "channels, in the same order."
    )


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__


def _agree(peers: Peers, group: Any, past: _Past) -> None:
    """Make sure, once for each kind of layer, that all processes are in that kind.

    The first to arrive writes its own down, which the others compare with theirs.
    """
    if peers.kind in past.kinds:
        return
    key = f"batchnorm/kind/{len(past.kinds)}"
    try:
        store = group.get_group_store()
        if store.add(f"{key}/arrived", 1) == 1:
            store.set(key, json.dumps([dist.get_rank(), str(peers), peers.kind]))
        rank, layer, kind = json.loads(store.get(key))
    except (RuntimeError, OSError) as error:
        raise _failure(peers, group, "moments", f"the group's store failed with: {_first_sentence(error)}") from error
    if kind != peers.kind:
        raise _failure(peers, group, "moments", f"rank {rank} is in {layer}", named=rank)
    past.kinds.add(peers.kind)


def _collective(peers: Peers, group: Any, phase: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:
        raise _failure(peers, group, phase, f"the collective failed with: {_first_sentence(error)}") from error


def _demand(agree: Tensor, peers: Peers, group: Any, phase: str, reason: Callable[[], str]) -> None:
    """Raise unless `agree`; on a GPU, which the host does not wait for here, by an assertion there."""
    if agree.is_cuda:
        torch._assert_async(agree, f"{peers}: the processes that exchanged {phase} are not in the same layer")
    elif not agree:
        raise _failure(peers, group, phase, reason())


# Forward


def _merged(
    count: Tensor, mean: Tensor, mean_low: Tensor, m2: Tensor, squares: Tensor, peers: Peers
) -> tuple[Tensor, ...]:
    group = resolve(peers.group)
    past = _PASTS.setdefault(group, _Past())
    _agree(peers, group, past)
    past.calls += 1
    peers.call = past.calls % _MODULUS
    wide = count.dtype
    pair = mean.to(wide) + mean_low.to(wide)
    parts = (count, squares, pair, m2.to(wide))
    name = zlib.crc32(peers.name.encode()) if peers.name else 0
    # Filled in place: from the host it would be a copy that waits for a GPU.
    header = [pair.new_full((1,), number) for number in (pair.numel(), name)]
    packet = torch.cat([*header, *(t.reshape(-1) for t in parts)])
    packets = [torch.empty_like(packet) for _ in range(dist.get_world_size(group))]
    _collective(peers, group, "moments", lambda: dist.all_gather(packets, packet, group=group))
    gathered = torch.stack(packets)
    same = gathered[:, 0] == pair.numel()
    if name:  # a compiled layer does not tell its own
        names = gathered[:, 1]
        same &= (names == name) | (names == 0)
    _demand(same.all(), peers, group, "moments", lambda: "others sent those of another layer")
    split = gathered[:, _HEADER:].split([t.numel() for t in parts], 1)
    counts, all_squares, means, m2s = (g.reshape(-1, *t.shape) for g, t in zip(split, parts, strict=True))
    total = counts.sum(0)
    counts = counts.unsqueeze(-1)
    # A process without values may hold anything for a mean: 0·NaN is NaN.
    joint = torch.where(counts > 0, means * counts, 0.0).sum(0) / _positive(total)
    spread = torch.where(counts > 0, counts * (means - joint).square(), 0.0).sum(0)
    high = joint.to(mean.dtype)
    low = (joint - high.to(wide)).to(mean.dtype)
    return total, high, low, (m2s.sum(0) + spread).to(m2.dtype), all_squares.sum(0)


def _merge_gradients(
    kept: tuple[Tensor, ...], dlow: Tensor, dm2: Tensor, total_over: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of this process's mean_low and m2, differentiable themselves; one collective."""
    count, mean, mean_low, total, high, low = kept
    wide = count.dtype
    joint_dlow, joint_dm2 = total_over(torch.stack([dlow, dm2]).to(wide)).unbind()
    through_mean = count.unsqueeze(-1) / _positive(total) * joint_dlow
    through_spread = _spread_slope(count, mean, mean_low, high, low) * joint_dm2
    return (through_mean + through_spread).to(mean_low.dtype), joint_dm2.to(dm2.dtype)


def _spread_slope(count: Tensor, mean: Tensor, mean_low: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """`2·nₖ·(μₖ - μ)`, by which the joint m2 grows with this process's mean."""
    wide = count.dtype
    deviation = (mean.to(wide) - high.to(wide)) + (mean_low.to(wide) - low.to(wide))
    return 2.0 * torch.where(count.unsqueeze(-1) > 0, count.unsqueeze(-1) * deviation, 0.0)


def _positive(count: Tensor) -> Tensor:
    return count.clamp_min(torch.finfo(count.dtype).tiny).unsqueeze(-1)


class _Merge(torch.autograd.Function):
    """`_merged` under autograd, of any order and direction."""

    @staticmethod
    def forward(
        count: Tensor, mean: Tensor, mean_low: Tensor, m2: Tensor, squares: Tensor, peers: Peers
    ) -> tuple[Tensor, ...]:
        return _merged(count, mean, mean_low, m2, squares, peers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        count, mean, mean_low, _, _, peers = inputs
        total, high, low, _, all_squares = output
        ctx.peers, ctx.call = peers, peers.call
        ctx.mark_non_differentiable(total, high, all_squares)
        kept = (count, mean, mean_low, total, high, low)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _, _, dlow, dm2, _ = gradients

        def total_over(t: Tensor) -> Tensor:
            return _Sum.apply(t, ctx.peers, ctx.call)

        kept: tuple[Tensor, ...] = ctx.saved_tensors
        dmean_low, dm2 = _merge_gradients(kept, dlow, dm2, total_over)
        return None, None, dmean_low, dm2, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        _, _, tlow, tm2, _, _ = tangents
        count, mean, mean_low, total, high, low = ctx.saved_tensors
        tlow = tlow.to(count.dtype)
        growth = tm2.to(count.dtype) + _spread_slope(count, mean, mean_low, high, low) * tlow
        tmean, growth = _Sum.apply(torch.stack([count.unsqueeze(-1) * tlow, growth]), ctx.peers, ctx.call).unbind()
        return None, None, (tmean / _positive(total)).to(low.dtype), growth.to(tm2.dtype), None


def merge_moments(count: Tensor, mean: Tensor, mean_low: Tensor, m2: Tensor, squares: Tensor, peers: Peers) -> Moments:
    """Count, mean (as a pair), sum of squared deviations and Σw² of all processes' values together.

    One collective, in float64 whatever the processes' dtypes. They merge in the order of their ranks, so that all have
    the same bits. As in `moments` the derivative runs through mean_low and m2. Section "Merging moments".

    Raises:
        RuntimeError: On every process that is left, if one fails, or is in another layer.
    """
    if torch.compiler.is_compiling():
        *merged, _ = torch.ops.batchnorm.merge_moments(
            count, mean, mean_low, m2, squares, peers.group, peers.kind, peers.name
        )
    else:
        merged = _Merge.apply(count, mean, mean_low, m2, squares, peers)
    total, high, low, joint_m2, all_squares = merged
    return total, high, low, joint_m2, all_squares


# Backward


def _summed(t: Tensor, peers: Peers, call: int) -> Tensor:
    group = resolve(peers.group)
    marks = (call, call * call)
    packet = torch.cat([t.reshape(-1), *(t.new_full((1,), mark) for mark in marks)])
    _collective(peers, group, "gradients", lambda: dist.all_reduce(packet, group=group))
    # The sums of numbers and of their squares are those of equal numbers only if all are equal.
    size = dist.get_world_size(group)
    same = (packet[-2] == size * marks[0]) & (packet[-1] == size * marks[1])
    _demand(same, peers, group, "gradients", lambda: "others sent those of another layer or another call")
    return packet[:-2].reshape(t.shape).clone()


class _Sum(torch.autograd.Function):
    """The sum over the processes, on each of them; its derivative is the same sum."""

    @staticmethod
    def forward(t: Tensor, peers: Peers, call: int) -> Tensor:
        return _summed(t, peers, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.peers, ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient, ctx.peers, ctx.call), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return _Sum.apply(tangent, ctx.peers, ctx.call)


def sum_over(t: Tensor, peers: Peers) -> Tensor:
    """The sum of float64 `t` over the processes that `merge_moments` merged before; one collective.

    Raises:
        RuntimeError: As `merge_moments`.
    """
    return _summed(t, peers, peers.call)


# The same as operators, for what a compiler traces


_MOMENTS = "Tensor count, Tensor mean, Tensor mean_low, Tensor m2, Tensor squares"
_PEERS = "str group, str kind, str name"
_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_LIBRARY.define(f"merge_moments({_MOMENTS}, {_PEERS}) -> ({_MOMENTS}, Tensor call)")
_LIBRARY.define(f"sum_over(Tensor t, Tensor call, {_PEERS}) -> Tensor")


def _merge_moments_operator(*arguments: Any) -> tuple[Tensor, ...]:
    *moments, group, kind, name = arguments
    peers = Peers(group, kind, name)
    count, mean, mean_low, m2, squares = moments
    merged = _merged(count, mean, mean_low, m2, squares, peers)
    return *merged, torch.tensor(peers.call)


def _sum_over_operator(t: Tensor, call: Tensor, group: str, kind: str, name: str) -> Tensor:
    return _summed(t, Peers(group, kind, name), int(call))


_LIBRARY.impl("merge_moments", _merge_moments_operator, "CompositeExplicitAutograd")
_LIBRARY.impl("sum_over", _sum_over_operator, "CompositeExplicitAutograd")


@torch.library.register_fake("batchnorm::merge_moments", lib=_LIBRARY)
def _(count, mean, mean_low, m2, squares, group, kind, name):  # type: ignore[no-untyped-def]
    return *(torch.empty_like(t) for t in (count, mean, mean_low, m2, squares)), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("batchnorm::sum_over", lib=_LIBRARY)
def _(t, call, group, kind, name):  # type: ignore[no-untyped-def]
    return torch.empty_like(t)


def _setup_merge_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    count, mean, mean_low, _, _, *ctx.where = inputs
    total, high, low, _, all_squares, call = output
    ctx.mark_non_differentiable(total, high, all_squares, call)
    ctx.save_for_backward(count, mean, mean_low, total, high, low, call)


def _backward_merge_moments(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    *kept, call = ctx.saved_tensors

    def total_over(t: Tensor) -> Tensor:
        return torch.ops.batchnorm.sum_over(t, call, *ctx.where)

    dmean_low, dm2 = _merge_gradients(tuple(kept), gradients[2], gradients[3], total_over)
    return None, None, dmean_low, dm2, *(None,) * 4


torch.library.register_autograd(
    "batchnorm::merge_moments", _backward_merge_moments, setup_context=_setup_merge_moments, lib=_LIBRARY
)
