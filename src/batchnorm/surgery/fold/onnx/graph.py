"""The operators and constants of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from batchnorm.surgery.fold.arithmetic import rounded
from batchnorm.surgery.fold.states import CannotFold

Array = NDArray[Any]

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
# Operators that compute constants from constants. DequantizeLinear is not one: folding would undo the quantization.
_OF_CONSTANTS = {
    "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Expand", "Cast", "CastLike",
    "Concat", "ConstantOfShape", "Gather", "Slice", "Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Pow",
}  # fmt: skip


@dataclass(eq=False)
class Operator:
    """One node of the graph.

    Attributes:
        node: The node.
    """

    node: onnx.NodeProto

    @property
    def op(self) -> str:
        """The type, preceded by the domain if that is not ONNX's own."""
        domain = self.node.domain
        return self.node.op_type if domain in ("", "ai.onnx") else f"{domain}.{self.node.op_type}"

    @property
    def name(self) -> str:
        """The name, or the first result's name if it has none."""
        return self.node.name or self.node.output[0]

    @property
    def inputs(self) -> list[str]:
        """The inputs that are given."""
        return [name for name in self.node.input if name]

    @property
    def outputs(self) -> list[str]:
        """The outputs that are used."""
        return [name for name in self.node.output if name]

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that are given."""
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as str."""
        value = self.attributes().get(name, default)
        return value.decode() if isinstance(value, bytes) else value


@dataclass(frozen=True)
class Parameter:
    """A floating-point constant of the graph.

    Attributes:
        value: Its value in float64.
        dtype: Its dtype.
        name: The name of the tensor that stores it.
    """

    value: Tensor
    dtype: torch.dtype
    name: str

    def rounded(self, value: Tensor) -> Tensor:
        """Return a value in the constant's dtype.

        Raises:
            arithmetic.NotRepresentable: It is not finite in it.
        """
        return rounded(value, torch.empty(0, dtype=self.dtype, device="cpu"))


class Constants:
    """The constants of a model's main graph: initializers, `Constant` nodes, and tensors computed from these."""

    def __init__(self, model: onnx.ModelProto, operators: Sequence[Operator], values: Mapping[str, Array]) -> None:
        """Read the model. `operators` are its operators, and `values` the values of every tensor in a run."""
        self._opset = opset_version(model)
        self._values = values
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        # From this version on the caller may replace an initializer that is listed among the inputs.
        self._replaceable = {i.name for i in model.graph.input} if model.ir_version >= 4 else set()
        self._writers = {name: operator for operator in operators for name in operator.outputs}
        self._found: dict[str, TensorProto | None] = {}

    def tensor(self, name: str) -> TensorProto | None:
        """Return the constant of this name, stored or computed from others; None if it is not a constant."""
        if name not in self._found:
            self._found[name] = self._find_constant(name)
        return self._found[name]

    def _find_constant(self, name: str) -> TensorProto | None:
        if name in self._initializers:
            return None if name in self._replaceable else self._initializers[name]
        operator = self._writers.get(name)
        if operator is None:
            return None
        if operator.op == "Constant":
            return _constant(operator)
        if operator.op == "Identity":
            return self.tensor(operator.node.input[0])
        # The run does not give integers of 4 bits, which runtimes round in different ways.
        known = operator.op in _OF_CONSTANTS and name in self._values
        return self._computed(operator) if known else None

    def _computed(self, operator: Operator) -> TensorProto | None:
        arrays: dict[str, Array] = {}
        for i, each in enumerate(operator.node.input):
            array = self.array(each)
            if array is None and i == 1 and operator.op == "CastLike":  # only its type matters
                array = self._values.get(each)
            if array is None:
                return None
            arrays[each] = array
        with np.errstate(all="ignore"):  # a mask may overflow to -inf
            found: Any = ReferenceEvaluator(operator.node, opsets={"": self._opset}).run(None, arrays)
        return numpy_helper.from_array(np.asarray(found[0], order="C"), operator.node.output[0])

    def array(self, name: str) -> Array | None:
        """Return the constant of this name as an array; None if it is not a constant."""
        tensor = self.tensor(name) if name else None
        return None if tensor is None else numpy_helper.to_array(tensor)

    def parameter(self, name: str, what: str) -> Parameter:
        """Return the floating-point constant of this name; `what` names it in the error.

        Raises:
            CannotFold: It is computed, can be replaced by the caller, or holds other numbers.
        """
        tensor = self.tensor(name)
        if tensor is None:
            given = name in self._replaceable
            raise CannotFold(f"{what} is {'given by the caller' if given else 'computed, not a constant'}")
        if tensor.data_type not in DTYPES:
            raise CannotFold(f"{what} is of type {TensorProto.DataType.Name(tensor.data_type)}")
        value = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float64))
        return Parameter(value, DTYPES[int(tensor.data_type)], self._origin(name))

    def _origin(self, name: str) -> str:
        operator = self._writers.get(name)
        return self._origin(operator.node.input[0]) if operator is not None and operator.op == "Identity" else name


def _constant(operator: Operator) -> TensorProto | None:
    for name, value in operator.attributes().items():
        if name == "value":
            return value
        if name in ("value_float", "value_floats"):
            array = np.asarray(value, np.float32)
        elif name in ("value_int", "value_ints"):
            array = np.asarray(value, np.int64)
        else:
            continue
        return numpy_helper.from_array(array, operator.node.output[0])
    return None


def opset_version(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of a node such as If or Loop."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def every_node(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of the graph, of its bodies and of the model's functions."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in nodes:
        nodes += (inner for body in subgraphs(node) for inner in body.node)
        yield node


def every_graph(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and its bodies, and the bodies in the model's functions."""
    yield model.graph
    for node in every_node(model):
        yield from subgraphs(node)


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield every constant of the graph, of its bodies and of the model's functions."""
    for graph in every_graph(model):
        yield from graph.initializer
    for node in every_node(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names that a body reads or returns. Names of the graph around it keep their meaning there."""
    for node in graph.node:
        yield from node.input
        for inner in subgraphs(node):
            yield from names_in(inner)
    for output in graph.output:
        yield output.name


def every_name(model: onnx.ModelProto) -> Iterator[str]:
    """Yield every name of a tensor in the graph and its bodies."""
    for graph in every_graph(model):
        for named in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            yield named.name
        yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for node in every_node(model):
        yield from (*node.input, *node.output)
