"""The inputs of a model, also with other sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from batchnorm._options import InputsNotTaken, in_one_line
from batchnorm.models.data.batches import tensors_in
from batchnorm.walk import is_hooked


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
        """Return inputs from a tuple or list of positional arguments, a mapping of named arguments, or one argument.

        Raises:
            TypeError: it is a number.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, (int, float, complex)):
            raise TypeError(
                "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
                f"{type(example_inputs).__name__}. Pass the model's arguments."
            )
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        return cls(tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,))

    def call(self, model: Callable[..., Any]) -> Any:
        """Call the model with these arguments, and return its result."""
        return model(*self.args, **self.kwargs)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the inputs with the function applied to every tensor."""
        return Inputs(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """Return every tensor in the inputs."""
        return tensors_in((self.args, self.kwargs))

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the inputs with floating-point tensors converted to this dtype."""
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def random(self, seed: int = 0) -> Inputs:
        """Return the inputs with normally distributed values in every floating-point tensor."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            values = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
            return torch.empty_like(x).copy_(values)

        return self.map(draw)

    def first(self, samples: int) -> Inputs:
        """Return at most this many first samples if all tensors have the same number of samples; otherwise, all.

        Inputs that hold lists of tensors are not cut, because each tensor may be a sample.
        """
        sizes = {x.shape[0] if x.dim() else 0 for x in self.tensors()}
        if len(sizes) != 1 or next(iter(sizes)) <= samples or self._holds_lists():
            return self
        return self.map(lambda x: x[:samples])

    def _holds_lists(self) -> bool:
        values: list[Any] = [*self.args, *self.kwargs.values()]
        values += [inner for value in values if isinstance(value, Mapping) for inner in value.values()]
        return any(isinstance(value, (list, tuple)) and tensors_in(value) for value in values)

    def resized(self) -> Iterator[tuple[Inputs, ...]]:
        """Yield the inputs with other numbers of samples, and with other sizes of images, volumes and sequences.

        Each tuple holds alternatives: a model that does not accept the first one may accept the next. Small inputs come
        first, because they take little time.
        """
        tensors = [x for x in self.tensors() if x.dim()]
        if not tensors:
            return
        spatial = any(x.is_floating_point() and x.dim() >= 3 for x in tensors)
        small = self.map(lambda x: _spatial(x, lambda size: min(size, _SMALL[x.dim()] + size % 32)))
        bases = (
            (small, self)
            if any(x.shape != y.shape for x, y in zip(self.tensors(), small.tensors(), strict=True))
            else (self,)
        )
        batch = tensors[0].shape[0]
        if all(x.shape[0] == batch for x in tensors) and not self._holds_lists():
            # A model that joins samples, such as the frames of a clip, accepts multiples only.
            yield tuple(base._of_samples(n) for base in bases for n in dict.fromkeys((batch + 1, 2 * batch)))
            if batch != 1:
                yield tuple(base._of_samples(1) for base in bases)
        if spatial:
            larger = self.map(lambda x: _spatial(x, lambda size: size + 32))
            yield (*bases[:-1], larger)
            yield tuple(base.map(lambda x: _spatial(x, lambda size: size + 1)) for base in bases)

    def _of_samples(self, number: int) -> Inputs:
        return self.map(lambda x: _with_sizes(x, (number, *x.shape[1:])) if x.dim() else x)


# Small sizes by the number of dimensions, multiples of 32, which is the stride of many networks.
_SMALL = defaultdict(lambda: 32, {3: 64, 4: 64})


def _spatial(x: Tensor, resized: Callable[[int], int]) -> Tensor:
    """Return images, volumes or sequences of other sizes, and any other tensor as it is."""
    if not x.is_floating_point() or x.dim() < 3:
        return x
    return _with_sizes(x, (*x.shape[:2], *map(resized, x.shape[2:])))


def _with_sizes(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(sizes):
        x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def not_taken(caller: str, name: str, error: Exception) -> InputsNotTaken:
    """Return the error of a function whose argument of this name holds inputs that the model does not take."""
    return InputsNotTaken(
        f"{caller} expects {name} that the model takes, but calling it raised {in_one_line(error)}. "
        "Pass a tensor, a tuple of arguments or a dict of keyword arguments."
    )


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Inputs) -> Any:
    """Return the model's result without gradients, for a copy of the inputs, because it may change them in place."""
    # A graph module prints its exceptions when it is called. Its `forward` does not, but skips hooks.
    plain = isinstance(model, fx.GraphModule) and not is_hooked(model)
    return inputs.map(torch.clone).call(model.forward if plain else model)
