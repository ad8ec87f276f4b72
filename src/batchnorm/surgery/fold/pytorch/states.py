"""The calls that folding changes in a network of PyTorch, as functions that can be evaluated."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from batchnorm.models.graphs.lowering import CONVOLUTIONS, TRANSPOSED
from batchnorm.surgery.fold.arithmetic import ScaleShift, rounded, wide
from batchnorm.surgery.fold.states import CannotFold, Linear, Norm, Window

Lookup = Callable[[Node], Tensor]  # the value of an attribute of the graph


@dataclass(frozen=True, eq=False, kw_only=True)
class TorchLinear(Linear):
    """A convolution, transposed convolution or linear layer.

    Its kind is a function such as `F.conv2d`, or a layer with its own forward method whose class derives from a
    convolution or `nn.Linear`. How such a layer uses its input is unknown.

    Attributes:
        like: The original weight. The new one gets its dtype, device and memory format.
        name: The path of the weight.
    """

    like: Tensor
    name: str

    @classmethod
    def of_call(cls, node: Node, value: Lookup) -> TorchLinear:
        """Return the layer of a function call whose arguments `linear_arguments` finds."""
        given = linear_arguments(node)
        assert given is not None
        _, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
        like = value(weight)
        return cls(
            kind=node.target,
            weight=wide(like),
            bias=None if bias is None else wide(value(bias)),
            groups=given.pop("groups", 1),
            window=_window(given, like.shape[2:]),
            options=given,
            transposed=node.target in TRANSPOSED,
            like=like,
            name=str(weight.target),
        )

    @classmethod
    def of_layer(cls, node: Node, layer: Any) -> TorchLinear:
        """Return the layer of a call that was not traced and for which `is_linear_layer` holds."""
        return cls(
            kind=layer,
            weight=wide(layer.weight),
            bias=None if layer.bias is None else wide(layer.bias),
            groups=getattr(layer, "groups", 1),
            transposed=isinstance(layer, _ConvTransposeNd),
            opaque=True,
            like=layer.weight.detach(),
            name=f"{node.target}.weight",
        )

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weight, bias and border kernel as they are stored.

        Raises:
            arithmetic.NotRepresentable: One is not finite in the weight's dtype.
        """
        bias, border = (None if t is None else rounded(t, self.like) for t in (self.bias, self.border))
        return rounded(self.weight, self.like), bias, border

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result for x: with the weights as they are stored, or for float64 x before rounding."""
        weight, bias, border = (self.weight, self.bias, self.border) if x.dtype == torch.float64 else self.tensors
        held = [None if t is None else t.to(device=x.device, dtype=x.dtype) for t in (weight, bias, border)]
        if self.opaque:
            return with_parameters(self.kind, *held[:2])(x)
        result: Tensor = self.calls(lambda function, args, kwargs=None: function(*args, **(kwargs or {})), x, *held)
        return result

    def calls(self, call: Callable[..., Any], x: Any, weight: Any, bias: Any, border: Any) -> Any:
        """Return the result of the calls that compute the layer, each made by `call(function, args, kwargs)`."""

        def groups(number: int) -> dict[str, int]:
            # torch's quantization needs the argument, although 1 is the default.
            return {} if self.kind is F.linear else {"groups": number}

        y = call(self.kind, (x, weight, bias), self.options | groups(self.groups))
        if border is None:
            return y
        ones = call(torch.ones_like, (call(operator.getitem, (x, (slice(0, 1), slice(0, 1)))),))
        return call(operator.add, (y, call(self.kind, (ones, border, None), self.options | groups(1))))


@dataclass(frozen=True, eq=False, kw_only=True)
class TorchNorm(Norm):
    """Batch normalization with fixed statistics.

    Attributes:
        like: The original running mean. New tensors get its dtype and device.
    """

    like: Tensor

    @classmethod
    def of_call(cls, node: Node, value: Lookup) -> TorchNorm:
        """Return the batch normalization that a call of `F.batch_norm` computes.

        Raises:
            CannotFold: It uses the batch's statistics, or its tensors are computed or not finite.
        """
        _, running_mean, running_var, weight, bias, training, _, eps = node.args
        if training or running_mean is None:
            raise CannotFold("it uses the batch's statistics in evaluation too")
        held: list[Any] = [running_mean, running_var, weight, bias]
        if any(t is not None and (not isinstance(t, Node) or t.op != "get_attr") for t in held):
            raise CannotFold("its statistics or parameters are computed")
        mean, var, gamma, beta = (None if t is None else value(t) for t in held)
        assert mean is not None
        return cls(scale_shift=ScaleShift.of(mean, var, gamma, beta, float(eps)), like=mean)  # type: ignore[arg-type]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Return mean, variance, weight, bias and eps as they are stored."""
        zeros = torch.zeros_like(self.like)
        scale, shift = (rounded(t, self.like) for t in (self.scale_shift.scale, self.scale_shift.shift))
        return zeros, torch.ones_like(self.like), scale, shift, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result for x."""
        if x.dtype == torch.float64:
            along = (1, -1, *(1,) * (x.dim() - 2))
            s = self.scale_shift
            return x * s.scale.to(x.device).reshape(along) + s.shift.to(x.device).reshape(along)
        mean, var, weight, bias, eps = self.arguments()
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _window(options: dict[str, Any], kernel: torch.Size) -> Window:
    def each(name: str, default: int) -> tuple[int, ...]:
        value = options.get(name, default)
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return values * len(kernel) if len(values) == 1 else values

    stride, dilation, given = each("stride", 1), each("dilation", 1), options.get("padding", 0)
    if given == "same":
        total = [step * (taps - 1) for step, taps in zip(dilation, kernel, strict=True)]
        padding = tuple((n // 2, n - n // 2) for n in total)
    else:
        padding = tuple((n, n) for n in ((0,) * len(kernel) if given == "valid" else each("padding", 0)))
    return Window(stride, dilation, padding, any(each("output_padding", 0)))


def linear_arguments(node: Node) -> dict[str, Any] | None:
    """Return the arguments of a convolution or linear function by name; None if weights or options are computed."""
    names: tuple[str, ...] = ()
    if node.target in CONVOLUTIONS:
        names = ("stride", "padding", "dilation", "groups")
    elif node.target in TRANSPOSED:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given: dict[str, Any] = {**dict(zip(("input", "weight", "bias", *names), node.args, strict=False)), **node.kwargs}
    stored = [t for t in (given["weight"], given.get("bias")) if t is not None]
    if not all(isinstance(t, Node) and t.op == "get_attr" for t in stored):
        return None
    return None if any(isinstance(given.get(name), Node) for name in names) else given


def is_linear_layer(node: Node, layer: nn.Module) -> bool:
    """Return whether an untraced call, such as a convolution that pads by its input's size, is linear in a weight.

    The class suggests this. Like every fold, it is tried before it is used.
    """
    plain = set(layer._parameters) == {"weight", "bias"} and not layer._buffers
    return plain and isinstance(layer, (nn.Linear, _ConvNd)) and not node.kwargs and len(node.args) == 1


def with_parameters(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """Return a copy of the layer with other parameters."""
    other = copy.copy(layer)
    other._parameters = {
        name: value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        for name, value in (("weight", weight), ("bias", bias))
    }
    return other
