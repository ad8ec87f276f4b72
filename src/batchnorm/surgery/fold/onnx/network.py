"""An ONNX graph as the graph that the search works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import helper
from torch import Tensor

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.network import Kind, Network, Shape, Split
from batchnorm.surgery.fold.onnx import moves
from batchnorm.surgery.fold.onnx.graph import DTYPES, Array, Call, Constants, names_in, opset_version, subgraphs
from batchnorm.surgery.fold.onnx.states import LINEAR, OnnxLinear, OnnxNorm
from batchnorm.surgery.fold.states import CannotFold, Linear, NewConstants

NORM = "BatchNormalization"
_OUTPUT = "network's output"  # the type of a call that stands for the graph's results, as a reader
_KINDS = {"Add": Kind.SUM, "Concat": Kind.CONCATENATION, "Split": Kind.SPLIT, _OUTPUT: Kind.OUTPUT} | dict.fromkeys(
    moves.RULES, Kind.TRANSPARENT
)
_NAMES = {"Add": "an addition", "Concat": "a concatenation", "Mul": "a multiplication", _OUTPUT: f"the {_OUTPUT}"}
_ASK_SIZES = {"Shape", "Size"}


class OnnxNetwork(Network[str, Call]):
    """The main graph of a model. A value is the name of a tensor.

    Attributes:
        graph: The graph.
        opset: The version of ONNX's own operators.
        constants: The graph's constants.
        output: A call that stands for the graph's results, as a reader.
    """

    def __init__(self, model: onnx.ModelProto, values: Mapping[str, Array], shapes: Mapping[str, Shape]) -> None:
        """Take a model, and the values and shapes of all tensors of its main graph that runs of it gave."""
        graph = self.graph = model.graph
        self.opset = opset_version(model)
        calls = [Call(node, i) for i, node in enumerate(graph.node)]
        self.constants = Constants(model, calls, values)
        self.output = Call(helper.make_node(_OUTPUT, [output.name for output in graph.output], []), len(calls))
        super().__init__([*calls, self.output], values)
        self._shapes = dict(shapes)
        for call in calls:
            if call.op == NORM:
                try:
                    self.norms[call] = OnnxNorm.of(self.constants, call)
                except CannotFold as error:
                    self.unfoldable[call] = str(error)
        self.refresh()

    def reads(self, call: Call) -> Iterable[str]:
        """Return everything that the call reads, each name once, including what its bodies read from outside."""
        inputs = [*self.inputs(call), *(name for graph in subgraphs(call.node) for name in names_in(graph))]
        state = self.states.get(call)
        replaced = state.values if isinstance(state, NewConstants) else ()
        return [name for name in dict.fromkeys(map(self.resolve, inputs)) if name not in replaced]

    def kind(self, call: Call) -> Kind:
        """Return what the call, as it is now, lets a scale and shift do."""
        if isinstance(self.states.get(call), Linear) or call.op in LINEAR:
            return Kind.LINEAR
        if call in self.norms:
            return Kind.NORM
        return _KINDS.get(call.op, Kind.OTHER)

    def operands(self, call: Call) -> Sequence[str]:
        """Return what the original call reads, in order, as often as it reads it."""
        return call.inputs

    def results(self, call: Call) -> Sequence[str]:
        """Return the tensors that the call computes."""
        return call.outputs

    def asks_size(self, call: Call) -> bool:
        """Whether the call reads only sizes or types, no values."""
        return call.op in _ASK_SIZES or (
            call.op == "CastLike" and self.constants.tensor(call.node.output[0]) is not None
        )

    def constant(self, value: str) -> Tensor | None:
        """Return the original value of a floating-point constant in float64; None if it is computed or an input."""
        tensor = self.constants.tensor(value)
        if tensor is None or tensor.data_type not in DTYPES:
            return None
        return self.constants.parameter(value, value).value

    def known_shape(self, value: str) -> Shape | None:
        """Return the tensor's shape, if it always has the same rank."""
        return self._shapes.get(value)

    def read_linear(self, call: Call) -> Linear:
        """Return the layer that the original call is.

        Raises:
            CannotFold: Its weights are not constant.
        """
        return OnnxLinear.of(self.constants, call)

    def axis(self, call: Call) -> int:
        """Return the axis of a concatenation, not negative."""
        return int(call.attribute("axis")) % len(self.shape(call.outputs[0]))

    def split(self, call: Call) -> Split:
        """Return how a Split splits its input.

        Raises:
            CannotFold: A size depends on the network's inputs, or the graph does not use every part.
        """
        if len(call.outputs) != len(call.node.output):
            raise CannotFold("a split next to it has parts without a name")
        axis = int(call.attribute("axis", 0)) % len(self.shape(call.outputs[0]))
        return Split(axis, [self.size(part, axis) for part in call.outputs], {p: i for i, p in enumerate(call.outputs)})

    def through(self, call: Call, s: ScaleShift, *, back: bool) -> ScaleShift:
        """Return the equivalent of a scale and shift on the other side of a transparent call.

        Raises:
            CannotFold: The two do not commute.
        """
        if len(call.outputs) != 1:
            raise CannotFold(f"{call.op} next to it has two results")
        ends = (self.shape(call.outputs[0]), self.shape(call.inputs[0]))
        given, wanted = ends if back else ends[::-1]
        return moves.RULES[call.op](moves.Move(call, self.constants, s, given, wanted, back))

    def subtracts(self, call: Call) -> bool | None:
        """Return False for an addition of two tensors, True for a subtraction, None for any other call."""
        return {"Add": False, "Sub": True}.get(call.op)

    def removal(self, source: str, result: str, *, back: bool) -> tuple[str, str]:
        """Return which of a removed call's two names is replaced by which.

        The name whose values are kept stays: the graph's results and the bodies of other calls refer to it.
        """
        return (source, result) if back else (result, source)

    def describe(self, call: Call) -> str:
        """Return the call in words."""
        return _NAMES.get(call.op, call.op)
