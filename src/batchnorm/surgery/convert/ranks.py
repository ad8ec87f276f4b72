"""The rank of a layer's input: from its class, from an example, or from the modules next to it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from batchnorm import walk
from batchnorm._checks import check_module
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.execution.recording import record_calls
from batchnorm.models.graphs.forward_graph import graph_as_called
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.surgery.accelerate.find_fusions import caller_of
from batchnorm.surgery.convert.replacement import origin_of

RANKS = ("1d", "2d", "3d")
_OF_DIMS = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}
_ELEMENTWISE = {torch.relu, F.relu, F.gelu, F.silu, operator.add, operator.iadd, torch.add}


def rank_of(layer: nn.Module) -> str:
    """Return the rank that the layer takes, "1d", "2d" or "3d", or that of the layer it replaced; "" for any rank."""
    for cls in walk.class_of(layer).__mro__:
        name = vars(cls).get("layer_name", cls.__name__)
        if cls.__module__.startswith(("torch.", "batchnorm.")) and issubclass(cls, _NormBase) and name[-2:] in RANKS:
            return str(name[-2:])
    origin = origin_of(layer)
    return "" if origin is None else rank_of(origin.layer)


def shapes_in_run(caller: str, model: nn.Module, example_inputs: Any) -> dict[str, torch.Size]:
    """Return the shape of the input that each layer of batch normalization gets in a run, by the layer's path.

    Args:
        caller: The function that the user called, for error messages.
        model: Any module; unchanged.
        example_inputs: Its arguments.

    Raises:
        ValueError: the model does not accept the example inputs.
    """
    check_module(caller, model)
    paths = [found.path for found in walk.norm_layers(model)]
    with walk.restored(model, buffers=True):
        _, calls = record_calls(caller, model, paths, Inputs.of(example_inputs))
    inputs = {path: calls[path].tensors() for path in paths if path in calls}
    return {path: tensors[0].shape for path, tensors in inputs.items() if tensors}


@dataclass(frozen=True)
class Given:
    """The known properties of a layer's input.

    Attributes:
        rank: "1d", "2d" or "3d"; "" if it is unknown.
        shape: Its shape in a run, if there was one.
        model: The model.
        path: The layer's path.
    """

    rank: str
    shape: torch.Size | None
    model: nn.Module
    path: str

    @classmethod
    def of(cls, layer: nn.Module, model: nn.Module, path: str, shapes: dict[str, torch.Size] | None) -> Given:
        """Describe the input of the layer at a path by its class, the shapes in a run, or the modules next to it."""
        shape = None if shapes is None else shapes.get(path)
        seen = "" if shape is None else _OF_DIMS.get(len(shape), "")
        rank = rank_of(layer) or (rank_next_to(model, path) if shapes is None else seen)
        return cls(rank, shape, model, path)

    def has_positions(self) -> bool:
        """Return whether a run, the rank or a module next to the layer shows several positions.

        The input of a 1d layer may be `[N, C]`.
        """
        if self.shape is not None:
            return self.shape[2:].numel() > 1
        return self.rank in ("2d", "3d") or rank_next_to(self.model, self.path, linear=False) != ""


def rank_next_to(model: nn.Module, path: str, *, linear: bool = True) -> str:
    """Return the rank that the convolution, pooling or linear layer next to a layer has; "" if none or several do.

    If linear layers are left out, "1d" means that the input is `[N, C, L]`.
    """
    holder = caller_of(model, path)
    if holder is None:
        return ""
    root, layer = model.get_submodule(holder), model.get_submodule(path)
    try:
        with walk.restored(root):  # tracing sets modes
            graph, _ = graph_as_called(root, holder, [], None, "next to the layer")
    except Untraceable:
        return ""
    modules = {node: root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    found = {""}
    for node in (node for node, module in modules.items() if module is layer):
        found |= _ranks_of(node.all_input_nodes, modules, before=True, linear=linear)
        found |= _ranks_of(node.users, modules, before=False, linear=linear)
    found.discard("")
    return found.pop() if len(found) == 1 else ""


def _ranks_of(nodes: Iterable[fx.Node], modules: dict[fx.Node, nn.Module], *, before: bool, linear: bool) -> set[str]:
    """Return the ranks of the modules that compute these values or read them, through elementwise operations."""
    found: set[str] = set()
    for node in nodes:
        module = modules.get(node)
        if _is_elementwise(node, module):
            further = node.all_input_nodes if before else node.users
            found |= _ranks_of(further, modules, before=before, linear=linear)
        elif isinstance(module, nn.Linear) and before and linear:
            found.add("1d")
        elif module is not None and type(module).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.pooling"):
            found.add(type(module).__name__[-2:])
    return found & set(RANKS)


def _is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    if module is None:
        return node.op == "call_function" and node.target in _ELEMENTWISE
    simple = type(module).__module__ == "torch.nn.modules.activation" or isinstance(module, (nn.Identity, nn.Dropout))
    return simple or walk.is_batch_norm(module)
