"""Measure a model of PyTorch for the doctor."""
