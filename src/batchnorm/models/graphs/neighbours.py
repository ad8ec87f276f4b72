"""The calls before and after each batch normalization in a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.models.graphs.lowering import CONVOLUTIONS, TRANSPOSED, activation_of, asks_sizes
from batchnorm.models.graphs.model_graph import Trace

_LINEAR = {*CONVOLUTIONS, *TRANSPOSED, F.linear}


@dataclass(frozen=True)
class BatchNormCall:
    """One call of batch normalization in a traced and lowered model.

    Attributes:
        path: The path of the module that makes the call, or else the name of the node.
        node: The call of `F.batch_norm`.
        start: The first node of the call, which reads its input: `node`, or one that moves the channels from the last
            dimension to the second.
        source: The node that computes its input.
        readers: The nodes that use its result.
        calls: The number of calls that use the same running statistics (or parameters, if there are no statistics).
        fixed_statistics: Whether it normalizes by running statistics instead of the statistics of the batch.
    """

    path: str
    node: Node
    start: Node
    source: Node
    readers: tuple[Node, ...]
    calls: int
    fixed_statistics: bool

    @property
    def follows_linear(self) -> bool:
        """Whether its input comes from a convolution or linear layer whose result nothing else reads."""
        alone = [reader for reader in self.source.users if not asks_sizes(reader)] == [self.start]
        return alone and self.source.target in ({F.linear} if self.channels_last else _LINEAR)

    @property
    def channels_last(self) -> bool:
        """Whether the channels of its input are in the last dimension."""
        return self.start is not self.node

    @property
    def activation(self) -> str | None:
        """The activation that reads its result, if it is the only reader and this library can fuse it."""
        found = activation_of(self.readers[0]) if len(self.readers) == 1 else None
        return None if found is None else found[0]

    @property
    def foldable(self) -> bool:
        """Whether it can be folded into the layer before it; `batchnorm.fold` tries other places too."""
        return self.fixed_statistics and self.follows_linear


def batch_norm_calls(trace: Trace) -> list[BatchNormCall]:
    """Return every call of batch normalization, in the order of execution.

    Args:
        trace: A trace made with `prepare=lowering.lower`.
    """
    nodes = [node for node in trace.graph.nodes if node.op == "call_function" and node.target is F.batch_norm]
    keys = [_tensors(node) for node in nodes]
    found = []
    for node, key in zip(nodes, keys, strict=True):
        start, end = _ends(node)
        readers = tuple(reader for reader in end.users if not asks_sizes(reader))
        fixed = node.args[1] is not None and not node.args[5]
        path = trace.paths.get(node) or node.name
        call = BatchNormCall(path, node, start, start.all_input_nodes[0], readers, keys.count(key), fixed)
        found.append(call)
    return found


def _ends(node: Node) -> tuple[Node, Node]:
    """Return the first and the last node of a call: with `channel_dim=-1`, those that move the channels."""
    before, after = node.all_input_nodes[0], list(node.users)
    moves = [n for n in (before, *after) if n.target is torch.movedim]
    if len(after) == 1 and [tuple(n.args[1:]) for n in moves] == [(-1, 1), (1, -1)]:
        return before, after[0]
    return node, node


def _tensors(node: Node) -> tuple[str, ...]:
    held = tuple(str(t.target) for t in node.args[1:5] if isinstance(t, Node))
    return held or (node.name,)
