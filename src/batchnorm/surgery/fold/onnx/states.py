"""The calls that folding changes in an ONNX graph, and the nodes that they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.fold.onnx.graph import DTYPES, Constants, Operator, Parameter
from batchnorm.surgery.fold.states import CannotFold, Linear, NewConstants, Norm, State, Window

TYPES = {dtype: number for number, dtype in DTYPES.items()}
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_WINDOW = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "output_padding", "output_shape")


@dataclass
class Writer:
    """Where a state writes its nodes.

    Attributes:
        name: Returns the present name of a tensor of the original graph.
        inputs: Returns the present names of what a call reads.
        parameter: Returns the original constant of a name.
        store: Stores a tensor under a name like the given one, and returns the name.
        fresh: Returns a name like the given one that nothing has yet.
        opset: The version to write for.
    """

    name: Callable[[str], str]
    inputs: Callable[[Call], list[str]]
    parameter: Callable[[str], Parameter]
    store: Callable[[str, Tensor], str]
    fresh: Callable[[str], str]
    opset: int


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxLinear(Linear):
    """A convolution, transposed convolution, Gemm, or MatMul by a constant.

    Its kind is the type of the node.

    Attributes:
        like: The constants that the weight and, if there was one, the bias were.
    """

    like: tuple[Parameter, Parameter | None]

    @classmethod
    def of(cls, constants: Constants, operator: Operator) -> OnnxLinear:
        """Return the layer that an operator is.

        Raises:
            CannotFold: Its weight or bias is computed, or it is not linear in its first input.
        """
        op, (_, weight_name, *names) = operator.op, operator.inputs
        if op == "MatMul" and constants.tensor(weight_name) is None:
            raise CannotFold("the weight of the MatMul next to it is computed, or is its left factor")
        like = constants.parameter(weight_name, f"the weight of the {op} next to it")
        bias_like = constants.parameter(names[0], f"the bias of the {op} next to it") if names else None
        layer = cls(
            kind=op,
            weight=like.value,
            bias=None if bias_like is None else bias_like.value,
            groups=operator.attribute("group", 1),
            options={name: value for name in _WINDOW if (value := operator.attribute(name)) is not None},
            transposed=op == "ConvTranspose",
            takes_bias=op != "MatMul",
            like=(like, bias_like),
        )
        if op == "MatMul":
            if layer.dims:
                raise CannotFold("the weight of the MatMul next to it is no matrix")
            return replace(layer, weight=layer.weight.T)
        return layer._of_gemm(operator) if op == "Gemm" else replace(layer, window=_window(layer.options, layer.dims))

    def _of_gemm(self, operator: Operator) -> OnnxLinear:
        """Return the layer with Gemm's transpositions and factors applied."""
        if operator.attribute("transA", 0):
            raise CannotFold("the Gemm next to it transposes its input")
        transposed = operator.attribute("transB", 0)
        weight = (self.weight if transposed else self.weight.T) * operator.attribute("alpha", 1.0)
        bias = self.bias
        if bias is not None:
            if bias.dim() > 1 and bias.shape[0] != 1:
                raise CannotFold("the bias of the Gemm next to it differs between samples")
            bias = (bias * operator.attribute("beta", 1.0)).reshape(-1).expand(weight.shape[0])
        return replace(self, weight=weight, bias=bias, options={"transB": transposed})

    def after(self, s: ScaleShift) -> OnnxLinear:
        """Return the layer followed by this scale and shift `[out]`, without a bias if it needs none."""
        result = super().after(s)
        return replace(result, bias=None) if self.bias is None and not s.shifts else result

    def write(self, call: Call, to: Writer) -> list[onnx.NodeProto]:
        """Return the nodes that compute it.

        Raises:
            arithmetic.NotRepresentable: A weight is not finite in the original's dtype.
            CannotFold: This version of ONNX has no operators for it.
        """
        like, bias_like = self.like
        inputs, output = to.inputs(call)[:1], to.name(call.node.outputs[0])
        is_transposed = self.kind == "MatMul" or (self.kind == "Gemm" and not self.options["transB"])
        weight = self.weight.T.contiguous() if is_transposed else self.weight
        inputs.append(to.store(like.name, like.rounded(weight)))
        bias = None
        if self.bias is not None:
            name = bias_like.name if bias_like is not None else to.fresh(f"{like.name}_bias")
            bias = to.store(name, (bias_like or like).rounded(self.bias))
        name = call.node.name
        if self.kind == "MatMul":
            if bias is None:
                return [helper.make_node("MatMul", inputs, [output], name=name)]
            product = to.fresh(f"{output}_product")
            return [
                helper.make_node("MatMul", inputs, [product], name=name),
                helper.make_node("Add", [product, bias], [output], name=f"{name}_bias"),
            ]
        if bias is not None:
            inputs.append(bias)
        elif self.kind == "Gemm" and to.opset < 11:  # needs one there
            inputs.append(to.store(to.fresh(f"{like.name}_bias"), torch.zeros(1, dtype=like.dtype)))
        options = self.options | ({} if self.groups == 1 else {"group": self.groups})
        if self.border is None:
            return [helper.make_node(self.kind, inputs, [output], name=name, **options)]
        inner = to.fresh(f"{output}_inner")
        return [
            helper.make_node(self.kind, inputs, [inner], name=name, **options),
            *self._border_nodes(to.inputs(call)[0], inner, output, name, to),
        ]

    def _border_nodes(self, source: str, inner: str, output: str, name: str, to: Writer) -> list[onnx.NodeProto]:
        """Return the nodes that add the shift near the border: a convolution of ones with one channel."""
        assert self.border is not None
        if to.opset < 9:
            raise CannotFold("this version of ONNX cannot write what its shift adds at the border (9 can)")
        like = self.like[0]
        whole, sizes, shape, ones, added = (
            to.fresh(f"{output}_{part}") for part in ("shape", "sizes", "ones_shape", "ones", "border")
        )
        positions = to.store(to.fresh(f"{output}_positions"), torch.arange(2, 2 + self.dims))
        first = to.store(to.fresh(f"{output}_one"), torch.ones(2, dtype=torch.int64))
        kernel = to.store(to.fresh(f"{like.name}_border"), like.rounded(self.border))
        one = helper.make_tensor("one", TYPES[like.dtype], [1], [1.0])
        return [
            helper.make_node("Shape", [source], [whole]),
            helper.make_node("Gather", [whole, positions], [sizes]),
            helper.make_node("Concat", [first, sizes], [shape], axis=0),
            helper.make_node("ConstantOfShape", [shape], [ones], value=one),
            helper.make_node(self.kind, [ones, kernel], [added], name=f"{name}_border", **self.options),
            helper.make_node("Add", [inner, added], [output], name=f"{name}_sum"),
        ]


