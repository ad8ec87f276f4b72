"""An ONNX graph as folding sees it: calls, who reads what, constants, and what has become of the calls so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from batchnorm.surgery.fold.states import CannotFold

if TYPE_CHECKING:
    from batchnorm.surgery.fold.onnx.states import State

Array = NDArray[Any]
Shape = tuple[tuple[int, ...], ...]  # for each axis, its size in each run

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
# What makes a constant of constants. Not DequantizeLinear: folding would undo the quantization.
_OF_CONSTANTS = {
    "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Expand", "Cast", "CastLike",
    "Concat", "ConstantOfShape", "Gather", "Slice", "Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Pow",
}  # fmt: skip
_ASK_SIZES = {"Shape", "Size"}


@dataclass(eq=False)
class Call:
    """One node of the graph.

    Attributes:
        proto: The node; None stands for the graph's results, as a reader.
        index: Its place.
    """

    proto: onnx.NodeProto | None
    index: int

    @property
    def op(self) -> str:
        """Its type, with the domain before it where that is not ONNX's own."""
        if self.proto is None:
            return "output"
        domain = self.proto.domain
        return self.proto.op_type if domain in ("", "ai.onnx") else f"{domain}.{self.proto.op_type}"

    @property
    def node(self) -> onnx.NodeProto:
        """The node of a call that is not the graph's results."""
        assert self.proto is not None
        return self.proto

    @property
    def name(self) -> str:
        """Its name, or its result's where it has none."""
        return self.node.name or self.node.output[0]

    def attributes(self) -> dict[str, Any]:
        """Those that are given."""
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        """One of them; text as str."""
        value = self.attributes().get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def describe(self) -> str:
        """The call in words."""
        if self.proto is None:
            return "the network's output"
        return {"Add": "an addition", "Concat": "a concatenation", "Mul": "a multiplication"}.get(self.op, self.op)


@dataclass(frozen=True)
class Parameter:
    """A constant of the graph.

    Attributes:
        value: float64.
        dtype: Its own.
        name: Of the tensor that holds it.
    """

    value: Tensor
    dtype: torch.dtype
    name: str

    def rounded_like(self) -> Tensor:
        """What `arithmetic.rounded` takes its dtype from."""
        return torch.empty(0, dtype=self.dtype)


