"""What a model is called with, and the same with other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """From a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

        Raises:
            TypeError: It is something else.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,))
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs))
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        raise TypeError(
            "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(example_inputs).__name__}. Pass what the model is called with."
        )

    def call(self, model: Callable[..., Any]) -> Any:
        """What the model returns for them."""
        return model(*self.args, **self.kwargs)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """With every tensor replaced by the function's result."""
        return Inputs(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """Every tensor in them."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def to(self, dtype: torch.dtype) -> Inputs:
        """With floating-point tensors in this dtype."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def random(self, seed: int = 0) -> Inputs:
        """With floating-point tensors replaced by normal values; others as they are."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            values = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            return torch.empty_like(x).copy_(values)

        return self.map(draw)

    def first(self, samples: int) -> Inputs:
        """With at most so many samples, where every tensor has the same number of them."""
        sizes = {x.shape[0] if x.dim() else 0 for x in self.tensors()}
        if len(sizes) != 1 or next(iter(sizes)) <= samples:
            return self
        return self.map(lambda x: x[:samples])

    def resized(self) -> Iterator[Inputs]:
        """The same with other numbers of samples, and with images, volumes and sequences of other sizes."""
        tensors = [x for x in self.tensors() if x.dim()]
        if not tensors:
            return
        batch = tensors[0].shape[0]
        if all(x.shape[0] == batch for x in tensors):
            yield self.map(lambda x: _with_sizes(x, (batch + 1, *x.shape[1:])) if x.dim() else x)
            if batch != 1:
                yield self.map(lambda x: x[:1] if x.dim() else x)
        if any(x.is_floating_point() and x.dim() >= 3 for x in tensors):
            for more in (32, 1):
                yield self.map(lambda x, more=more: _larger(x, more))  # type: ignore[misc]


def _larger(x: Tensor, more: int) -> Tensor:
    if not x.is_floating_point() or x.dim() < 3:
        return x
    return _with_sizes(x, (*x.shape[:2], *(size + more for size in x.shape[2:])))


def _with_sizes(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(sizes):
        x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def evaluate(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for a copy of the inputs, which it may change in place; without gradients."""
    with torch.no_grad():
        # A graph module called as such prints where it failed; here that is for the caller to tell.
        return inputs.map(torch.clone).call(model.forward if isinstance(model, fx.GraphModule) else model)


def outputs(result: Any) -> list[Tensor]:
    """Every tensor in what a model returned."""
    if not pytree.tree_leaves(result) and hasattr(result, "__dict__"):
        result = vars(result)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
