"""The calls that folding changes, with their weights in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from batchnorm.models.lowering import CONVOLUTIONS, TRANSPOSED
from batchnorm.surgery.fold.arithmetic import ScaleShift, rounded, wide
from batchnorm.surgery.fold.linear import LinearLayer


class CannotFold(Exception):
    """Why a batch normalization stays where it is."""


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for every dimension."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


@dataclass(frozen=True, eq=False)
class Linear(LinearLayer):
    """A convolution, transposed convolution or linear layer.

    Attributes:
        function: Such as `F.conv2d`; or a layer with a forward of its own, whose class derives from one of these.
        source: The node of its input.
        weight: float64.
        bias: `[out]`, float64, or None.
        border: The kernel of what is added for a shift that stood before padding or a transposed convolution, float64.
        like: The parameter that it was: its dtype, device and memory format are what the new one gets.
        name: The attribute that the weight was.
        options: The arguments after weight and bias, by name.
        changed: Whether the weights are others than the model's.
    """

    function: Any
    source: Node
    weight: Tensor
    bias: Tensor | None
    border: Tensor | None
    like: Tensor
    name: str
    options: dict[str, Any]
    changed: bool = False

    @classmethod
    def of(cls, node: Node, parameter: Any) -> Linear:
        """From a call whose weight and bias are attributes of the graph; `parameter(node)` gives their values.

        Raises:
            CannotFold: The weight is computed, or the options are.
        """
        if node.target in CONVOLUTIONS:
            names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
        elif node.target in TRANSPOSED:
            names = ("stride", "padding", "output_padding", "groups", "dilation")
        else:
            names = ()
        given: dict[str, Any] = dict(zip(("input", "weight", "bias", *names), node.args, strict=False)) | dict(
            node.kwargs
        )
        weight, bias = given["weight"], given.get("bias")
        if not isinstance(weight, Node) or weight.op != "get_attr":
            raise CannotFold("the weight next to it is computed, not a parameter")
        if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
            raise CannotFold("the bias next to it is computed, not a parameter")
        options = {name: given[name] for name in names if name in given}
        if any(isinstance(value, Node) for value in options.values()):
            raise CannotFold("the convolution next to it has computed options")
        like = parameter(weight)
        return cls(
            node.target,
            given["input"],
            wide(like),
            None if bias is None else wide(parameter(bias)),
            None,
            like,
            str(weight.target),
            options,
        )

    @classmethod
    def of_layer(cls, node: Node, layer: Any) -> Linear:
        """From a call of a layer that could not be traced, such as a convolution that pads by its input's size.

        That it is linear in its weight is taken from its class, and tried like every fold.

        Raises:
            CannotFold: Its tensors are no plain parameters.
        """
        if set(layer._parameters) != {"weight", "bias"} or layer._buffers or node.kwargs or len(node.args) != 1:
            raise CannotFold("the layer next to it holds more than a weight and a bias")
        bias = None if layer.bias is None else wide(layer.bias)
        groups = {"groups": layer.groups} if isinstance(layer, _ConvNd) else {}
        source: Any = node.args[0]
        return cls(
            layer, source, wide(layer.weight), bias, None, layer.weight.detach(), f"{node.target}.weight", groups
        )

    @property
    def layer(self) -> nn.Module | None:
        """The layer, where it is one with a forward of its own."""
        return self.function if isinstance(self.function, nn.Module) else None

    @property
    def dims(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""
        if isinstance(self.function, _ConvNd):
            return len(self.function.kernel_size)
        return CONVOLUTIONS.get(self.function, 0) or TRANSPOSED.get(self.function, 0)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.function in TRANSPOSED or isinstance(self.function, _ConvTransposeNd)

    @property
    def groups(self) -> int:
        """1 for a linear layer."""
        return int(self.options.get("groups", 1))

    def option(self, name: str, default: int) -> tuple[int, ...]:
        """Stride, dilation or padding along each dimension.

        Raises:
            CannotFold: The padding is a name.
        """
        value = self.options.get(name, default)
        if isinstance(value, str):
            raise CannotFold(f"padding {value!r} is not a number")
        return _each(value, self.dims)

    def _sees_whole_kernel(self) -> bool:
        """Whether every output has all of the kernel inside the input."""
        if self.dims == 0:
            return True
        if self.options.get("padding", 0) == "valid":
            padding: tuple[int, ...] = (0,)
        elif isinstance(self.options.get("padding", 0), str):
            padding = (0,) if all(size == 1 for size in self.weight.shape[2:]) else (1,)
        else:
            padding = self.option("padding", 0)
        if self.transposed:
            pointwise = all(size == 1 for size in self.weight.shape[2:])
            plain = set(self.option("stride", 1)) == {1} and set(self.option("output_padding", 0)) == {0}
            return pointwise and plain and not any(padding)
        return not any(padding)

    def _with(self, **changes: Any) -> Linear:
        return replace(self, **changes, changed=True)

    def before(self, s: ScaleShift) -> Linear:
        """With this scale and shift `[in]` before it.

        Raises:
            CannotFold: It is a layer with a forward of its own.
        """
        if self.layer is not None:
            raise CannotFold(f"what {type(self.layer).__name__} does with its input is not known")
        return super().before(s)

    def at_border(self) -> dict[str, Any]:
        """The options of the call that makes what is added, from ones with one channel."""
        return {name: value for name, value in self.options.items() if name != "groups"}

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, bias and border kernel as they are stored.

        Raises:
            arithmetic.NotRepresentable: One is not finite in the parameter's dtype.
        """
        weight, bias, border = (
            None if t is None else rounded(t, self.like) for t in (self.weight, self.bias, self.border)
        )
        assert weight is not None
        return weight, bias, border

    def __call__(self, x: Tensor) -> Tensor:
        """The result for x: with weights as they are stored, or as they are for float64 x."""
        weight, bias, border = (self.weight, self.bias, self.border) if x.dtype == torch.float64 else self.tensors()
        held = [None if t is None else t.to(device=x.device, dtype=x.dtype) for t in (weight, bias, border)]
        if self.layer is not None:
            return with_parameters(self.layer, *held[:2])(x)
        y = self.function(x, held[0], held[1], **self.options)
        if held[2] is not None:
            y = y + self.function(torch.ones_like(x[:1, :1]), held[2], None, **self.at_border())
        return y


