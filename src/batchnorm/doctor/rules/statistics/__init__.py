"""Rules about the running statistics: whether they are moved, and whether they fit the data."""
