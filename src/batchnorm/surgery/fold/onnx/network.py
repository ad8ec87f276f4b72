"""Represent an ONNX graph as the graph that the search works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import onnx
from onnx import helper
from torch import Tensor

from batchnorm.surgery.fold.moves import Shape
from batchnorm.surgery.fold.network import Call, Kind, Network
from batchnorm.surgery.fold.onnx import moves
from batchnorm.surgery.fold.onnx.graph import DTYPES, Array, Constants, Operator, names_in, opset_version, subgraphs
from batchnorm.surgery.fold.onnx.nodes import Writer
from batchnorm.surgery.fold.onnx.states import LINEAR, OnnxLinear, OnnxNorm
from batchnorm.surgery.fold.states import CannotFold, Linear, State

NORM = "BatchNormalization"
_KINDS = dict.fromkeys(LINEAR, Kind.LINEAR) | {"Add": Kind.SUM, "Sub": Kind.DIFFERENCE}
_NAMES = {"Add": "an addition", "Concat": "a concatenation", "Mul": "a multiplication"}


class OnnxNetwork(Network):
    """The main graph of a model. A value is the name of a tensor.

    Attributes:
        opset: The version of ONNX's own operators.
        constants: The graph's constants.
    """

    def __init__(self, model: onnx.ModelProto, values: Mapping[str, Array], shapes: Mapping[str, Shape]) -> None:
        """Take a model, and the values and shapes of all tensors of its main graph, from runs of the model."""
        self.opset = opset_version(model)
        operators = [Operator(node) for node in model.graph.node]
        self.constants = Constants(model, operators, values)
        calls = [self._read(operator, shapes) for operator in operators]
        results = [output.name for output in model.graph.output]
        output = Call(Operator(helper.make_node("", results, [])), Kind.OUTPUT, "the network's output", results, [])
        super().__init__([*calls, output], values, shapes)
        for call in calls:
            if call.node.op == NORM:
                try:
                    self.norms[call] = OnnxNorm.of(self.constants, call.node)
                    call.kind = Kind.NORM
                except CannotFold as error:
                    self.unfoldable[call] = str(error)
        self._drop_zeros()

    def _read(self, operator: Operator, shapes: Mapping[str, Shape]) -> Call:
        op, outputs = operator.op, operator.outputs
        call = Call(operator, _KINDS.get(op, Kind.OTHER), _NAMES.get(op, op), operator.inputs, outputs)
        call.captured = [name for graph in subgraphs(operator.node) for name in names_in(graph)]
        if op in ("Shape", "Size") or (op == "CastLike" and self.constants.tensor(outputs[0]) is not None):
            call.kind = Kind.SIZE
        elif op in moves.RULES and len(outputs) == 1:
            call.kind = Kind.TRANSPARENT
            call.rule = partial(moves.RULES[op], moves.Arguments(operator, self.constants))
        elif op in ("Concat", "Split") and all(name in shapes for name in operator.node.output):
            axis = call.axis = operator.attribute("axis", 0) % len(shapes[outputs[0]])
            sizes = [set(shapes[name][axis]) for name in outputs]
            if op == "Concat":
                call.kind = Kind.CONCATENATION
            elif all(len(size) == 1 for size in sizes):
                call.kind, call.sizes = Kind.SPLIT, [size.pop() for size in sizes]
        return call

    def _drop_zeros(self) -> None:
        """Remove additions of zero, which exporters write for Python's `sum`."""
        fixed = {*self.calls[-1].inputs, *(name for call in self.calls for name in call.captured)}
        for call in self.calls:
            if call.kind is Kind.SUM and call.results[0] not in fixed:
                for term, zero in (call.inputs, call.inputs[::-1]):
                    value = self.constant(zero)
                    if value is not None and not value.any() and self.same_shape(term, call.results[0]):
                        self.change({}, [call], {}, {call.results[0]: term})
                        break

    def constant(self, value: str) -> Tensor | None:
        """Return the original value of a floating-point constant in float64; None for any other value."""
        tensor = self.constants.tensor(value)
        if tensor is None or tensor.data_type not in DTYPES:
            return None
        return self.constants.parameter(value, value).value

    def read_linear(self, call: Call) -> Linear:
        """Return the layer that a call of kind `LINEAR` represents, before any fold.

        Raises:
            CannotFold: Its weights are not constant.
        """
        return OnnxLinear.of(self.constants, call.node)

    def check_storable(self, call: Call, state: State) -> None:
        """Check that every new weight is finite in its type, and that this version of ONNX has the operators.

        Raises:
            arithmetic.NotRepresentable: A weight is not finite.
            CannotFold: There are no operators.
        """
        self.nodes_writer(lambda name, value: name, lambda stem: stem).nodes(call, state)

    def nodes_writer(self, store: Callable[[str, Tensor], str], fresh: Callable[[str], str]) -> Writer:
        """Return what writes the calls as nodes; `Writer` explains the arguments."""
        return Writer(self.constants, self.opset, self.resolve, store, fresh)

    def replacement(self, source: str, result: str, *, back: bool) -> tuple[str, str]:
        """Return the name to replace, and its replacement, when a call is removed.

        The name whose values are kept stays, because the graph's results and the bodies of other calls refer to it.
        """
        return (source, result) if back else (result, source)
