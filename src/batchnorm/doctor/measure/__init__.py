"""Measure a model: its layers, the passes over its data, and the measurements that the rules read."""
