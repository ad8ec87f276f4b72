"""Graphs of a model, and of one module's `forward`.

model_graph: A whole model as one graph, in evaluation.
forward_graph: One module's `forward` as a graph that is valid in training and in evaluation.
lowering: Rewrite a graph as calls of plain functions.
neighbours: The calls before and after each batch normalization in a graph.
tracing: The two ways to trace, without a change that other threads see; the error that both raise.
"""
