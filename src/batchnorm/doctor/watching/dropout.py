"""Find dropout before batch normalization, in the graph that autograd records."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

# Smallest probability that counts: it raises a standard deviation by at least 5 %.
_LEAST = 0.1
# Largest number of nodes that are visited before a layer.
_VISITED = 2000


class DropoutBefore:
    """Finds the layers whose input comes from dropout, with no other of the layers between.

    Dropout is seen if it is a module.

    Attributes:
        found: The layers, with the largest probability of dropout before each.
    """

    def __init__(self) -> None:
        self.found: dict[nn.Module, float] = {}
        self._dropped: dict[Node, float] = {}
        self._normalized: set[Node] = set()

    def called(self, module: nn.Module, is_layer: bool, args: tuple[Any, ...], y: Any) -> None:
        """Take a call of any module in training mode."""
        if not isinstance(y, Tensor) or y.grad_fn is None:
            return
        if isinstance(module, nn.modules.dropout._DropoutNd) and (probability := float(module.p)) >= _LEAST:
            self._dropped[y.grad_fn] = probability
        if not is_layer:
            return
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.grad_fn is not None and module not in self.found:
            probability = self._before(x.grad_fn)
            if probability:
                self.found[module] = probability
        self._normalized.add(y.grad_fn)

    def _before(self, start: Node) -> float:
        if not self._dropped:
            return 0.0
        waiting, visited, largest = [start], {start}, 0.0
        while waiting and len(visited) < _VISITED:
            node = waiting.pop()
            if node in self._normalized:
                continue
            largest = max(largest, self._dropped.get(node, 0.0))
            following = [following for following, _ in node.next_functions if following is not None]
            waiting += [following for following in following if following not in visited]
            visited.update(following)
        return largest
