"""A model and its data: batches, calls, graphs, which layers are chosen, and the report of what was changed."""
