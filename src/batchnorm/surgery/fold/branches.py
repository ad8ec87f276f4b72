"""Linear branches of one input that are added become one convolution (RepVGG, Ding et al. 2021, section 3.3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from batchnorm.surgery.fold.arithmetic import as_kernel, embedded, regrouped
from batchnorm.surgery.fold.network import Call, Kind, Network
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.states import CannotFold, Layer, Linear, Norm, Window


def merged(network: Network, call: Call) -> FoldPlan:
    """Return the plan that turns an addition or subtraction into one layer of the input that both terms read.

    A batch normalization that something else reads too is copied, and stays for its other readers.

    Raises:
        CannotFold: The terms are not linear branches of one input, or something else reads a convolution's result too.
    """
    terms = call.inputs
    if len(set(terms)) != 2:
        raise CannotFold("it is not an addition of two tensors")
    writers = [network.writer(term) for term in terms]
    branches = [_branch(network, writer) for writer in writers]
    for i, j in ((0, 1), (1, 0)):
        other = writers[j]
        if isinstance(branches[j], Linear) and other is not None and terms[i] == other.inputs[0]:
            branches[i] = None  # this term is the input itself
    first = next((branch for branch in branches if isinstance(branch, Linear)), None)
    if first is None:
        raise CannotFold("its terms are not linear branches")
    sources = {
        term if branch is None or writer is None else writer.inputs[0]
        for term, writer, branch in zip(terms, writers, branches, strict=True)
    }
    if len(sources) != 1:
        raise CannotFold("its terms have different inputs")
    gone: list[Call] = []
    copied: list[Call] = []
    for term, writer, branch in zip(terms, writers, branches, strict=True):
        if not network.same_shape(term, call.results[0]) or term in network.pinned:
            raise CannotFold("a term has another shape")
        if branch is None or writer is None:
            continue
        elsewhere = network.readers(term) != [call]
        if elsewhere and not isinstance(branch, Norm):
            raise CannotFold("a term is read elsewhere too")
        (copied if elsewhere else gone).append(writer)
    if None in branches and not _feeds_a_norm(network, call):
        raise CannotFold("there is no batch normalization to remove")
    left, right = (_as_linear(branch, first) for branch in branches)
    state = _sum(left, right.negated() if call.kind is Kind.DIFFERENCE else right)
    return FoldPlan(
        network, {call: state}, gone=gone, sources={call: sources.pop()}, same=[call.results[0]], absorbers=[call],
        copied=copied,
    )  # fmt: skip


def _feeds_a_norm(network: Network, call: Call) -> bool:
    """Return whether only a batch normalization reads the sum, perhaps after further additions."""
    readers = network.readers(call.results[0])
    return len(readers) == 1 and (
        readers[0].kind is Kind.NORM or (readers[0].kind is Kind.SUM and _feeds_a_norm(network, readers[0]))
    )


def _branch(network: Network, writer: Call | None) -> Layer | None:
    if writer is None or writer.kind not in (Kind.LINEAR, Kind.NORM):
        return None
    try:
        return network.layer(writer)
    except CannotFold:
        return None


def _as_linear(branch: Layer | None, other: Linear) -> Linear:
    """Return a batch normalization, or the input itself (None), as a convolution like the other."""
    if isinstance(branch, Linear):
        return branch
    if other.dims == 0 or other.transposed or other.opaque:
        raise CannotFold("the other term is not a convolution")
    s = branch.scale_shift if isinstance(branch, Norm) else None
    scale = torch.ones(other.in_channels, dtype=torch.float64, device="cpu") if s is None else s.scale
    if scale.numel() != other.in_channels or set(other.window.stride) != {1}:
        raise CannotFold("the other term has another shape")
    ones = (1,) * other.dims
    window = Window(ones, ones, ((0, 0),) * other.dims)
    weight, bias = as_kernel(scale, groups=other.groups, dims=other.dims), None if s is None else s.shift
    return replace(other, weight=weight, bias=bias, border=None, window=window, options={})


def _sum(first: Linear, second: Linear) -> Linear:
    if first.kind != second.kind or first.transposed or first.opaque:
        raise CannotFold("its terms are different kinds of layers")
    if first.border is not None or second.border is not None:
        raise CannotFold("a term is a convolution with its own border")
    if first.weight.shape[2:].numel() < second.weight.shape[2:].numel():
        first, second = second, first
    bias = _added(first.bias, second.bias)
    if first.dims == 0:
        return replace(first, weight=first.weight + second.weight, bias=bias)
    weight, groups = _joined(first, second)
    return replace(first, weight=weight, bias=bias, groups=groups)


def _joined(first: Linear, second: Linear) -> tuple[Tensor, int]:
    """Return the sum of two convolutions' kernels, of the first one's size, and its groups.

    Only the kernels' first taps must be aligned. If the padding at the ends makes the results' sizes differ, the
    original cannot add them either.

    Raises:
        CannotFold: There is no such kernel, or it costs more than the two.
    """
    a, b = first.window, second.window
    if a.stride != b.stride:
        raise CannotFold("its terms have different strides")
    if a.padding is None or b.padding is None:
        raise CannotFold("the padding of a term depends on the size of its input")
    offset, each = [], []
    for axis, (size, taps) in enumerate(zip(first.weight.shape[2:], second.weight.shape[2:], strict=True)):
        step, other = a.dilation[axis], b.dilation[axis]
        start = a.padding[axis][0] - b.padding[axis][0]
        if start % step or (taps > 1 and other % step):
            raise CannotFold("the kernel of one term is not aligned with the other's")
        start, by = start // step, max(other // step, 1)
        if start < 0 or start + by * (taps - 1) >= size:
            raise CannotFold("the kernel of one term is not inside the other's")
        offset.append(start)
        each.append(by)
    groups = min(first.groups, second.groups)
    if max(first.groups, second.groups) % groups:
        raise CannotFold("the groups of its terms do not fit")
    weights = [regrouped(term.weight, groups=term.groups, into=groups) for term in (first, second)]
    if weights[0].numel() > first.weight.numel() + second.weight.numel():
        raise CannotFold("one convolution would cost more than two")
    return weights[0] + embedded(weights[1], first.weight.shape[2:], offset, each), groups


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
