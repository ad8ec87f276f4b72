"""The graph of calls that the search works on, for any kind of graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.states import CannotFold, Linear, Norm, State

Shape = tuple[tuple[int, ...], ...]  # for each axis, its size in each run
V = TypeVar("V", bound=Hashable)  # a tensor of the graph
C = TypeVar("C", bound=Hashable)  # a call that computes tensors from tensors


class Kind(Enum):
    """What a call lets a scale and shift do."""

    LINEAR = auto()  # go into its weight and bias
    NORM = auto()  # become one with its own scale and shift
    SUM = auto()  # go into both terms
    CONCATENATION = auto()  # pass, each part to its own tensor
    SPLIT = auto()  # pass, each part to its own tensor
    TRANSPARENT = auto()  # pass, perhaps along other axes
    OUTPUT = auto()  # nothing: it returns the network's results
    OTHER = auto()  # nothing


class Split(NamedTuple):
    """How a call splits a tensor.

    Attributes:
        axis: The axis that it splits.
        sizes: The sizes of the parts along this axis.
        parts: The position of every part.
    """

    axis: int
    sizes: Sequence[int]
    parts: Mapping[Any, int]


class Network(ABC, Generic[V, C]):
    """A graph of calls, with what folding has changed so far.

    A subclass says how its kind of graph is read. It calls `refresh` at the end of its constructor.

    Attributes:
        calls: Every call of the original, in order.
        norms: Every batch normalization that can be read.
        unfoldable: The other batch normalizations, each with the reason.
        values: The value of every tensor for the example.
        pinned: Values that some call changes in place.
        states: What calls have become.
        gone: Calls that have been removed.
        alias: Values that have been replaced, each by another.
    """

    def __init__(self, calls: Sequence[C], values: Mapping[V, Any]) -> None:
        self.calls = calls
        self.norms: dict[C, Norm] = {}
        self.unfoldable: dict[C, str] = {}
        self.values: dict[V, Any] = dict(values)
        self.pinned: Collection[V] = ()
        self.states: dict[C, State] = {}
        self.gone: set[C] = set()
        self.alias: dict[V, V] = {}
        self._writers: dict[V, C] = {}
        self._readers: dict[V, list[C]] = {}

    # How this kind of graph is read --------------------------------------------------------------------------------

    @abstractmethod
    def kind(self, call: C) -> Kind:
        """Return what the call, as it is now, lets a scale and shift do."""

    @abstractmethod
    def operands(self, call: C) -> Iterable[V]:
        """Return what the original call reads, in order, as often as it reads it."""

    @abstractmethod
    def results(self, call: C) -> Sequence[V]:
        """Return the tensors that the call computes."""

    @abstractmethod
    def asks_size(self, call: C) -> bool:
        """Whether the call reads only sizes or types, no values."""

    @abstractmethod
    def constant(self, value: V) -> Tensor | None:
        """Return the original value of a floating-point constant in float64; None if it is computed or an input."""

    @abstractmethod
    def known_shape(self, value: V) -> Shape | None:
        """Return the value's shape, if it always has the same rank."""

    @abstractmethod
    def read_linear(self, call: C) -> Linear:
        """Return the layer that the original call is.

        Raises:
            CannotFold: Its weights are not constant.
        """

    @abstractmethod
    def axis(self, call: C) -> int:
        """Return the axis of a concatenation, not negative.

        Raises:
            CannotFold: It is computed.
        """

    @abstractmethod
    def split(self, call: C) -> Split:
        """Return how a call of kind `SPLIT` splits its input."""

    @abstractmethod
    def through(self, call: C, s: ScaleShift, *, back: bool) -> ScaleShift:
        """Return the equivalent of a scale and shift on the other side of a transparent call.

        Args:
            call: The call.
            s: Applied to its result if `back`, else to its input; of that tensor's rank.
            back: Whether to go from the result to the input.

        Raises:
            CannotFold: The two do not commute.
        """

    @abstractmethod
    def subtracts(self, call: C) -> bool | None:
        """Return False for an addition of two tensors, True for a subtraction, None for any other call."""

    @abstractmethod
    def removal(self, source: V, result: V, *, back: bool) -> tuple[V, V]:
        """Return which of a removed call's two tensors is replaced by which.

        Args:
            source: What the call read.
            result: What it computed.
            back: Whether the source takes the result's values; otherwise the source keeps its own.
        """

    @abstractmethod
    def describe(self, call: C) -> str:
        """Return the call in words."""

    # How it is now -------------------------------------------------------------------------------------------------

    def alive(self) -> list[C]:
        """Return the calls that have not been removed."""
        return [call for call in self.calls if call not in self.gone]

    def resolve(self, value: V, more: Mapping[V, V] | None = None) -> V:
        """Return what stands for this value now; `more` are replacements that are planned."""
        while True:
            new = self.alias.get(value, (more or {}).get(value))
            if new is None:
                return value
            value = new

    def refresh(self) -> None:
        """Find again who computes and who reads each value, after a change."""
        self._writers = {self.resolve(value): call for call in self.alive() for value in self.results(call)}
        self._readers = {}
        for call in self.alive():
            for value in self.reads(call):
                self._readers.setdefault(value, []).append(call)
        self.pinned = {self.resolve(value) for value in self.pinned}

    def reads(self, call: C) -> Iterable[V]:
        """Return everything that the call reads, each value once."""
        return dict.fromkeys(self.inputs(call))

    def inputs(self, call: C) -> list[V]:
        """Return what the call reads, in order, as often as it reads it; of a changed layer only its source."""
        state = self.states.get(call)
        operands = [state.source] if isinstance(state, (Linear, Norm)) else self.operands(call)
        return [self.resolve(value) for value in operands]

    def result(self, call: C) -> V:
        """Return the only tensor that the call computes."""
        return self.resolve(self.results(call)[0])

    def writer(self, value: V) -> C | None:
        """Return the call that computes the value; None for inputs and stored constants."""
        return self._writers.get(self.resolve(value))

    def readers(self, value: V) -> list[C]:
        """Return the calls that read the value, and not only its size."""
        return [call for call in self._readers.get(self.resolve(value), []) if not self.asks_size(call)]

    def linear(self, call: C) -> Linear:
        """Return the layer, with what was folded into it.

        Raises:
            CannotFold: Its weights are not constant.
        """
        state = self.states.get(call)
        return state if isinstance(state, Linear) else self.read_linear(call)

    def norm(self, call: C) -> Norm:
        """Return the batch normalization, with what was folded into it."""
        state = self.states.get(call)
        return state if isinstance(state, Norm) else self.norms[call]

    def shape(self, value: V) -> Shape:
        """Return the value's size along each axis.

        Raises:
            CannotFold: It is no tensor, or not always of the same rank.
        """
        found = self.known_shape(self.resolve(value)) or self.known_shape(value)
        if found is None:
            raise CannotFold("the rank of a tensor next to it is not known")
        return found

    def size(self, value: V, axis: int) -> int:
        """Return the value's size along an axis.

        Raises:
            CannotFold: The size depends on the network's inputs.
        """
        sizes = set(self.shape(value)[axis])
        if len(sizes) != 1:
            raise CannotFold("its number of channels is open")
        return sizes.pop()
