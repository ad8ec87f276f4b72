"""Cases run in one process for each backend, because Keras chooses its backend when it is imported."""

collect_ignore = ["cases", "verbs"]
