"""Measure a model: its layers, the passes over its data, and the results that the rules read."""