class Network:
    """The main graph of a model."""

    def __init__(self, model: onnx.ModelProto, values: Mapping[str, Array], shapes: Mapping[str, Shape]) -> None:
        """Takes the model, and what a run gave for every tensor of its main graph."""
        self.graph = model.graph
        self.opset = opset_version(model)
        self.ir_version = model.ir_version
        self.calls = [Call(node, i) for i, node in enumerate(model.graph.node)]
        self.states: dict[Call, State] = {}
        self.gone: set[Call] = set()
        self.alias: dict[str, str] = {}  # names that have become one
        self.values = dict(values)
        self._shapes = dict(shapes)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        # From this version on the caller may replace an initializer that is listed among the inputs.
        self._replaceable = {i.name for i in model.graph.input} if model.ir_version >= 4 else set()
        self._results = Call(None, len(self.calls))
        self._written: dict[str, Call] = {}
        self._read: dict[str, list[Call]] = {}
        self._constants: dict[str, TensorProto | None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find out anew who writes and reads what, after states and aliases have changed."""
        self._written.clear()
        self._read.clear()
        for call in self.alive():
            for name in call.node.output:
                self._written[self.resolve(name)] = call
            for name in self.reads(call):
                self._read.setdefault(name, []).append(call)
        for output in self.graph.output:
            self._read.setdefault(self.resolve(output.name), []).append(self._results)

    def alive(self) -> Iterator[Call]:
        """The calls that are still made."""
        return (call for call in self.calls if call not in self.gone)

    def reads(self, call: Call) -> list[str]:
        """What the call reads, each name once, with what its subgraphs take from outside."""
        inputs = self.inputs(call)
        inputs += [name for graph in subgraphs(call.node) for name in names_in(graph)]
        return list(dict.fromkeys(self.resolve(name) for name in inputs if name))

    def inputs(self, call: Call) -> list[str]:
        """The call's inputs; of a changed one that which is no constant."""
        state = self.states.get(call)
        return [self.resolve(name) for name in (call.node.input if state is None else [state.source])]

    def resolve(self, name: str, more: Mapping[str, str] | None = None) -> str:
        """The name that stands for this one now; `more` are aliases that are about to be."""
        while True:
            new = self.alias.get(name) or (more.get(name) if more else None)
            if new is None:
                return name
            name = new

    def writer(self, name: str) -> Call | None:
        """The call that computes it; None for inputs and initializers."""
        return self._written.get(self.resolve(name))

    def readers(self, name: str) -> list[Call]:
        """The calls that read its values, not only its size or type."""
        return [call for call in self._read.get(self.resolve(name), []) if not self._asks(call)]

    def _asks(self, call: Call) -> bool:
        return call.op in _ASK_SIZES or (call.op == "CastLike" and self.tensor(call.node.output[0]) is not None)

    def reads_once(self, call: Call, name: str) -> bool:
        """Whether the tensor stands once among the call's inputs."""
        return self.inputs(call).count(self.resolve(name)) == 1

    def shape(self, name: str) -> Shape:
        """Of a tensor.

        Raises:
            CannotFold: It is none, or not of one rank.
        """
        found = self._shapes.get(self.resolve(name), self._shapes.get(name))
        if found is None:
            raise CannotFold(f"the shape of {name} next to it is not known")
        return found

    def size(self, name: str, axis: int) -> int:
        """Along an axis on which it is always the same.

        Raises:
            CannotFold: It is not.
        """
        sizes = set(self.shape(name)[axis])
        if len(sizes) != 1:
            raise CannotFold("its number of channels is open")
        return sizes.pop()

    # Constants -----------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> TensorProto | None:
        """The constant of this name, as it is given or computed from others."""
        if name not in self._constants:
            self._constants[name] = self._find_constant(name)
        return self._constants[name]

    def _find_constant(self, name: str) -> TensorProto | None:
        if name in self._initializers:
            return None if name in self._replaceable else self._initializers[name]
        call = self._written.get(name)
        if call is None:
            return None
        if call.op == "Constant":
            return _constant(call)
        if call.op == "Identity":
            return self.tensor(call.node.input[0])
        return self._computed(call) if call.op in _OF_CONSTANTS else None

    def _computed(self, call: Call) -> TensorProto | None:
        arrays: dict[str, Array] = {}
        for i, each in enumerate(call.node.input):
            array = self.array(each)
            if array is None and i == 1 and call.op == "CastLike":  # its type is all that matters
                array = self.values.get(self.resolve(each))
            if array is None:
                return None
            arrays[each] = array
        found: Any = ReferenceEvaluator(call.node, opsets={"": self.opset}).run(None, arrays)
        return numpy_helper.from_array(np.ascontiguousarray(found[0]), call.node.output[0])

    def array(self, name: str) -> Array | None:
        """The constant of this name as NumPy has it, or None."""
        tensor = self.tensor(name) if name else None
        return None if tensor is None else numpy_helper.to_array(tensor)

    def parameter(self, name: str, what: str) -> Parameter:
        """The constant of this name.

        Raises:
            CannotFold: It is computed, may be replaced by the caller, or holds no floating-point numbers.
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
        call = self._written.get(name)
        return self._origin(call.node.input[0]) if call is not None and call.op == "Identity" else name


def _constant(call: Call) -> TensorProto | None:
    for name, value in call.attributes().items():
        if name == "value":
            return value
        if name in ("value_float", "value_floats"):
            array = np.asarray(value, np.float32)
        elif name in ("value_int", "value_ints"):
            array = np.asarray(value, np.int64)
        else:
            continue
        return numpy_helper.from_array(array, call.node.output[0])
    return None


def opset_version(model: onnx.ModelProto) -> int:
    """Of ONNX's own operators."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of the node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """What is read or returned in a body; names of the graph around it keep their meaning there."""
    for node in graph.node:
        yield from node.input
        for inner in subgraphs(node):
            yield from names_in(inner)
    for output in graph.output:
        yield output.name


def every_name(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name of a tensor in the graph and its bodies."""
    for held in (graph.input, graph.output, graph.initializer, graph.value_info):
        for one in held:
            yield one.name
    for sparse in graph.sparse_initializer:
        yield sparse.values.name
    for node in graph.node:
        yield from node.input
        yield from node.output
        for inner in subgraphs(node):
            yield from every_name(inner)
