"""The collective for a layer's moments in forward, and the one for its sums of gradients in backward."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.distributed.groups import Peers, check_same_kind, collective, history, require, resolve

# Exchanges are numbered modulo this, so that a float64 sum of squares over 8,000 processes is exact.
_MODULUS = 2**20
_HEADER = 2  # number of values before the moments: the number of channels, and a hash of the layer's name


class PairMoments(NamedTuple):
    """Moments of each channel, or of each row of channels, with the mean as a pair.

    count and count_squares are Σw and Σw², scalars (or `[K]`); mean, mean_low and m2 are `[C]` (or `[K, C]`).
    """

    count: Tensor  # type: ignore[assignment]  # a tuple's method of this name is not needed
    mean: Tensor
    mean_low: Tensor
    m2: Tensor
    count_squares: Tensor


# Forward


def _merged(moments: PairMoments, peers: Peers) -> PairMoments:
    count, mean, mean_low, m2, squares = moments
    group = resolve(peers.group)
    check_same_kind(peers, group)
    past = history(group)
    past.calls += 1
    peers.call = past.calls % _MODULUS
    wide = count.dtype
    pair = mean.to(wide) + mean_low.to(wide)
    parts = (count, squares, pair, m2.to(wide))
    name = zlib.crc32(peers.name.encode()) if peers.name else 0
    # Filled in place, because a copy from the host would wait for a GPU.
    header = [pair.new_full((1,), number) for number in (pair.numel(), name)]
    packet = torch.cat([*header, *(t.reshape(-1) for t in parts)])
    packets = [torch.empty_like(packet) for _ in range(dist.get_world_size(group))]
    collective(peers, group, "moments", lambda: dist.all_gather(packets, packet, group=group))
    gathered = torch.stack(packets)
    same = gathered[:, 0] == pair.numel()
    if name:  # a compiled layer sends no name
        names = gathered[:, 1]
        same &= (names == name) | (names == 0)
    require(same.all(), peers, group, "moments", "others sent those of another layer")
    split = gathered[:, _HEADER:].split([t.numel() for t in parts], 1)
    counts, all_squares, means, m2s = (g.reshape(-1, *t.shape) for g, t in zip(split, parts, strict=True))
    total = counts.sum(0)
    counts = counts.unsqueeze(-1)
    # The mean of a process without values may be NaN, and 0·NaN is NaN.
    joint = torch.where(counts > 0, means * counts, 0.0).sum(0) / _positive(total)
    spread = torch.where(counts > 0, counts * (means - joint).square(), 0.0).sum(0)
    high = joint.to(mean.dtype)
    low = (joint - high.to(wide)).to(mean.dtype)
    return PairMoments(total, high, low, (m2s.sum(0) + spread).to(m2.dtype), all_squares.sum(0))


def _merge_gradients(
    kept: tuple[Tensor, ...], dlow: Tensor, dm2: Tensor, total_over: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return differentiable gradients of this process's mean_low and m2, by one collective."""
    count, mean, mean_low, total, high, low = kept
    wide = count.dtype
    joint_dlow, joint_dm2 = total_over(torch.stack([dlow, dm2]).to(wide)).unbind()
    through_mean = count.unsqueeze(-1) / _positive(total) * joint_dlow
    through_spread = _spread_slope(count, mean, mean_low, high, low) * joint_dm2
    return (through_mean + through_spread).to(mean_low.dtype), joint_dm2.to(dm2.dtype)


