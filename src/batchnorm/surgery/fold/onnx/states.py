"""The calls that folding changes, with their weights in float64, and the nodes that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from batchnorm.surgery.fold.arithmetic import ScaleShift, rounded
from batchnorm.surgery.fold.linear import LinearLayer
from batchnorm.surgery.fold.onnx.network import DTYPES, Call, Network, Parameter
from batchnorm.surgery.fold.states import CannotFold

TYPES = {dtype: number for number, dtype in DTYPES.items()}
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_WINDOW = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "group", "output_padding", "output_shape")


@dataclass
class Writer:
    """Where a state writes its nodes.

    Attributes:
        name: The name that a tensor of the original graph has here.
        store: Keeps a tensor under a name like the given one, and returns the name it has got.
        fresh: A name that nothing has yet.
        opset: The version to write for.
    """

    name: Callable[[str], str]
    store: Callable[[str, Tensor], str]
    fresh: Callable[[str], str]
    opset: int


@dataclass(frozen=True, eq=False)
class Linear(LinearLayer):
    """A convolution, transposed convolution, Gemm, or MatMul by a constant.

    Attributes:
        op: Its type.
        source: The name of its input.
        weight: float64, as `arithmetic` has it.
        bias: `[out]`, float64, or None.
        border: The kernel of what is added for a shift that stood before padding or a transposed convolution.
        like: The parameter that the weight was; and the bias, where there was one.
        options: The attributes of a convolution.
    """

    op: str
    source: str
    weight: Tensor
    bias: Tensor | None
    border: Tensor | None
    like: tuple[Parameter, Parameter | None]
    options: dict[str, Any]

    @classmethod
    def of(cls, network: Network, call: Call) -> Linear:
        """From a call.

        Raises:
            CannotFold: Its weight or bias is computed, or it is of a kind that is not a linear layer.
        """
        inputs = list(call.node.input)
        if call.op == "MatMul" and network.tensor(inputs[1]) is None:
            raise CannotFold("the weight of the MatMul next to it is computed, or stands on the left")
        like = network.parameter(inputs[1], f"the weight of the {call.op} next to it")
        given = inputs[2] if len(inputs) > 2 and inputs[2] else None
        bias_like = None if given is None else network.parameter(given, f"the bias of the {call.op} next to it")
        weight, bias = like.value, None if bias_like is None else bias_like.value
        if call.op == "MatMul":
            if weight.dim() != 2:
                raise CannotFold("the weight of the MatMul next to it is no matrix")
            return cls("MatMul", inputs[0], weight.T, None, None, (like, None), {})
        if call.op == "Gemm":
            if call.attribute("transA", 0):
                raise CannotFold("the Gemm next to it transposes its input")
            weight = (weight if call.attribute("transB", 0) else weight.T) * call.attribute("alpha", 1.0)
            if bias is not None:
                if bias.dim() > 1 and bias.shape[0] != 1:
                    raise CannotFold("the bias of the Gemm next to it differs between samples")
                bias = (bias * call.attribute("beta", 1.0)).reshape(-1).expand(weight.shape[0])
            return cls(
                "Gemm", inputs[0], weight, bias, None, (like, bias_like), {"transB": call.attribute("transB", 0)}
            )
        options = {name: value for name in _WINDOW if (value := call.attribute(name)) is not None}
        return cls(call.op, inputs[0], weight, bias, None, (like, bias_like), options)

    @property
    def dims(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""
        return self.weight.dim() - 2

    @property
    def axis(self) -> int:
        """Where its channels are."""
        return -1 if self.dims == 0 else 1

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.op == "ConvTranspose"

    @property
    def groups(self) -> int:
        """1 for a linear layer."""
        return int(self.options.get("group", 1))

    def each(self, name: str, default: int) -> tuple[int, ...]:
        """An attribute with one number for every dimension; `pads` has two."""
        count = 2 * self.dims if name == "pads" else self.dims
        return tuple(self.options.get(name, (default,) * count))

    @property
    def padded(self) -> bool:
        """Whether padding is chosen by the input's size, or not zero."""
        auto = self.options.get("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            return set(self.weight.shape[2:]) != {1} or set(self.each("strides", 1)) != {1}
        return auto != "VALID" and any(self.each("pads", 0))

    def _sees_whole_kernel(self) -> bool:
        """Whether every output has all of the kernel inside the input."""
        if self.transposed:
            pointwise = set(self.weight.shape[2:]) == {1} and set(self.each("strides", 1)) == {1}
            plain = set(self.each("output_padding", 0)) == {0} and "output_shape" not in self.options
            return pointwise and plain and not self.padded
        return self.dims == 0 or not self.padded

    def _with(self, **changes: Any) -> Linear:
        return replace(self, **changes)

    def after(self, s: ScaleShift) -> Linear:
        """With this scale and shift `[out]` after it, and still no bias where none is needed."""
        result = super().after(s)
        return result.without_bias() if self.bias is None and not s.shifts else result

    def _bias_plus(self, more: Tensor) -> Tensor | None:
        return super()._bias_plus(more) if self.bias is not None or bool((more != 0).any()) else None

    def without_bias(self) -> Linear:
        """With nothing added."""
        return replace(self, bias=None)

    def write(self, call: Call, to: Writer) -> list[onnx.NodeProto]:
        """The nodes that compute it.

        Raises:
            arithmetic.NotRepresentable: A weight is not finite in the parameter's dtype.
            CannotFold: This version of ONNX cannot say it.
        """
        like, bias_like = self.like
        inputs, output = [to.name(self.source)], to.name(call.node.output[0])
        matrix = self.weight.T if self.op == "MatMul" or (self.op == "Gemm" and not self.options["transB"]) else None
        inputs.append(
            to.store(like.name, rounded(self.weight if matrix is None else matrix.contiguous(), like.rounded_like()))
        )
        bias = None
        if self.bias is not None:
            name = bias_like.name if bias_like is not None else to.fresh(f"{like.name}_bias")
            bias = to.store(name, rounded(self.bias, (bias_like or like).rounded_like()))
        name = call.name
        if self.op == "MatMul":
            if bias is None:
                return [helper.make_node("MatMul", inputs, [output], name=name)]
            product = to.fresh(f"{output}_product")
            return [
                helper.make_node("MatMul", inputs, [product], name=name),
                helper.make_node("Add", [product, bias], [output], name=f"{name}_bias"),
            ]
        if bias is not None:
            inputs.append(bias)
        elif self.op == "Gemm" and to.opset < 11:  # needs one there
            inputs.append(to.store(to.fresh(f"{like.name}_bias"), torch.zeros(1, dtype=like.dtype)))
        options = dict(self.options)
        if self.border is None:
            return [helper.make_node(self.op, inputs, [output], name=name, **options)]
        inner = to.fresh(f"{output}_inner")
        return [
            helper.make_node(self.op, inputs, [inner], name=name, **options),
            *self._border_nodes(inner, output, name, to),
        ]

    def _border_nodes(self, inner: str, output: str, name: str, to: Writer) -> list[onnx.NodeProto]:
        """What a shift adds where the kernel reaches over the border: a convolution of ones with one channel."""
        assert self.border is not None
        if to.opset < 9:
            raise CannotFold("this version of ONNX cannot write what its shift adds at the border (9 can)")
        like = self.like[0]
        whole, sizes, shape, ones, added = (
            to.fresh(f"{output}_{part}") for part in ("shape", "sizes", "ones_shape", "ones", "border")
        )
        positions = to.store(to.fresh(f"{output}_positions"), torch.arange(2, 2 + self.dims))
        first = to.store(to.fresh(f"{output}_one"), torch.ones(2, dtype=torch.int64))
        kernel = to.store(to.fresh(f"{like.name}_border"), rounded(self.border, like.rounded_like()))
        one = helper.make_tensor("one", TYPES[like.dtype], [1], [1.0])
        options = {k: v for k, v in self.options.items() if k != "group"}
        return [
            helper.make_node("Shape", [to.name(self.source)], [whole]),
            helper.make_node("Gather", [whole, positions], [sizes]),
            helper.make_node("Concat", [first, sizes], [shape], axis=0),
            helper.make_node("ConstantOfShape", [shape], [ones], value=one),
            helper.make_node(self.op, [ones, kernel], [added], name=f"{name}_border", **options),
            helper.make_node("Add", [inner, added], [output], name=f"{name}_sum"),
        ]


@dataclass(frozen=True, eq=False)
class Norm:
    """Batch normalization with fixed statistics.

    Attributes:
        source: The name of its input.
        like: Its scale, bias, mean and variance.
        scale_shift: What it computes, `[C]`, with what was folded into it.
    """

    source: str
    like: tuple[Parameter, ...]
    scale_shift: ScaleShift

    @classmethod
    def of(cls, network: Network, call: Call) -> Norm:
        """From a call.

        Raises:
            CannotFold: It uses the batch's statistics, or its parameters are computed.
        """
        outputs = [name for name in call.node.output if name]
        if call.attribute("training_mode", 0) or len(outputs) != 1:
            raise CannotFold("it uses the batch's statistics: it is in training mode")
        if not call.attribute("spatial", 1):
            raise CannotFold("it has statistics of its own for every position (spatial=0)")
        source, *names = call.node.input
        held = tuple(
            network.parameter(name, f"its {what}")
            for name, what in zip(names, ("scale", "bias", "mean", "variance"), strict=True)
        )
        scale, bias, mean, var = (parameter.value for parameter in held)
        s = ScaleShift.of(mean, var, scale, bias, float(call.attribute("epsilon", 1e-5)))
        if not (s.scale.isfinite().all() and s.shift.isfinite().all()):
            raise CannotFold("its scale or shift is not finite")
        return cls(source, held, s)

    def then(self, s: ScaleShift) -> Norm:
        """With this after it."""
        return replace(self, scale_shift=self.scale_shift.then(s))

    def before(self, s: ScaleShift) -> Norm:
        """With this before it."""
        return replace(self, scale_shift=s.then(self.scale_shift))

    def write(self, call: Call, to: Writer) -> list[onnx.NodeProto]:
        """The node that computes it."""
        node = onnx.NodeProto()
        node.CopyFrom(call.node)
        zeros = torch.zeros_like(self.scale_shift.shift)
        values = (self.scale_shift.scale, self.scale_shift.shift, zeros, zeros + 1)
        names = [to.store(p.name, rounded(value, p.rounded_like())) for p, value in zip(self.like, values, strict=True)]
        del node.input[:]
        node.input.extend([to.name(self.source), *names])
        node.output[0] = to.name(call.node.output[0])
        kept = [a for a in node.attribute if a.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("epsilon", 0.0)])
        return [node]


