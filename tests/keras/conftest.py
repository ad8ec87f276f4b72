"""Cases run in one process for each backend, because Keras chooses its backend when it is imported.

`no_torch.py` makes imports of PyTorch fail in the process that imports it. pytest would import it to find docstrings.
"""

collect_ignore = ["cases", "no_torch.py", "verbs"]
