"""The channels of a traced network, and which of them can only be removed together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.models.graphs.lowering import activation_of
from batchnorm.surgery.fold import moves
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.network import Call, Kind, Value
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.states import CannotFold, Layer, Linear
from batchnorm.walk import is_hooked

_FUNCTIONS = {operator.add, operator.sub, operator.mul, operator.neg, torch.clamp, F.gelu, F.hardtanh, F.softplus}
_LAYERS = (
    nn.CELU, nn.GELU, nn.Hardshrink, nn.Hardtanh, nn.LogSigmoid, nn.PReLU, nn.SELU, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip


class Channels:
    """Numbers the channels of every value in a network; channels that can only be removed together get one number.

    A convolution or linear layer makes new channels. Activations, pooling, batch normalization and depthwise
    convolutions pass them on. Addition and multiplication join those of their terms.

    Attributes:
        network: The network.
        held: For each call with one parameter per channel of its result, the numbers of these channels, int64 `[C]`.
        mixed: For each convolution and linear layer that mixes channels, the numbers of its input's channels.
        layers: The convolutions, linear layers and batch normalizations of the network.
        kept: The reason why channels have to stay, by their number.
    """

    def __init__(self, network: TorchNetwork, why_fixed: Callable[[Call], str]) -> None:
        """Read the network; `why_fixed` returns why the parameters of a call cannot be changed, or nothing."""
        self.network = network
        self.held: dict[Call, Tensor] = {}
        self.mixed: dict[Call, Tensor] = {}
        self.layers: dict[Call, Layer] = {}
        self.kept: dict[int, str] = {}
        self._why_fixed = why_fixed
        self._same: list[int] = []  # for each number itself, or a smaller one that it was joined with
        self._of: dict[Value, Tensor] = {}  # the numbers, as a tensor that broadcasts against the value
        for node in network.trace.graph.nodes:
            if node.op == "placeholder":
                self._of[node] = self._staying(node, "they are the network's input")
        for call in network.calls:
            self._read(call)
        for numbers in (self.held, self.mixed):
            numbers.update(
                {c: torch.tensor([self._root(int(n)) for n in found], device="cpu") for c, found in numbers.items()}
            )
        for number, why in list(self.kept.items()):
            self.kept.setdefault(self._root(number), why)

    def name(self, call: Call) -> str:
        """Return a name of the call for messages: its function and the path of the module that calls it."""
        path = self.network.trace.paths.get(call.node)
        return f"{call.description} in {path}" if path and path not in call.description else call.description

    def _read(self, call: Call) -> None:
        try:
            found = self._results(call)
        except CannotFold as why:
            self._keep((self._of[value] for value in call.inputs if value in self._of), str(why))
            found = [self._staying(result, str(why)) for result in call.results]
        for value, numbers in zip(call.results, found, strict=False):
            if value in self.network.pinned:
                self._keep([numbers], "a call changes their values in place")
            if value is not None:
                self._of[value] = numbers

    def _results(self, call: Call) -> list[Tensor]:
        """Return the numbers of the call's results; raise CannotFold if the channels of its inputs have to stay."""
        if call.kind is Kind.SIZE:
            return []
        if is_pointwise(call.node):
            return [self._joined(call)]
        if call.kind not in (Kind.LINEAR, Kind.NORM, Kind.CONCATENATION, Kind.SPLIT, Kind.TRANSPARENT):
            raise CannotFold(f"they are channels of {self.name(call)}")
        every = [self._numbers(value) for value in call.inputs[: None if call.kind is Kind.CONCATENATION else 1]]
        if call.kind is Kind.TRANSPARENT:
            return [self._moved(call, every[0])]
        if call.kind is Kind.CONCATENATION:
            return [concatenated(every, call.axis, [self.network.size(value, call.axis) for value in call.inputs])]
        if call.kind is Kind.SPLIT:
            if every[0].shape[call.axis] != 1:
                raise CannotFold("they are split into parts of fixed sizes")
            return every * len(call.results)
        return [self._through_layer(call, every[0])]

    def _moved(self, call: Call, numbers: Tensor) -> Tensor:
        found = moved(self.network, call, ScaleShift(numbers, torch.zeros_like(numbers))).scale
        sizes = call.node.args[1] if call.node.target is torch.reshape else None
        axes = [axis for axis, size in enumerate(found.shape) if size != 1]
        if len(axes) > 1 or (isinstance(sizes, (tuple, list)) and any(_is_fixed(sizes[axis]) for axis in axes)):
            raise CannotFold("a reshape needs their number")
        return found

    def _through_layer(self, call: Call, x: Tensor) -> Tensor:
        layer = self.layers[call] = self.network.layer(call)
        axis = layer.channel_axis(x.dim())
        inputs = moves.channel_vector(ScaleShift(x, x), axis, layer.in_channels).scale
        outputs = inputs
        if isinstance(layer, Linear) and is_depthwise(layer):
            outputs = inputs.repeat_interleave(layer.out_channels // layer.in_channels)
        elif isinstance(layer, Linear):
            outputs = torch.tensor([self._new() for _ in range(layer.out_channels)], device="cpu").double()
            self.mixed[call] = inputs
            if layer.groups > 1:
                self._keep([inputs, outputs], "a grouped convolution has them")
        self.held[call] = outputs
        if why := "it may do more than its class" if getattr(layer, "opaque", False) else self._why_fixed(call):
            self._keep([inputs, outputs], f"they are channels of {self.name(call)}: {why}")
        return outputs.reshape([-1 if i == axis else 1 for i in range(x.dim())])

    def _joined(self, call: Call) -> Tensor:
        """Return the numbers of a pointwise call's result, with those of its terms joined."""
        rank = len(self.network.shape(call.results[0]))
        terms = []
        for value in call.inputs:
            numbers = self._numbers(value)
            more = rank - numbers.dim()
            terms.append((numbers.reshape(*(1,) * more, *numbers.shape), ((1,),) * more + self.network.shape(value)))
        axes = [axis for axis in range(rank) if any(numbers.shape[axis] != 1 for numbers, _ in terms)]
        # A term with one value for all channels does not limit them.
        limiting = [n for n, shape in terms if not axes or any(set(shape[axis]) != {1} for axis in axes)]
        first, *others = torch.broadcast_tensors(*limiting)
        for other in others:
            for a, b in torch.stack([first.flatten(), other.flatten()], 1).unique(dim=0).long().tolist():
                low, high = sorted((self._root(a), self._root(b)))
                self._same[high] = low
        slopes = slopes_of(call.node)
        if slopes is not None and slopes.numel() > 1:
            self.held[call] = moves.channel_vector(ScaleShift(first, first), 1, slopes.numel()).scale
            if why := self._why_fixed(call):
                self._keep([first], f"they are channels of {self.name(call)}: {why}")
        return first

    def _numbers(self, value: Value) -> Tensor:
        self.network.shape(value)
        if value not in self._of:
            raise CannotFold("a constant has a value for each of them")
        return self._of[value]

    def _staying(self, value: Value, why: str) -> Tensor:
        number = self._new()
        self.kept[number] = why
        return torch.full((1,) * len(self.network.shapes.get(value, ())), number, device="cpu").double()

    def _new(self) -> int:
        self._same.append(len(self._same))
        return self._same[-1]

    def _keep(self, every: Iterable[Tensor], why: str) -> None:
        for numbers in every:
            for number in numbers.unique().long().tolist():
                self.kept.setdefault(number, why)

    def _root(self, number: int) -> int:
        while self._same[number] != number:
            number = self._same[number]
        return number


def concatenated(every: Sequence[Tensor], axis: int, sizes: Sequence[int]) -> Tensor:
    """Concatenate tensors that may have size 1 instead of these sizes along the axis."""
    shapes = [[size if i == axis else -1 for i in range(t.dim())] for t, size in zip(every, sizes, strict=True)]
    return torch.cat([t.expand(shape) for t, shape in zip(every, shapes, strict=True)], axis)


def moved(network: TorchNetwork, call: Call, s: ScaleShift) -> ScaleShift:
    """Return a scale and shift of a transparent call's input as one of its result."""
    assert call.rule is not None
    return call.rule(moves.Move(s, network.shape(call.inputs[0]), network.shape(call.results[0]), back=False))


def is_depthwise(layer: Linear) -> bool:
    """Return whether each channel of the input has its own channels of the result."""
    return layer.groups > 1 and layer.groups == layer.in_channels


def is_pointwise(node: Node) -> bool:
    """Return whether each value of the call's result only depends on the values at the same position."""
    if node.op == "call_module":
        layer = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return type(layer) in _LAYERS and not is_hooked(layer)
    return activation_of(node) is not None or (node.op == "call_function" and node.target in _FUNCTIONS)


def slopes_of(node: Node) -> Tensor | None:
    """Return the weight of a PReLU, or None."""
    layer = node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None  # type: ignore[union-attr]
    return layer.weight.detach() if type(layer) is nn.PReLU else None


def _is_fixed(size: object) -> bool:
    return isinstance(size, int) and size != -1
