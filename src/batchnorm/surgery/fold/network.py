"""A graph of calls, as the search sees it: of a network of PyTorch or of an ONNX model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import Tensor

from batchnorm.surgery.fold.moves import Rule, Shape
from batchnorm.surgery.fold.states import CannotFold, Layer, Linear, Norm, State

Value = Any  # a tensor of the graph: a node of torch.fx, or a name in ONNX


class Kind(Enum):
    """The kinds of calls, by the effect that a scale and shift can have there."""

    LINEAR = auto()  # go into its weight and bias
    NORM = auto()  # become one with its own scale and shift
    SUM = auto()  # go into both terms
    DIFFERENCE = auto()  # nothing, but its terms can become one layer
    CONCATENATION = auto()  # pass, each part to its own tensor
    SPLIT = auto()  # pass, each part to its own tensor
    TRANSPARENT = auto()  # pass, perhaps along other axes
    SIZE = auto()  # nothing, but it does not read values
    OUTPUT = auto()  # nothing: it returns the network's results
    OTHER = auto()  # nothing


@dataclass(eq=False)
class Call:
    """A call that computes tensors from tensors.

    Attributes:
        node: The call in its own kind of graph.
        kind: Its kind.
        description: A description for messages.
        inputs: The values that it reads, in order and with repetitions; a layer's input comes first.
        results: The values that it computes; None for a part of a split that nothing reads.
        captured: The values that its bodies read.
        axis: The axis of a concatenation or split, not negative.
        sizes: The sizes of a split's parts.
        rule: How a scale and shift passes a transparent call.
        state: Its new weights or constants, if it has changed.
        gone: Whether it has been removed.
    """

    node: Any
    kind: Kind
    description: str
    inputs: list[Value]
    results: list[Value]
    captured: Sequence[Value] = ()
    axis: int = 0
    sizes: Sequence[int] = ()
    rule: Rule | None = None
    state: State | None = None
    gone: bool = False


class Network(ABC):
    """A graph of calls, which folding changes.

    Attributes:
        calls: Every call of the original, in order.
        norms: The batch normalizations that can be read, in their original form.
        unfoldable: The other batch normalizations, each with the reason.
        values: The value of every tensor of the original for the example.
        shapes: The shape of every tensor that always has the same rank.
        pinned: Values that some call changes in place.
        alias: Values that have been replaced, each by another.
    """

    def __init__(self, calls: Sequence[Call], values: Mapping[Value, Any], shapes: Mapping[Value, Shape]) -> None:
        self.calls = calls
        self._position = {call: i for i, call in enumerate(calls)}
        self.norms: dict[Call, Norm] = {}
        self.unfoldable: dict[Call, str] = {}
        self.values = values
        self.shapes = shapes
        self.pinned: set[Value] = set()
        self.alias: dict[Value, Value] = {}
        self._originals: dict[Value, Value | None] = {}  # only the ones that differ
        self._link_all()

    @abstractmethod
    def constant(self, value: Value) -> Tensor | None:
        """Return the original value of a floating-point constant in float64; None for any other value."""

    @abstractmethod
    def read_linear(self, call: Call) -> Linear:
        """Return the layer that a call of kind `LINEAR` represents, before any fold.

        Raises:
            CannotFold: Its weights are not constant.
        """

    @abstractmethod
    def replacement(self, source: Value, result: Value, *, back: bool) -> tuple[Value, Value]:
        """Return the value to replace, and its replacement, when the call between the two is removed.

        Args:
            source: The call's input.
            result: The call's result.
            back: Whether the source gets the result's values instead of keeping its own.
        """

    @abstractmethod
    def check_storable(self, call: Call, state: State) -> None:
        """Check that the graph can represent a call with this new state.

        Raises:
            arithmetic.NotRepresentable: A weight is not finite in its dtype.
            CannotFold: The graph has no operators for it.
        """

    def change(
        self, states: Mapping[Call, State], gone: Collection[Call], sources: Mapping[Call, Value],
        alias: Mapping[Value, Value], through: Iterable[Call] = (), same: Iterable[Value] = (),
    ) -> None:  # fmt: skip
        """Change calls. `FoldPlan` describes the arguments."""
        changed = {result for call in (*states, *through) if call not in gone for result in call.results}
        originals = dict.fromkeys((alias.get(value, value) for value in changed), None)
        originals.update({alias.get(value, value): self.original(value) for value in same})
        self._originals.update(originals)
        affected = {*states, *gone, *sources, *(call for old in alias for call in self._users.get(old, ()))}
        affected |= {call for old in alias if (call := self._writers.get(old)) is not None}
        for call in affected:
            self._unlink(call)
        for call, state in states.items():
            call.state = state
            if isinstance(state, Layer):
                call.inputs = call.inputs[:1]
            if isinstance(state, Linear):
                call.kind = Kind.LINEAR
        for call in gone:
            call.gone = True
        for call, source in sources.items():
            call.inputs = [source]
        for call in affected - set(gone):
            call.inputs = [alias.get(value, value) for value in call.inputs]
            call.results = [alias.get(value, value) for value in call.results]
            self._link(call)
        self.pinned |= {new for old, new in alias.items() if old in self.pinned}
        self.alias.update(alias)

    def saved(self) -> Callable[[], None]:
        """Return a function that undoes all later changes."""
        calls = [(call, dict(vars(call))) for call in self.calls]
        held = {name: copy(vars(self)[name]) for name in ("pinned", "alias", "_originals")}

        def put_back() -> None:
            for call, attributes in calls:
                vars(call).update(attributes)
            vars(self).update({name: copy(value) for name, value in held.items()})
            self._link_all()

        return put_back

    def original(self, value: Value) -> Value | None:
        """Return the value of the original network that this value is equal to; None if there is none."""
        return self._originals.get(value, value)

    def originals(self) -> dict[Value, Value]:
        """Return all values that are equal to one of the original network, each with that one."""
        calls = (call for call in self.calls if not call.gone)
        values = {value for call in calls for value in (*call.inputs, *call.captured, *call.results)} - {None}
        return {value: original for value in values if (original := self.original(value)) is not None}

    def _link_all(self) -> None:
        self._writers: dict[Value, Call] = {}
        self._users: dict[Value, list[Call]] = {}  # in the order of `calls`
        for call in self.calls:
            if not call.gone:
                self._link(call)

    def _link(self, call: Call) -> None:
        self._writers.update(dict.fromkeys(call.results, call))
        for value in {*call.inputs, *call.captured}:
            insort(self._users.setdefault(value, []), call, key=self._position.__getitem__)

    def _unlink(self, call: Call) -> None:
        for value in call.results:
            self._writers.pop(value, None)
        for value in {*call.inputs, *call.captured}:
            self._users[value].remove(call)

    def resolve(self, value: Value) -> Value:
        """Return the current value for a value of the original graph."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def writer(self, value: Value) -> Call | None:
        """Return the call that computes the value; None for inputs and stored constants."""
        return self._writers.get(value)

    def readers(self, value: Value) -> list[Call]:
        """Return the calls that read the value, and not only its size."""
        return [call for call in self._users.get(value, ()) if call.kind is not Kind.SIZE]

    def layer(self, call: Call) -> Layer:
        """Return the layer that a call of kind `LINEAR` or `NORM` represents, including everything folded into it.

        Raises:
            CannotFold: Its weights are not constant.
        """
        if isinstance(call.state, Layer):
            return call.state
        return self.norms[call] if call.kind is Kind.NORM else self.read_linear(call)

    def norm(self, call: Call) -> Norm:
        """Return the batch normalization, including everything folded into it."""
        return call.state if isinstance(call.state, Norm) else self.norms[call]

    def shape(self, value: Value) -> Shape:
        """Return the value's size along each axis.

        Raises:
            CannotFold: It is not a tensor, or its rank varies.
        """
        if value not in self.shapes:
            raise CannotFold("the rank of a tensor next to it is not known")
        return self.shapes[value]

    def same_shape(self, first: Value, second: Value) -> bool:
        """Return whether two values are known to have the same shape."""
        return first in self.shapes and self.shapes[first] == self.shapes.get(second)

    def size(self, value: Value, axis: int) -> int:
        """Return the value's size along an axis.

        Raises:
            CannotFold: The size depends on the network's inputs.
        """
        constant = self.constant(value)
        sizes = set(self.shape(value)[axis]) if constant is None else {constant.shape[axis]}
        if len(sizes) != 1:
            raise CannotFold("its number of channels is open")
        return sizes.pop()
