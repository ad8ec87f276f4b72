"""Linear branches of one input that are added: one convolution (RepVGG, Ding 2021, section 3.3)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.surgery.fold.arithmetic import as_kernel, embedded, regrouped
from batchnorm.surgery.fold.linear import LinearLayer
from batchnorm.surgery.fold.pytorch.plans import Network, Plan
from batchnorm.surgery.fold.states import CannotFold, Gone, Linear, Norm


def merged(network: Network, node: Node) -> Plan:
    """The addition, or subtraction, as one convolution or linear layer of the input that both its terms read.

    Raises:
        CannotFold: The terms are no such branches, or are read elsewhere too.
    """
    terms = [term for term in node.args if isinstance(term, Node)]
    if node.target not in (operator.add, operator.sub) or len(terms) != 2 or len(node.args) != 2 or node.kwargs:
        raise CannotFold("it is no addition of two tensors")
    branches = [_branch(network, term) for term in terms]
    for i, other in enumerate(reversed(branches)):
        if isinstance(other, Linear) and _source(network, terms[i]) is _source(network, other.source):
            branches[i] = None  # the input itself
    first = next((branch for branch in branches if isinstance(branch, Linear)), None)
    if first is None:
        raise CannotFold("its terms are no linear branches")
    source = _source(network, first.source)
    linear = [_as_linear(branch, _source(network, term), first) for branch, term in zip(branches, terms, strict=True)]
    if any(_source(network, branch.source) is not source for branch in linear):
        raise CannotFold("its terms have different inputs")
    if any(branch is None for branch in branches) and not _feeds_a_norm(network, node):
        raise CannotFold("there is no batch normalization to gain")
    if node.target is operator.sub:
        linear[1] = _negated(linear[1])
    plan = Plan(network)
    for term, branch in zip(terms, branches, strict=True):
        if network.shape(term) != network.shape(node) or term in network.pinned:
            raise CannotFold("a term has another shape")
        if branch is None:
            continue
        if list(term.users) != [node] or terms.count(term) != 1:
            raise CannotFold("a term is read elsewhere too")
        plan.through += _chain(network, term)
    plan.dead += plan.through
    plan.states[node] = _sum(*linear)
    plan.same.append(node)
    plan.where.append(node)
    return plan


def _feeds_a_norm(network: Network, node: Node) -> bool:
    """Whether batch normalization alone reads the sum, perhaps after more is added."""
    readers = network.readers(node)
    if len(readers) != 1:
        return False
    return isinstance(network.states.get(readers[0]), Norm) or (
        readers[0].target is operator.add and _feeds_a_norm(network, readers[0])
    )


def _negated(branch: Linear) -> Linear:
    bias = None if branch.bias is None else -branch.bias
    return replace(branch, weight=-branch.weight, bias=bias)


def _chain(network: Network, node: Node) -> list[Node]:
    """The branch's call, and those that do nothing after it."""
    state = network.states.get(node)
    return [*_chain(network, state.source), node] if isinstance(state, Gone) else [node]


def _branch(network: Network, node: Node) -> Linear | Norm | None:
    state = network.states.get(node)
    if isinstance(state, Gone):
        return _branch(network, state.source) if len(state.source.users) == 1 else None
    return state if isinstance(state, (Linear, Norm)) else None


def _source(network: Network, node: Node) -> Node:
    state = network.states.get(node)
    return _source(network, state.source) if isinstance(state, Gone) else node


def _as_linear(branch: Linear | Norm | None, node: Node, other: Linear) -> Linear:
    """Batch normalization, or the input itself, as a convolution that can be added to the other."""
    if isinstance(branch, Linear):
        return branch
    if other.dims == 0 or other.transposed or other.layer is not None:
        raise CannotFold("what stands beside it is no convolution")
    ones = torch.ones(other.in_channels, dtype=torch.float64)
    scale, shift = (ones, None) if branch is None else (branch.scale_shift.scale, branch.scale_shift.shift)
    source = node if branch is None else branch.source
    if scale.numel() != other.in_channels or set(other.option("stride", 1)) != {1}:
        raise CannotFold("the convolution beside it has another shape")
    weight = as_kernel(scale, groups=other.groups, dims=other.dims)
    return Linear(other.function, source, weight, shift, None, other.like, other.name, {"groups": other.groups})


def _sum(first: Linear, second: Linear) -> Linear:
    if first.function is not second.function or first.transposed or first.layer is not None:
        raise CannotFold("its terms are different kinds of layers")
    if first.function is F.linear:
        return replace(first, weight=first.weight + second.weight, bias=plus(first.bias, second.bias), changed=True)
    if first.border is not None or second.border is not None:
        raise CannotFold("a term is a convolution with its own border")
    if first.weight.shape[2:].numel() < second.weight.shape[2:].numel():
        first, second = second, first
    if first.option("stride", 1) != second.option("stride", 1):
        raise CannotFold("its terms have different strides")
    kernel, steps = first.weight.shape[2:], first.option("dilation", 1)
    offset, each = [], []
    for axis in range(first.dims):
        step, other = steps[axis], second.option("dilation", 1)[axis]
        size, taps = kernel[axis], second.weight.shape[2 + axis]
        start = first.option("padding", 0)[axis] - second.option("padding", 0)[axis]
        if start % step or (taps > 1 and other % step):
            raise CannotFold("the kernel of one term does not lie on the other's")
        start, by = start // step, max(other // step, 1)
        end = start + by * (taps - 1)
        if start < 0 or end >= size or start != size - 1 - end:
            raise CannotFold("the kernel of one term does not lie in the middle of the other's")
        offset.append(start)
        each.append(by)
    weight, groups = joined(first, second, offset, each)
    options = {**first.options, "groups": groups}
    return replace(first, weight=weight, bias=plus(first.bias, second.bias), options=options, changed=True)


def joined(first: LinearLayer, second: LinearLayer, offset: Sequence[int], each: Sequence[int]) -> tuple[Tensor, int]:
    """The sum of two convolutions' kernels, the second's tap j at `offset + each·j` in the first's; and its groups.

    Raises:
        CannotFold: There is no such kernel, or it costs more than the two.
    """
    groups = min(first.groups, second.groups)
    if max(first.groups, second.groups) % groups:
        raise CannotFold("the groups of its terms do not fit")
    weights = [regrouped(term.weight, groups=term.groups, into=groups) for term in (first, second)]
    if weights[0].numel() > first.weight.numel() + second.weight.numel():
        raise CannotFold("one convolution would cost more than two")
    weight = weights[0] + embedded(weights[1], first.weight.shape[2:], offset, each)
    return weight, groups


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two biases, None for none."""
    return a if b is None else b if a is None else a + b
