"""Tools for a model and its data, which `recalibrate`, `surgery` and `doctor` share.

Data and calls:
    batches: The user's data, batch by batch, and how a model is called with them.
    inputs: The arguments of one call, and the same with other sizes.
    outputs: The tensors that a model returns, and how far two results differ.
    recording: A run on example inputs, with the arguments that its layers were called with.
    observe: The inputs of layers in a forward pass, and the statistics that they normalize by.
    progress, processes: The progress bar of a pass, and the processes that share it.

Graphs:
    model_graph: A whole model as one graph, in evaluation.
    forward_graph: One module's `forward` as a graph, the same in training and in evaluation.
    lowering: A graph in terms of plain functions.
    neighbours: The calls before and after each batch normalization in a graph.
    errors: The error of both tracers.

Functions that change a model:
    selection: The layers that the user chooses, as with `only=`.
    report: The layers that were changed or left, and why.
"""
