"""Tools for a Keras model and its data, which the functions of this package share.

layers: Find the batch normalization of a model, and describe it.
copying: Copy a model, with some layers replaced or removed.
batches: Read the user's data batch by batch, and call a model with a batch.
observe: Observe the inputs of batch normalization, and set the statistics that it normalizes by.
"""
