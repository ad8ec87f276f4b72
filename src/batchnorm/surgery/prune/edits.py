"""The tensors and sizes of a pruned model, and their assignment to its modules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.surgery.fold.arithmetic import rounded, wide
from batchnorm.surgery.fold.network import Call, Kind
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.states import linear_arguments
from batchnorm.surgery.fold.states import Linear
from batchnorm.surgery.prune.channels import Channels, is_depthwise
from batchnorm.surgery.prune.removal import Removal
from batchnorm.undo import UndoOnFailure
from batchnorm.walk import is_hooked


class Owners:
    """The modules that hold the parameters of each call."""

    def __init__(self, model: nn.Module, network: TorchNetwork) -> None:
        self._model = model
        self._places = Counter(id(t) for module in model.modules() for _, t in _tensors(module))
        self._reads: Counter[int] = Counter()
        named = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for node in network.trace.graph.nodes:
            if node.op == "get_attr":
                self._reads[id(named.get(str(node.target)))] += len(node.users)
            elif node.op == "call_module":
                self._reads.update(id(p) for p in self._module(str(node.target)).parameters())

    def path(self, call: Call) -> str | None:
        """Return the path of the module that holds the call's parameters; None if there is not one such module."""
        if call.node.op == "call_module":
            return str(call.node.target)
        held = call.node.args[1:5] if call.kind is Kind.NORM else (linear_arguments(call.node) or {}).values()
        paths = {str(t.target).rpartition(".")[0] for t in held if getattr(t, "op", "") == "get_attr"}
        return paths.pop() if len(paths) == 1 else None

    def of(self, call: Call) -> nn.Module:
        """Return the module that holds the call's parameters."""
        path = self.path(call)
        assert path is not None
        return self._module(path)

    def why_fixed(self, call: Call) -> str:
        """Return why the parameters of the call cannot be changed; empty if they can."""
        path = self.path(call)
        if path is None:
            return "its parameters are in several modules"
        module = self._module(path)
        tensors = dict(_tensors(module))
        if any(_tensors(part) for part in module.modules() if part is not module):
            return "its parameters are computed"
        shapes = {t.shape for t in tensors.values() if t.dim()}
        if call.kind is Kind.NORM and [len(shape) for shape in shapes] != [1]:
            return "it has several values for each of them"
        if call.kind is Kind.LINEAR and not (
            isinstance(module, (_ConvNd, nn.Linear)) and {*tensors} <= {"weight", "bias"}
        ):
            return "its parameters are not only the weight and bias of a convolution or linear layer"
        if any(self._places[id(t)] > 1 or self._reads[id(t)] > 1 for t in tensors.values()):
            return "its parameters are used in several places"
        return "it has hooks" if is_hooked(module) else ""

    def _module(self, path: str) -> nn.Module:
        return self._model.get_submodule(path)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]


@dataclass
class Edit:
    """New tensors of a module, and the sizes that it keeps as numbers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class Edits:
    """The changes to a model that remove channels.

    Attributes:
        by_path: The changes by the path of the module.
    """

    def __init__(self, channels: Channels, owners: Owners, found: Removal) -> None:
        self.by_path: dict[str, Edit] = {}
        self._biases: list[str] = []
        self._owners = owners
        for call, values in found.added.items():
            if bool((values != 0).any()):
                self._add(channels.network, call, values)
        for call, numbers in channels.mixed.items():
            if not (keep := ~found.has(numbers)).all():
                self._select(call, "weight", keep, 0 if getattr(channels.layers[call], "transposed", False) else 1)
                self._resize(call, ("in_channels", "in_features"), keep)
        for call, numbers in channels.held.items():
            if not (keep := ~found.has(numbers)).all():
                self._remove_outputs(call, channels.layers.get(call), keep)

    def _add(self, network: TorchNetwork, call: Call, values: Tensor) -> None:
        """Add values to a layer's result: in its bias, or in the running mean that is subtracted next."""
        readers = network.readers(call.results[0])
        norm = readers[0] if len(readers) == 1 and readers[0].kind is Kind.NORM else None
        has_bias = self._owners.of(call).bias is not None
        if not has_bias and norm is not None and not self._owners.why_fixed(norm):
            self._set(norm, "running_mean", wide(self._get(norm, "running_mean")) - values)
            return
        if not has_bias:
            self._biases.append(str(self._owners.path(call)))
        self._set(call, "bias", values + (wide(self._get(call, "bias")) if has_bias else 0.0))

    def _remove_outputs(self, call: Call, layer: Any, keep: Tensor) -> None:
        if isinstance(layer, Linear):
            depthwise = is_depthwise(layer)
            inputs = keep[:: layer.out_channels // layer.in_channels] if depthwise else keep
            if depthwise and layer.transposed:
                self._select(call, "weight", inputs, 0)
            else:
                self._select(call, "weight", keep, 1 if layer.transposed else 0)
            if self._get(call, "bias") is not None:
                self._select(call, "bias", keep, 0)
            self._resize(call, ("out_channels", "out_features"), keep)
            if depthwise:
                self._resize(call, ("in_channels", "groups"), inputs)
            return
        for name, tensor in _tensors(self._owners.of(call)):
            if tensor.dim():
                self._select(call, name, keep, 0)
        self._resize(call, ("num_features", "num_parameters"), keep)

    def _get(self, call: Call, name: str) -> Any:
        edit = self.by_path.get(self._owners.path(call) or "", Edit())
        return edit.tensors.get(name, getattr(self._owners.of(call), name))

    def _set(self, call: Call, name: str, values: Tensor) -> None:
        module = self._owners.of(call)
        like = getattr(module, name)
        tensors = self.by_path.setdefault(self._owners.path(call) or "", Edit()).tensors
        tensors[name] = rounded(values, module.weight if like is None else like)  # type: ignore[arg-type]

    def _select(self, call: Call, name: str, keep: Tensor, axis: int) -> None:
        values = self._get(call, name).detach()
        self._set(call, name, values.index_select(axis, keep.nonzero().flatten().to(values.device)))

    def _resize(self, call: Call, names: tuple[str, ...], keep: Tensor) -> None:
        sizes = self.by_path[self._owners.path(call) or ""].sizes
        sizes |= {name: int(keep.sum()) for name in names if name in vars(self._owners.of(call))}

    def notes(self) -> tuple[str, ...]:
        """Return remarks for the report, one sentence each."""
        new = "parameters were replaced: create the optimizer after pruning"
        biases = f"new biases, for the constants of removed channels: {', '.join(self._biases)}"
        return ((new,) if self.by_path else ()) + ((biases,) if self._biases else ())

    def apply(self, model: nn.Module) -> None:
        """Change the model; after an exception it is as before."""
        with UndoOnFailure() as undo:
            for path, edit in self.by_path.items():
                module = model.get_submodule(path)
                parameters, buffers = module._parameters, module._buffers
                sizes = {name: vars(module)[name] for name in edit.sizes}
                for held, before in ((parameters, parameters), (buffers, buffers), (vars(module), sizes)):
                    undo.before(held.update, dict(before))
                for name, values in edit.tensors.items():
                    if name in buffers:
                        buffers[name] = values
                    else:
                        old = parameters[name]
                        parameters[name] = nn.Parameter(values, requires_grad=old is None or old.requires_grad)
                vars(module).update(edit.sizes)
