"""Trace a model by `torch.export`, one model at a time."""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.node import Node
from torch.utils import _pytree as pytree

from batchnorm.models.data.batches import ThreadSettings
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.models.graphs.tracing.containers import construction
from batchnorm.models.graphs.tracing.symbolic import graph_module, with_items

_one_at_a_time = threading.Lock()


def exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: dict[str, Any]
) -> fx.GraphModule:
    """Return the graph module of a model that `torch.export.export` exports.

    `torch.export` replaces `nn.Module.__call__` and sets flags for the whole process. Here, other threads still call
    modules as before. An interruption takes effect after the export.
    """
    found: list[fx.GraphModule] = []

    def export() -> None:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        found.append(from_program(program))

    def work() -> None:
        with _one_at_a_time, _quiet():
            with_items([(vars(_symbolic_trace), {"_Patcher": _PatcherOfThread})], export)

    _in_thread(work)
    return found[0]


class _PatcherOfThread(_symbolic_trace._Patcher):
    """Replaces methods of classes for the current thread only."""

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        owner, original = threading.get_ident(), getattr(cls, name)

        @functools.wraps(original)
        def called(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if threading.get_ident() == owner else original)(*args, **kwargs)

        super().patch_method(cls, name, called, deduplicate)


def _in_thread(work: Callable[[], None]) -> None:
    """Do the work in another thread, with this one's settings. Signal handlers do not run there.

    An exception that a handler raises in this thread, such as KeyboardInterrupt, waits until the work is done.
    """
    settings, context = ThreadSettings(None, None), contextvars.copy_context()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with settings.entered():
                work()
        except BaseException as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=context.run, args=(run,), name="batchnorm export", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        if thread.ident is not None:
            thread.join()
        raise
    if errors:
        raise errors[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch, because a failed export is not an error."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch.fx", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def from_program(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return an exported program as a graph module with the model's arguments and results, without guards."""
    lifted = program.module()
    graph = fx.Graph()
    copies: dict[Node, Any] = {}
    names = iter(_argument_names(program))
    for node in lifted.graph.nodes:
        if node.op == "call_module" and node.target == "_guards_fn":
            continue
        if node.op == "placeholder":
            copies[node] = graph.placeholder(next(names, node.name))
        elif node.op == "output":
            leaves = fx.node.map_arg(node.args[0], copies.__getitem__)
            structure = program.call_spec.out_spec
            result = pytree.tree_unflatten(list(leaves), structure) if structure is not None else leaves
            graph.output(_constructed(graph, result))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()  # removes attributes for training, and sizes that only guards read
    return graph_module(lifted, graph, "Exported")


def _argument_names(program: torch.export.ExportedProgram) -> list[str]:
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec) if spec is not None else ((), {})
    if len(pytree.tree_leaves((args, kwargs))) != len(args) + len(kwargs):
        raise Untraceable("arguments that are containers of tensors cannot be exported here")
    user = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    return [*user[: len(args)], *kwargs]


def _constructed(graph: fx.Graph, result: Any) -> Any:
    """Return the result as an argument of the graph, with a call of its class for each container that has its own.

    Raises:
        Untraceable: A graph cannot create a container.
    """
    if (call := construction(result)) is not None:
        args, kwargs = _constructed(graph, list(call.args)), _constructed(graph, call.kwargs)
        return graph.call_function(call.kind, tuple(args), kwargs)
    if isinstance(result, dict):
        return {key: _constructed(graph, value) for key, value in result.items()}
    if isinstance(result, (tuple, list)):
        items = [_constructed(graph, value) for value in result]
        return tuple(items) if isinstance(result, tuple) else items
    if result is None or isinstance(result, (Node, bool, int, float, str)):
        return result
    raise Untraceable(f"its result holds a {type(result).__name__}")
