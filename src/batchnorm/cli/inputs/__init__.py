"""Load the inputs of commands.

loading: The options and arguments for a network, its weights, data, and the shapes of inputs.
checkpoint: Weights in checkpoints of several trainers.
program: Exported programs, without running code in the file.
"""
