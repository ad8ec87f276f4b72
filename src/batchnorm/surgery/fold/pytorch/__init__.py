"""Fold batch normalization in a PyTorch model."""
