"""Write the calls of an ONNX graph as nodes."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch
from onnx import NodeProto, TensorProto
from onnx.helper import make_attribute, make_node, make_tensor
from torch import Tensor

from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.fold.onnx.graph import DTYPES, Constants
from batchnorm.surgery.fold.onnx.states import OnnxLinear, OnnxNorm
from batchnorm.surgery.fold.states import CannotFold, NewConstants, State

_TYPES = {dtype: number for number, dtype in DTYPES.items()} | {torch.int64: TensorProto.INT64}


class Writer:
    """Write the calls of a network as nodes.

    Args:
        constants: The network's constants.
        opset: The version of ONNX's own operators.
        resolve: Returns the name that replaces a name.
        store: Stores a tensor under a name like the given one, and returns the name.
        fresh: Returns a name like the given one that nothing has yet.
    """

    def __init__(
        self,
        constants: Constants,
        opset: int,
        resolve: Callable[[str], str],
        store: Callable[[str, Tensor], str],
        fresh: Callable[[str], str],
    ) -> None:
        self._constants, self._opset, self._resolve, self._store, self._fresh = constants, opset, resolve, store, fresh

    def nodes(self, call: Call, state: State | None) -> list[NodeProto]:
        """Return the nodes of a call in this state.

        Raises:
            arithmetic.NotRepresentable: A weight is not finite in the original's dtype.
            CannotFold: This version of ONNX has no operators for it.
        """
        if isinstance(state, OnnxLinear):
            return self._linear(call, state)
        names = {}
        if isinstance(state, NewConstants):
            for name, value in state.values.items():
                like = self._constants.parameter(name, name)
                names[name] = self._store(like.name, like.rounded(value))
        node = NodeProto()
        node.CopyFrom(call.node.node)
        if isinstance(state, OnnxNorm):
            self._norm(node, state)
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = names.get(name) or (self._resolve(name) if name else "")
        return [node]

    def _norm(self, node: NodeProto, state: OnnxNorm) -> None:
        """Give a batch normalization neutral statistics, and the scale and shift as weight and bias."""
        zeros = torch.zeros_like(state.scale_shift.shift)
        values = (state.scale_shift.scale, state.scale_shift.shift, zeros, zeros + 1)
        node.input[1:] = [self._store(p.name, p.rounded(value)) for p, value in zip(state.like, values, strict=True)]
        kept = [attribute for attribute in node.attribute if attribute.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, make_attribute("epsilon", 0.0)])

    def _linear(self, call: Call, state: OnnxLinear) -> list[NodeProto]:
        op, name, (like, bias_like) = state.kind, call.node.name, state.like
        source, output = call.inputs[0], self._resolve(call.node.outputs[0])
        is_transposed = op == "MatMul" or (op == "Gemm" and not state.options["transB"])
        weight = like.rounded(state.weight.T.contiguous() if is_transposed else state.weight)
        inputs = [source, self._store(like.name, weight)]
        if state.bias is not None:
            bias_name = self._fresh(f"{like.name}_bias") if bias_like is None else bias_like.name
            inputs.append(self._store(bias_name, (bias_like or like).rounded(state.bias)))
        elif op == "Gemm" and self._opset < 11:  # the bias is not optional there
            inputs.append(self._store(self._fresh(f"{like.name}_bias"), torch.zeros(1, dtype=like.dtype, device="cpu")))
        if op == "MatMul" and state.bias is not None:
            product = self._fresh(f"{output}_product")
            addition = make_node("Add", [product, inputs.pop()], [output], name=f"{name}_bias")
            return [make_node("MatMul", inputs, [product], name=name), addition]
        options = state.options | ({} if state.groups == 1 else {"group": state.groups})
        if state.border is None:
            return [make_node(op, inputs, [output], name=name, **options)]
        inner = self._fresh(f"{output}_inner")
        return [make_node(op, inputs, [inner], name=name, **options), *self._border(name, state, source, inner, output)]

    def _border(self, name: str, state: OnnxLinear, source: str, inner: str, output: str) -> list[NodeProto]:
        """Return the nodes that add the shift near the border: a convolution of ones with one channel."""
        assert state.border is not None
        if self._opset < 9:
            raise CannotFold(
                "this version of ONNX cannot express the effect of its shift at the border (version 9 can)"
            )
        like = state.like[0]
        whole, sizes, shape, ones, added = (
            self._fresh(f"{output}_{part}") for part in ("shape", "sizes", "ones_shape", "ones", "border")
        )
        positions = self._store(self._fresh(f"{output}_positions"), torch.arange(2, 2 + state.dims, device="cpu"))
        first = self._store(self._fresh(f"{output}_one"), torch.ones(2, dtype=torch.int64, device="cpu"))
        kernel = self._store(self._fresh(f"{like.name}_border"), like.rounded(state.border))
        one = make_tensor("one", _TYPES[like.dtype], [1], [1.0])
        return [
            make_node("Shape", [source], [whole]),
            make_node("Gather", [whole, positions], [sizes]),
            make_node("Concat", [first, sizes], [shape], axis=0),
            make_node("ConstantOfShape", [shape], [ones], value=one),
            make_node(state.kind, [ones, kernel], [added], name=f"{name}_border", **state.options),
            make_node("Add", [inner, added], [output], name=f"{name}_sum"),
        ]


def as_tensor(name: str, value: Tensor) -> TensorProto:
    """Return the values as ONNX stores them."""
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return make_tensor(name, _TYPES[value.dtype], tuple(value.shape), data, raw=True)


def renamed(tensor: TensorProto, name: str) -> TensorProto:
    """Return a copy with another name."""
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
