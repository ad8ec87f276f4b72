"""Run a model over data, and observe its layers.

calling: Call a model with a batch as its framework does, and compiled models uncompiled.
recording: Run a model on example inputs: record the arguments of its layers, and find a smaller example.
observe: Observe the inputs of layers, and set the statistics that they normalize by.
progress, processes: The progress bar of a pass, and the processes that share it.
"""