def _window(options: Mapping[str, Any], dims: int) -> Window:
    auto, pads = options.get("auto_pad", "NOTSET"), options.get("pads", (0,) * 2 * dims)
    padding = None
    if not auto.startswith("SAME"):
        padding = ((0, 0),) * dims if auto == "VALID" else tuple(zip(pads[:dims], pads[dims:], strict=True))
    stride, dilation = (tuple(options.get(name, (1,) * dims)) for name in ("strides", "dilations"))
    return Window(stride, dilation, padding, any(options.get("output_padding", ())) or "output_shape" in options)


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxNorm(Norm):
    """Batch normalization with fixed statistics.

    Attributes:
        like: The constants that its scale, bias, mean and variance were.
    """

    like: tuple[Parameter, ...]

    @classmethod
    def of(cls, constants: Constants, operator: Operator) -> OnnxNorm:
        """Return the batch normalization that an operator is.

        Raises:
            CannotFold: It uses the batch's statistics, or its tensors are computed or not finite.
        """
        if operator.attribute("training_mode", 0) or len(operator.outputs) != 1:
            raise CannotFold("it uses the batch's statistics: it is in training mode")
        if not operator.attribute("spatial", 1):
            raise CannotFold("it has separate statistics for every position (spatial=0)")
        _, *names = operator.node.input
        like = tuple(
            constants.parameter(name, f"its {what}")
            for name, what in zip(names, ("scale", "bias", "mean", "variance"), strict=True)
        )
        scale, bias, mean, var = (parameter.value for parameter in like)
        s = ScaleShift.of(mean, var, scale, bias, float(operator.attribute("epsilon", 1e-5)))
        return cls(scale_shift=s, like=like)

    def write(self, call: Call, to: Writer) -> list[onnx.NodeProto]:
        """Return the node that computes it."""
        node = onnx.NodeProto()
        node.CopyFrom(call.node.node)
        zeros = torch.zeros_like(self.scale_shift.shift)
        values = (self.scale_shift.scale, self.scale_shift.shift, zeros, zeros + 1)
        names = [to.store(p.name, p.rounded(value)) for p, value in zip(self.like, values, strict=True)]
        del node.input[:]
        node.input.extend([to.inputs(call)[0], *names])
        node.output[0] = to.name(call.node.outputs[0])
        kept = [a for a in node.attribute if a.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("epsilon", 0.0)])
        return [node]


def write(call: Call, state: State | None, to: Writer) -> list[onnx.NodeProto]:
    """Return the nodes of a call, changed or as it was."""
    if isinstance(state, (OnnxLinear, OnnxNorm)):
        return state.write(call, to)
    constants = {}
    if isinstance(state, NewConstants):
        for name, value in state.values.items():
            like = to.parameter(name)
            constants[name] = to.store(like.name, like.rounded(value))
    node = onnx.NodeProto()
    node.CopyFrom(call.node.node)
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            names[i] = constants.get(name) or (to.name(name) if name else "")
    return [node]


def as_tensor(name: str, value: Tensor) -> TensorProto:
    """Return the values as ONNX stores them."""
    kind = TensorProto.INT64 if value.dtype == torch.int64 else TYPES[value.dtype]
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return helper.make_tensor(name, kind, tuple(value.shape), data, raw=True)


def renamed(tensor: TensorProto, name: str) -> TensorProto:
    """Return a copy with another name."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