@dataclass(frozen=True, eq=False)
class Added:
    """A tensor to which a constant is added.

    Attributes:
        source: The name of the tensor.
        value: The constant, float64.
        like: What it was.
    """

    source: str
    value: Tensor
    like: Parameter

    @classmethod
    def of(cls, network: Network, call: Call) -> Added | None:
        """From an addition; None where neither term is a constant."""
        terms = list(call.node.input)
        held = [network.tensor(name) is not None for name in terms]
        if sum(held) != 1:
            return None
        like = network.parameter(terms[held.index(True)], "what is added before it")
        return cls(terms[held.index(False)], like.value, like)

    def then(self, s: ScaleShift) -> Added:
        """The constant that is right where the source has become `s.scale` of what it was, and the sum `s` of it."""
        value = self.value * s.scale + s.shift
        while value.dim() > self.value.dim() and value.shape[0] == 1:
            value = value.squeeze(0)
        return replace(self, value=value)

    def write(self, call: Call, to: Writer) -> list[onnx.NodeProto]:
        """The node that computes it."""
        constant = to.store(self.like.name, rounded(self.value, self.like.rounded_like()))
        terms, output = [to.name(self.source), constant], to.name(call.node.output[0])
        return [helper.make_node("Add", terms, [output], name=call.node.name)]


State = Linear | Norm | Added


def write(call: Call, state: State | None, to: Writer) -> list[onnx.NodeProto]:
    """The nodes of a call, changed or as it was."""
    if state is not None:
        return state.write(call, to)
    node = onnx.NodeProto()
    node.CopyFrom(call.node)
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            names[i] = to.name(name) if name else ""
    return [node]


def as_tensor(name: str, value: Tensor) -> TensorProto:
    """The values as ONNX stores them."""
    kind = TensorProto.INT64 if value.dtype == torch.int64 else TYPES[value.dtype]
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return helper.make_tensor(name, kind, tuple(value.shape), data, raw=True)


def renamed(tensor: TensorProto, name: str) -> TensorProto:
    """A copy under another name."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