def _spread_slope(count: Tensor, mean: Tensor, mean_low: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Return `2·nₖ·(μₖ - μ)`, the derivative of the joint m2 with respect to this process's mean."""
    wide = count.dtype
    deviation = (mean.to(wide) - high.to(wide)) + (mean_low.to(wide) - low.to(wide))
    return 2.0 * torch.where(count.unsqueeze(-1) > 0, count.unsqueeze(-1) * deviation, 0.0)


def _positive(count: Tensor) -> Tensor:
    return count.clamp_min(torch.finfo(count.dtype).tiny).unsqueeze(-1)


class _Merge(torch.autograd.Function):
    """`_merged` under autograd, for derivatives of any order, in reverse and forward mode."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *moments, peers = arguments
        return tuple(_merged(PairMoments(*moments), peers))

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


def merge_moments(moments: PairMoments, peers: Peers) -> PairMoments:
    """Return the moments of all processes' values together, by one collective. Section "Merging moments".

    The exchange is in float64 for all dtypes. Moments are merged in the order of ranks, so that all processes get the
    same bits. As in `moments`, mean_low and m2 have derivatives, and mean is a constant.

    Raises:
        RuntimeError: a process failed or is in another layer; raised on every remaining process.
    """
    if torch.compiler.is_compiling():
        *merged, _ = torch.ops.batchnorm.merge_moments(*moments, peers.group, peers.kind, peers.name)
    else:
        merged = _Merge.apply(*moments, peers)
    return PairMoments(*merged)


# Backward


def _summed(t: Tensor, peers: Peers, call: int) -> Tensor:
    group = resolve(peers.group)
    marks = (call, call * call)
    packet = torch.cat([t.reshape(-1), *(t.new_full((1,), mark) for mark in marks)])
    collective(peers, group, "gradients", lambda: dist.all_reduce(packet, group=group))
    # Both sums equal `size` times this process's values only if the numbers of all processes are equal.
    size = dist.get_world_size(group)
    same = (packet[-2] == size * marks[0]) & (packet[-1] == size * marks[1])
    require(same, peers, group, "gradients", "others sent those of another layer or another call")
    return packet[:-2].reshape(t.shape).clone()


class _Sum(torch.autograd.Function):
    """The sum over the processes, on every process; its derivative is the same sum."""

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
    """Return the sum of float64 `t` over the processes of the last `merge_moments`, by one collective.

    Raises:
        RuntimeError: as `merge_moments`.
    """
    return _summed(t, peers, peers.call)


# The same functions as operators, for compiled graphs


_MOMENTS = "Tensor count, Tensor mean, Tensor mean_low, Tensor m2, Tensor squares"
_PEERS = "str group, str kind, str name"
_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_LIBRARY.define(f"merge_moments({_MOMENTS}, {_PEERS}) -> ({_MOMENTS}, Tensor call)")
_LIBRARY.define(f"sum_over(Tensor t, Tensor call, {_PEERS}) -> Tensor")


def _merge_moments_operator(*arguments: Any) -> tuple[Tensor, ...]:
    *moments, group, kind, name = arguments
    peers = Peers(group, kind, name)
    return *_merged(PairMoments(*moments), peers), torch.tensor(peers.call)


def _sum_over_operator(t: Tensor, call: Tensor, group: str, kind: str, name: str) -> Tensor:
    return _summed(t, Peers(group, kind, name), int(call))


_LIBRARY.impl("merge_moments", _merge_moments_operator, "CompositeExplicitAutograd")
_LIBRARY.impl("sum_over", _sum_over_operator, "CompositeExplicitAutograd")


@torch.library.register_fake("batchnorm::merge_moments", lib=_LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *moments, _, _, _ = arguments
    return *map(torch.empty_like, moments), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("batchnorm::sum_over", lib=_LIBRARY)
def _(t: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(t)


def _setup_merge_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    count, mean, mean_low, _, _, *ctx.peers_arguments = inputs
    total, high, low, _, all_squares, call = output
    ctx.mark_non_differentiable(total, high, all_squares, call)
    ctx.save_for_backward(count, mean, mean_low, total, high, low, call)


def _backward_merge_moments(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    *kept, call = ctx.saved_tensors

    def total_over(t: Tensor) -> Tensor:
        return torch.ops.batchnorm.sum_over(t, call, *ctx.peers_arguments)

    dmean_low, dm2 = _merge_gradients(tuple(kept), gradients[2], gradients[3], total_over)
    return None, None, dmean_low, dm2, *(None,) * 4


torch.library.register_autograd(
    "batchnorm::merge_moments", _backward_merge_moments, setup_context=_setup_merge_moments, lib=_LIBRARY
)
