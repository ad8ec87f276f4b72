"""The data of a model.

batches: Read the user's data batch by batch.
samples: Count the samples of a batch.
inputs: The arguments of one call of a model, also with other sizes.
outputs: The tensors that a model returns, and the difference of two results.
arrays: Values of any framework as arrays.
"""
