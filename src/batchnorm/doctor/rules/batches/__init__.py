"""Rules about what a batch contains: its size, its order, its padding, its domains and its values."""
