"""Tools for a model and its data, which `recalibrate`, `surgery` and `doctor` share.

Data and calls:
    batches: Read the user's data batch by batch, and call a model with a batch.
    inputs: The arguments of one call of a model, also with other sizes.
    outputs: The tensors that a model returns, and the difference of two results.
    recording: Run a model on example inputs: record the arguments of its layers, and find a smaller example.
    uncompiled: Run compiled models uncompiled.
    observe: Observe the inputs of layers, and set the statistics that they normalize by.
    progress, processes: The progress bar of a pass, and the processes that share it.

Graphs:
    model_graph: A whole model as one graph, in evaluation.
    forward_graph: One module's `forward` as a graph that is valid in training and in evaluation.
    lowering: Rewrite a graph as calls of plain functions.
    neighbours: The calls before and after each batch normalization in a graph.
    tracing: The two ways to trace, without a change that other threads see.
    errors: The error that tracing raises.

Functions that change a model:
    selection: The layers that the user chooses, as with `only=`.
    report: The layers that were changed or left, with reasons; imports no framework.
    description: Describe a layer of PyTorch.
    gate: How much error folding may add; imports no framework.
    arrays: Values of any framework as arrays.
"""

from typing import TYPE_CHECKING

from batchnorm._frameworks import parts_on_demand

if TYPE_CHECKING:
    from batchnorm.models import report as report

__getattr__ = parts_on_demand(__name__, "report")