@dataclass(frozen=True, eq=False)
class Norm:
    """Batch normalization with fixed statistics.

    Attributes:
        source: The node of its input.
        statistics: running_mean, running_var, weight and bias as the model has them, and eps.
        scale_shift: What it computes, `[C]`, with what was folded into it.
        changed: Whether something was.
    """

    source: Node
    statistics: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]
    scale_shift: ScaleShift
    changed: bool = False

    @classmethod
    def of(cls, node: Node, parameter: Any) -> Norm:
        """From a call of `F.batch_norm`.

        Raises:
            CannotFold: It uses the batch's statistics, or its tensors are computed.
        """
        x, running_mean, running_var, weight, bias, training, _, eps = node.args
        if training or running_mean is None:
            raise CannotFold("it uses the batch's statistics in evaluation too")
        held = (running_mean, running_var, weight, bias)
        if any(t is not None and (not isinstance(t, Node) or t.op != "get_attr") for t in held):
            raise CannotFold("its statistics or parameters are computed")
        tensors: list[Any] = [None if t is None else parameter(t) for t in held]
        scale_shift = ScaleShift.of(tensors[0], tensors[1], tensors[2], tensors[3], float(eps))  # type: ignore[arg-type]
        if not (scale_shift.scale.isfinite().all() and scale_shift.shift.isfinite().all()):
            raise CannotFold("its scale or shift is not finite")
        return cls(x, (*tensors, float(eps)), scale_shift)  # type: ignore[arg-type]

    def then(self, s: ScaleShift) -> Norm:
        """With this after it."""
        return replace(self, scale_shift=self.scale_shift.then(s), changed=True)

    def before(self, s: ScaleShift) -> Norm:
        """With this before it."""
        return replace(self, scale_shift=s.then(self.scale_shift), changed=True)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        """Those of `F.batch_norm` after its input, without `training`."""
        if not self.changed:
            return self.statistics
        mean, var = (torch.zeros_like(self.statistics[0]), torch.ones_like(self.statistics[1]))
        like = self.statistics[0]
        return mean, var, rounded(self.scale_shift.scale, like), rounded(self.scale_shift.shift, like), 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The result for x."""
        if x.dtype == torch.float64 and self.changed:
            along = (1, -1, *(1,) * (x.dim() - 2))
            s = self.scale_shift
            return x * s.scale.to(x.device).reshape(along) + s.shift.to(x.device).reshape(along)
        *tensors, eps = self.arguments()
        if x.dtype == torch.float64:
            tensors = [None if t is None else t.double() for t in tensors]
        mean, var, weight, bias = tensors
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


@dataclass(frozen=True, eq=False)
class Gone:
    """A call that does nothing any more.

    Attributes:
        source: What stands for it.
    """

    source: Node

    def __call__(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


def with_parameters(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """The layer with other tensors in the place of its parameters; the given one is not touched."""
    other = copy.copy(layer)
    other._parameters = {
        name: value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        for name, value in (("weight", weight), ("bias", bias))
    }
    return other


State = Linear | Norm | Gone


def read_once(reader: Node, node: Node) -> bool:
    """Whether the node stands once among the reader's arguments."""
    found: list[Node] = []
    torch.fx.node.map_arg((reader.args, reader.kwargs), found.append)
    return found.count(node) == 1


def axis_vector(values: Tensor, axis: int, size: int) -> Tensor:
    """`[size]` from values that vary along this axis alone.

    Raises:
        CannotFold: They vary along another.
    """
    others = [n for i, n in enumerate(values.shape) if i != axis]
    if any(n != 1 for n in others):
        raise CannotFold("its channels are no channels of what is next to it")
    return values.reshape(-1).expand(size) if values.shape[axis] == 1 else values.reshape(-1)


def collapsed(values: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with size 1 along every axis that none of them varies along."""
    result = list(values)
    for axis in range(result[0].dim()):
        if all(bool((t == t.narrow(axis, 0, 1)).all()) for t in result):
            result = [t.narrow(axis, 0, 1) for t in result]
    return result
