"""Linear branches of one input that are added: one convolution (RepVGG, Ding 2021, section 3.3)."""

from __future__ import annotations

from dataclasses import replace

import torch

from batchnorm.surgery.fold.arithmetic import as_kernel
from batchnorm.surgery.fold.onnx.network import Call, Network
from batchnorm.surgery.fold.onnx.plans import Plan, is_linear, linear_of, norm_of
from batchnorm.surgery.fold.onnx.states import Linear, Norm
from batchnorm.surgery.fold.pytorch.parallel import joined, plus
from batchnorm.surgery.fold.states import CannotFold


def merged(network: Network, call: Call) -> Plan:
    """The addition as one convolution or linear layer of the input that both its terms read.

    Raises:
        CannotFold: The terms are no such branches, or are read elsewhere too.
    """
    names = [network.resolve(name) for name in call.node.input]
    if call.op != "Add" or call in network.states or len(set(names)) != 2:
        raise CannotFold("it is no addition of two tensors")
    branches = [_branch(network, name) for name in names]
    first = next((branch for branch in branches if isinstance(branch, Linear)), None)
    if first is None:
        raise CannotFold("its terms are no linear branches")
    source = network.resolve(first.source)
    if source in names:
        if not _feeds_a_norm(network, call):
            raise CannotFold("there is no batch normalization to gain")
        branches[names.index(source)] = None  # the input itself
    if any(branch is None and name != source for branch, name in zip(branches, names, strict=True)):
        raise CannotFold("a term is no linear branch")
    linear = [_as_linear(branch, source, first) for branch in branches]
    if any(network.resolve(branch.source) != source for branch in linear):
        raise CannotFold("its terms have different inputs")
    plan = Plan(network)
    for name, branch in zip(names, branches, strict=True):
        if network.shape(name) != network.shape(call.node.output[0]):
            raise CannotFold("a term has another shape")
        if branch is None:
            continue
        if network.readers(name) != [call]:
            raise CannotFold("a term is read elsewhere too")
        writer = network.writer(name)
        assert writer is not None
        plan.gone.append(writer)
    plan.states[call] = _sum(*linear)
    plan.same.append(network.resolve(call.node.output[0]))
    plan.where.append(call)
    return plan


def _feeds_a_norm(network: Network, call: Call) -> bool:
    """Whether batch normalization alone reads the sum, perhaps after more is added."""
    readers = network.readers(call.node.output[0])
    return len(readers) == 1 and (
        readers[0].op == "BatchNormalization" or (readers[0].op == "Add" and _feeds_a_norm(network, readers[0]))
    )


def _branch(network: Network, name: str) -> Linear | Norm | None:
    writer = network.writer(name)
    if writer is None:
        return None
    if is_linear(network, writer):
        return linear_of(network, writer)
    return norm_of(network, writer) if writer.op == "BatchNormalization" else None


def _as_linear(branch: Linear | Norm | None, source: str, other: Linear) -> Linear:
    """Batch normalization, or the input itself, as a convolution that can be added to the other."""
    if isinstance(branch, Linear):
        return branch
    if other.dims == 0 or other.transposed:
        raise CannotFold("what stands beside it is no convolution")
    ones = torch.ones(other.in_channels, dtype=torch.float64)
    scale, shift = (ones, None) if branch is None else (branch.scale_shift.scale, branch.scale_shift.shift)
    if scale.numel() != other.in_channels or set(other.each("strides", 1)) != {1}:
        raise CannotFold("the convolution beside it has another shape")
    weight = as_kernel(scale, groups=other.groups, dims=other.dims)
    return Linear("Conv", source if branch is None else branch.source, weight, shift, None, other.like, {
        "group": other.groups
    })  # fmt: skip


def _sum(first: Linear, second: Linear) -> Linear:
    if first.op != second.op or first.transposed:
        raise CannotFold("its terms are different kinds of layers")
    if first.dims == 0:
        return replace(first, weight=first.weight + second.weight, bias=plus(first.bias, second.bias))
    if first.border is not None or second.border is not None:
        raise CannotFold("a term is a convolution with its own border")
    if first.weight.shape[2:].numel() < second.weight.shape[2:].numel():
        first, second = second, first
    if first.each("strides", 1) != second.each("strides", 1):
        raise CannotFold("its terms have different strides")
    if any(str(term.options.get("auto_pad", "NOTSET")).startswith("SAME") for term in (first, second)):
        raise CannotFold("the padding of a term depends on the size of its input")
    kernel, offset, each = first.weight.shape[2:], [], []
    for axis in range(first.dims):
        step, other = first.each("dilations", 1)[axis], second.each("dilations", 1)[axis]
        taps = second.weight.shape[2 + axis]
        start = first.each("pads", 0)[axis] - second.each("pads", 0)[axis]
        if start % step or (taps > 1 and other % step):
            raise CannotFold("the kernel of one term does not lie on the other's")
        start, by = start // step, max(other // step, 1)
        if start < 0 or start + by * (taps - 1) >= kernel[axis]:
            raise CannotFold("the kernel of one term does not lie in the other's")
        offset.append(start)
        each.append(by)
    weight, groups = joined(first, second, offset, each)
    return replace(first, weight=weight, bias=plus(first.bias, second.bias), options={**first.options, "group": groups})
