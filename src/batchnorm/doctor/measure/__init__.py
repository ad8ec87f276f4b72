"""The measurements of a model, in NumPy, and what follows from them, for models of every framework."""
